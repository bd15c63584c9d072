"""The command line `millrace`: data on stdout, talk on stderr; exit codes 0 ok, 1 failed, 2 usage, 3 timed out."""

from millrace.cli.main import main

__all__ = ["main"]
