"""First tables: batches, jobs, results, ledger, workers; terminal states that cannot change.

The triggers are the last line of defence: should a statement move a job without having looked at its state, the
database refuses it instead of ending the job twice.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.String(255)
TERMINAL = "('completed', 'failed', 'cancelled', 'expired')"


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("cancelling_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_tenant_created_at_id", "batches", ["tenant", "created_at", "id"])

    op.create_table(
        "jobs",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("batch_id", ID, nullable=True),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.String(512), nullable=True),
        sa.Column("model", ID, nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tier", sa.Integer(), nullable=False),
        sa.Column("fair_tag", sa.Double(), nullable=False),
        sa.Column("prefix_group", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("worker_id", ID, nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_jobs_batch_id"),
    )
    queued, held = sa.text("state = 'queued'"), sa.text("worker_id IS NOT NULL")
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["model", "tier", "fair_tag", "prefix_group", "id"],
        sqlite_where=queued,
        postgresql_where=queued,
    )
    op.create_index("ix_jobs_held", "jobs", ["worker_id", "id"], sqlite_where=held, postgresql_where=held)
    op.create_index("ix_jobs_batch_id_position", "jobs", ["batch_id", "position"])
    op.create_index("ix_jobs_batch_id_state", "jobs", ["batch_id", "state"])
    op.create_index("ix_jobs_tenant_created_at_id", "jobs", ["tenant", "created_at", "id"])

    op.create_table(
        "results",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("outputs", sa.JSON(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cached_tokens", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_results"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_results_job_id"),
    )

    op.create_table(
        "ledger",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("model", ID, nullable=False),
        sa.Column("batch_id", ID, nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cached_tokens", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "fence", name="pk_ledger"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_ledger_job_id"),
    )
    op.create_index("ix_ledger_batch_id_kind", "ledger", ["batch_id", "kind"])
    op.create_index("ix_ledger_tenant_created_at", "ledger", ["tenant", "created_at"])

    op.create_table(
        "workers",
        sa.Column("id", ID, nullable=False),
        sa.Column("model", ID, nullable=False),
        sa.Column("host", ID, nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("last_step_at", sa.Double(), nullable=True),
        sa.Column("num_running", sa.Integer(), nullable=False),
        sa.Column("num_waiting", sa.Integer(), nullable=False),
        sa.Column("tokens_per_second", sa.Double(), nullable=False),
        sa.Column("engine_pid", sa.Integer(), nullable=True),
        sa.Column("engine_starts", sa.Integer(), nullable=False),
        sa.Column("max_model_len", sa.Integer(), nullable=True),
        sa.Column("stats", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_index("ix_workers_state_lease_until", "workers", ["state", "lease_until"])

    if op.get_context().dialect.name == "sqlite":
        op.execute(
            "CREATE TRIGGER jobs_terminal_is_final BEFORE UPDATE OF state ON jobs "
            f"WHEN OLD.state IN {TERMINAL} AND NEW.state IS NOT OLD.state "
            "BEGIN SELECT RAISE(ABORT, 'a terminal job state cannot change'); END"
        )
    else:
        op.execute(
            "CREATE FUNCTION jobs_terminal_is_final() RETURNS trigger LANGUAGE plpgsql AS $$ "
            "BEGIN RAISE EXCEPTION 'a terminal job state cannot change' USING ERRCODE = '23514'; END $$"
        )
        op.execute(
            "CREATE TRIGGER jobs_terminal_is_final BEFORE UPDATE OF state ON jobs FOR EACH ROW "
            f"WHEN (OLD.state IN {TERMINAL} AND NEW.state IS DISTINCT FROM OLD.state) "
            "EXECUTE FUNCTION jobs_terminal_is_final()"
        )


def downgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        op.execute("DROP TRIGGER jobs_terminal_is_final")
    else:
        op.execute("DROP TRIGGER jobs_terminal_is_final ON jobs")
        op.execute("DROP FUNCTION jobs_terminal_is_final()")
    for table in ("workers", "ledger", "results", "jobs", "batches"):
        op.drop_table(table)
