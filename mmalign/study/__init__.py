"""Studies: many runs that answer declared questions.

plan.py        a study file: parents x variants x seeds, as runs;  settings.py: its keys
identity.py    what a run is made from, its folder and state;  cost.py: FLOPs and disk
preview.py     the dry run;  slurm.py: the same as job arrays
schedule.py    runs what is not done, several at once;  run.py, data.py: one run
scores.py      every score of every document: documents.parquet
contrasts.py   the questions, and their answers from scores
statistics.py  error, interval and tests of a difference, from seeds and documents
report.py      report.md, with tables.py and figures.py
"""
