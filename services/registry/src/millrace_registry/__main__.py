"""`python -m millrace_registry`: the same as the command `millrace-registry`."""

from millrace_registry.app import main

main()
