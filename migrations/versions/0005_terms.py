"""Terms: priority, not_before and deadline of a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not batch_alter_table: on SQLite that copies the table, and its triggers stay behind.
    op.add_column("jobs", sa.Column("priority", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("not_before", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("deadline", sa.Double(), nullable=True))


def downgrade() -> None:
    for column in ("deadline", "not_before", "priority"):
        op.drop_column("jobs", column)
