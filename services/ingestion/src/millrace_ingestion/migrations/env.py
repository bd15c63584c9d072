"""Alembic's entry: runs the revisions on the connection the service hands over."""

from alembic import context

from millrace_ingestion.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
context.run_migrations()
