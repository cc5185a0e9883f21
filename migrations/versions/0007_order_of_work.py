"""The order of work: clocks of fair queueing, deadlines, delays and retries.

Jobs that are queued keep the tags they have: new ones start at the head of the queue and find their places there.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

ID = sa.String(255)
DUE = sa.text("state = 'queued' AND tier >= 10")
DEADLINE = sa.text("deadline IS NOT NULL AND finished_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "fair_clocks",
        sa.Column("model", ID, nullable=False),
        sa.Column("tier", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("turn_ends", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("model", "tier", "tenant", "priority", name="pk_fair_clocks"),
    )
    op.add_column("jobs", sa.Column("retry", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("failures", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.create_index("ix_jobs_due", "jobs", ["not_before"], sqlite_where=DUE, postgresql_where=DUE)
    op.create_index(
        "ix_jobs_deadline", "jobs", ["deadline", "model"], sqlite_where=DEADLINE, postgresql_where=DEADLINE
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_deadline", "jobs")
    op.drop_index("ix_jobs_due", "jobs")
    op.drop_column("jobs", "failures")
    op.drop_column("jobs", "retry")
    op.drop_table("fair_clocks")
