"""What Alembic runs for every command: hands it a connection and the tables of `jobs.models`.

The connection comes from `migrations.schema`, already inside a transaction; started by Alembic's own commands
(to write a new revision), it opens the database that `jobs.settings` names.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from jobs.database import Database
from jobs.models import Base
from jobs.settings import Settings


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,  # SQLite's too, because `Database` says BEGIN itself
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    migrate(given)
else:
    database = Database(Settings().database, pool_size=1)
    with database.write() as opened:
        migrate(opened)
    database.close()
