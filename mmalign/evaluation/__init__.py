"""From questions to a report: scores of a language model, without vision.

    files               load_documents       tasks/             one file per task
      Document          plan_scoring         requests.py        tokens, cut as the harness cuts them
        |                                    prefix_tree.py     each distinct prefix only once
        |               run_plan             scoring.py         log-likelihoods of all choices
        |               generate             ../model           free-form answers
        v               Evaluation           evaluation.py      plan, score, write: evaluate.py's
      items.jsonl                            during_training.py ... and the trainer's
      results.json      write_items          items.py           one object per document; summaries
        |               compare_evaluations  compare.py         two models, document by document
        |               document_scores      document_scores.py every metric of it, also those of
        |                                    beside.py          choice_scores.py, yes_no_scores.py;
        |                                    rules.py           baselines without the question
        v               metrics.py, statistics.py               scores and their uncertainty
      report.md         write_report         report/            sections, tables, figures

visual_questions.py instead asks about images, to measure whether a finetuned model uses them.
"""
