"""Runs the revisions on the connection the service gives."""

from alembic import context

from millrace_drift_monitor.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, transaction_per_migration=False
)
with context.begin_transaction():
    context.run_migrations()
