"""Real servers for tests: Kafka, PostgreSQL, Redis and S3, each started in its own folder on a free port.

`parts.plugin` gives them to pytest as fixtures; `python -m parts kafka` starts one by hand (with `tools` on PYTHONPATH).
Nothing here is installed with Millrace.
"""
