"""Models of which a batch's lines that are not jobs yet are cancelled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batches", sa.Column("cancelled_models", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("batches", "cancelled_models")
