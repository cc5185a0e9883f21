"""Files, and what a batch that came as a file has beside its jobs."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ID = sa.String(255)


def _zero(name: str, kind: type[sa.Integer]) -> sa.Column[Any]:
    return sa.Column(name, kind(), nullable=False, server_default=sa.text("0"))


def _columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("input_file_id", ID, nullable=True),
        sa.Column("output_file_id", ID, nullable=True),
        sa.Column("error_file_id", ID, nullable=True),
        sa.Column("output_expires_seconds", sa.Integer(), nullable=True),
        sa.Column("completion_window", sa.String(16), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("model", ID, nullable=True),
        sa.Column("errors", sa.JSON(), nullable=True),
        sa.Column("in_progress_at", sa.Double(), nullable=True),
        sa.Column("finalizing_at", sa.Double(), nullable=True),
        sa.Column("next_offset", sa.BigInteger(), nullable=True),
        _zero("num_inserted", sa.Integer),
        _zero("reserved_tokens", sa.BigInteger),
        _zero("reserved_bytes", sa.BigInteger),
        sa.Column("clerk", sa.String(32), nullable=True),
        sa.Column("clerk_until", sa.Double(), nullable=True),
    ]


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant", ID, nullable=False),
        sa.Column("key_id", ID, nullable=True),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(512), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_tenant_created_at_id", "files", ["tenant", "created_at", "id"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    for column in _columns():
        op.add_column("batches", column)
    unfinished = sa.text("finished_at IS NULL")
    op.create_index(
        "ix_batches_open", "batches", ["created_at"], sqlite_where=unfinished, postgresql_where=unfinished
    )
    op.create_index("ix_batches_input_file_id", "batches", ["input_file_id"])


def downgrade() -> None:
    for index in ("ix_batches_input_file_id", "ix_batches_open"):
        op.drop_index(index, "batches")
    for column in reversed(_columns()):
        op.drop_column("batches", column.name)
    op.drop_table("files")
