"""The single-machine runner: the production entry points, started from a table, watched and stopped in order."""
