"""Schema of the drift monitor, by Alembic."""
