"""Studies: many runs that answer declared questions.

statistics.py   error, interval and tests of a difference, from seeds and documents
contrasts.py    the questions, and their answers from scores
"""
