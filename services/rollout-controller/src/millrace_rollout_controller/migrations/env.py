"""Alembic's entry: runs the revisions on the connection the service hands over."""

from alembic import context

from millrace_rollout_controller.sql_store import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
