"""Schedules, their runs, and what workers have learned about their pace."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ID = sa.String(255)
LIVE, DUE = sa.text("deleted_at IS NULL"), sa.text("next_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("key_id", ID, nullable=True),
        sa.Column("name", ID, nullable=False),
        sa.Column("cron", sa.String(100), nullable=False),
        sa.Column("time_zone", sa.String(64), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("missed", sa.String(16), nullable=False),
        sa.Column("completion_window", sa.String(16), nullable=True),
        sa.Column("num_jobs", sa.Integer(), nullable=False),
        sa.Column("jobs", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_schedules"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="fk_schedules_tenant"),
    )
    op.create_index(
        "uq_schedules_name",
        "schedules",
        ["tenant", "name"],
        unique=True,
        sqlite_where=LIVE,
        postgresql_where=LIVE,
    )
    op.create_index("ix_schedules_next_at", "schedules", ["next_at"], sqlite_where=DUE, postgresql_where=DUE)
    op.create_index("ix_schedules_tenant_created_at_id", "schedules", ["tenant", "created_at", "id"])
    op.create_table(
        "schedule_runs",
        sa.Column("id", ID, nullable=False),
        sa.Column("schedule_id", ID, nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("fire_time", sa.Double(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("batch_id", ID, nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_schedule_runs"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name="fk_schedule_runs_schedule_id"),
    )
    op.create_index("uq_schedule_runs_fire_time", "schedule_runs", ["schedule_id", "fire_time"], unique=True)
    op.add_column("batches", sa.Column("schedule_id", ID, nullable=True))
    op.add_column("workers", sa.Column("pace", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "pace")
    op.drop_column("batches", "schedule_id")
    op.drop_table("schedule_runs")
    op.drop_table("schedules")
