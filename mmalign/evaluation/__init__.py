"""From questions to a report: scores of a language model, and of a model that sees.

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

Tasks about pictures take another way from documents to answers, and have evaluations for blind,
exchanged and corrupted pictures beside the clean one:

    documents           evaluate_pictures  vision.py           plan, ask, write: evaluate.py's
      pixels            load_pictures      pictures.py         own, exchanged or none, decoded ahead
        |               corrupt            corruptions.py      19 types; weather.py
        v               generate           vision_model.py     prompts in the model's template
      answers.jsonl     AnswerLog          answer_log.py       an interrupted evaluation continues
        |               vqa_accuracy.py, cider.py (ptb_tokenizer.py), yes_no.py: official metrics
        v
      pictures.md       write_shown_report shown_pictures.py   clean beside the others

warm_up.py compiles the kernels of both ways while the weights load. visual_questions.py asks about
held-out images of the training data, to measure whether a finetuned model uses them.
"""
