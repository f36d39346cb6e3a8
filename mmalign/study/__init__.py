"""Studies: many runs that answer declared questions.

study_file.py  the TOML file, with settings.py;  plan.py: parents x variants x seeds, as runs
identity.py    what a run is made from, its folder and state
cost.py        FLOPs and disk;  preview.py: the dry run;  slurm.py: the study as job arrays
schedule.py    runs what is not done, several at once;  run.py: one run, with data.py, forgetting.py
               and pictures.py
scores.py      every score of every document: documents.parquet
statistics.py  error, interval and tests of a difference, from seeds and documents
contrasts.py   the questions, and their answers from scores
report.py      report.md, with tables.py, sight.py, figures.py and provenance.py
"""
