"""Tenants, keys, tallies; who asked for a job, and how many tokens it may take.

What exists belongs to the tenants whose names it carries, so far always `default`. The tallies start from the rows:
jobs that are open, bytes that are stored, tokens that were billed today. For jobs from before, the estimate of tokens
is a quarter of the stored body's bytes and 1,024 to generate: a body is not taken apart here, because PostgreSQL
refuses to read a JSON text with an escaped NUL in it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from jobs.dialects import now

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ID = sa.String(255)
OPEN = "('queued', 'in_progress', 'cancelling')"
DAY = 86_400


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", ID, nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("quotas", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
    )
    op.create_table(
        "keys",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("name", ID, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("last_used_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="fk_keys_tenant"),
    )
    op.create_index("ix_keys_tenant_created_at", "keys", ["tenant", "created_at"])
    op.create_table(
        "tallies",
        sa.Column("tenant", ID, nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("open_jobs", sa.BigInteger(), nullable=False),
        sa.Column("open_tokens", sa.BigInteger(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("day_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "shard", name="pk_tallies"),
    )
    for table in ("batches", "jobs", "ledger"):
        op.add_column(table, sa.Column("key_id", ID, nullable=True))
    op.add_column(
        "jobs", sa.Column("estimated_tokens", sa.BigInteger(), nullable=False, server_default=sa.text("0"))
    )
    _fill()


def _fill() -> None:
    connection = op.get_bind()
    time_now = connection.scalars(sa.select(now())).one()
    day = int(time_now // DAY)
    # Written as ASCII, so characters are bytes.
    connection.execute(
        sa.text(
            f"UPDATE jobs SET estimated_tokens = length(CAST(body AS TEXT)) / 4 + 1024 WHERE state IN {OPEN}"
        )
    )
    connection.execute(
        sa.text(
            "INSERT INTO tenants (id, weight, quotas, created_at) "
            "SELECT tenant, 1.0, '{}', :time_now FROM "
            "(SELECT 'default' AS tenant UNION SELECT tenant FROM jobs UNION SELECT tenant FROM batches "
            "UNION SELECT tenant FROM ledger) AS named"
        ),
        {"time_now": time_now},
    )
    connection.execute(
        sa.text(
            "INSERT INTO tallies (tenant, shard, open_jobs, open_tokens, stored_bytes, day, day_tokens) "
            "SELECT id, 0, "
            f"(SELECT count(*) FROM jobs WHERE tenant = tenants.id AND state IN {OPEN}), "
            "(SELECT coalesce(sum(estimated_tokens), 0) FROM jobs "
            f"WHERE tenant = tenants.id AND state IN {OPEN}), "
            "(SELECT coalesce(sum(length(CAST(body AS TEXT))), 0) FROM jobs WHERE tenant = tenants.id) + "
            "(SELECT coalesce(sum(length(CAST(outputs AS TEXT))), 0) FROM results "
            "JOIN jobs ON jobs.id = results.job_id WHERE jobs.tenant = tenants.id), "
            ":day, "
            "(SELECT coalesce(sum(prompt_tokens + completion_tokens), 0) FROM ledger "
            "WHERE tenant = tenants.id AND kind = 'billed' AND created_at >= :midnight) "
            "FROM tenants"
        ),
        {"day": day, "midnight": float(day * DAY)},
    )


def downgrade() -> None:
    op.execute("ALTER TABLE jobs DROP COLUMN estimated_tokens")
    for table in ("ledger", "jobs", "batches"):
        op.execute(f"ALTER TABLE {table} DROP COLUMN key_id")
    for table in ("tallies", "keys", "tenants"):
        op.drop_table(table)
