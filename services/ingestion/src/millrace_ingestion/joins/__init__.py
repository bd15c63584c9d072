"""Joins of two contracts' records by key within a bound of event time.

A join is a source like topics and files: registered, read by one process, paused, resumed, listed. Its rows are records of a contract of their
own, which everything that reads records (features, training sets, time travel) knows nothing special about. It goes by the versions of its
inputs' tables: `inputs.py` reads them, `position.py` says how far it is and what comes next, `matching.py` finds partners, `rows.py` makes what
one step lands, `outputs.py` makes records of it, `join_source.py` runs the steps.
"""
