"""The study of notebook 07: many short training runs of the tiny Falcon, a row of data/study.csv for each. `python -m helpers.study` runs it."""
