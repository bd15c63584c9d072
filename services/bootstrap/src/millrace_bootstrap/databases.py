"""One database and one role a service, in a PostgreSQL server that others may use too."""

import logging

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from millrace_bootstrap.settings import DatabasesSettings

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 10
LOCK = 0x6D69626F


def connect(url: str) -> psycopg.Connection:
    """A connection by a SQLAlchemy URL.

    Raises:
        psycopg.OperationalError: the server does not answer or does not let in.
    """
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)


def bring_databases(settings: DatabasesSettings) -> None:
    """Make the roles and databases that are not there; a role's password becomes the one of the settings.

    Raises:
        psycopg.Error: the server does not answer or refuses.
    """
    with connect(settings.admin_url) as connection:
        # Two jobs at once take turns: CREATE DATABASE has no IF NOT EXISTS.
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        for name, wanted in settings.databases.items():
            role, database = sql.Identifier(wanted.role), sql.Identifier(name)
            known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [wanted.role]).fetchone()
            verb = sql.SQL("ALTER" if known else "CREATE")
            statement = sql.SQL("{} ROLE {} LOGIN PASSWORD {}")
            connection.execute(statement.format(verb, role, sql.Literal(wanted.password)))
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                log.info("database %s is there", name)
                continue
            # Some servers let only members of a role give it something.
            connection.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(role))
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, role))
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
            log.info("database %s: made, role %s owns it", name, wanted.role)
