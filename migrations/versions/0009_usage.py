"""Prices; places in the order of completion; retries; which ended jobs Celery has been told of.

Ended jobs from before count as told: their senders were told then, or their results have expired since.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

ID = sa.String(255)
AMOUNT = sa.String(32)


def upgrade() -> None:
    op.create_table(
        "prices",
        sa.Column("model", ID, nullable=False),
        sa.Column("valid_from", sa.Double(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("prompt", AMOUNT, nullable=False),
        sa.Column("cached_prompt", AMOUNT, nullable=False),
        sa.Column("completion", AMOUNT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("model", "valid_from", name="pk_prices"),
    )
    op.add_column("batches", sa.Column("retry_of", ID, nullable=True))
    op.add_column(
        "batches", sa.Column("num_placed", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    op.add_column("jobs", sa.Column("retry_of", ID, nullable=True))
    op.add_column("jobs", sa.Column("place", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("told_at", sa.Double(), nullable=True))
    op.execute("UPDATE jobs SET told_at = finished_at WHERE source = 'redis' AND finished_at IS NOT NULL")
    for name, columns, condition in (
        ("ix_jobs_placed", ["batch_id", "place"], "place IS NOT NULL"),
        (
            "ix_jobs_unplaced",
            ["batch_id", "finished_at", "id"],
            "place IS NULL AND finished_at IS NOT NULL AND batch_id IS NOT NULL",
        ),
        (
            "ix_jobs_untold",
            ["finished_at", "id"],
            "told_at IS NULL AND finished_at IS NOT NULL AND source = 'redis'",
        ),
    ):
        op.create_index(
            name, "jobs", columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition)
        )


def downgrade() -> None:
    for name in ("ix_jobs_untold", "ix_jobs_unplaced", "ix_jobs_placed"):
        op.drop_index(name, "jobs")
    for column in ("told_at", "place", "retry_of"):
        op.drop_column("jobs", column)
    for column in ("num_placed", "retry_of"):
        op.drop_column("batches", column)
    op.drop_table("prices")
