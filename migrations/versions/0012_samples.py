"""How many samples a job asks for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Of jobs from before it is not read out of their bodies: they count as one sample, as they did.
    op.add_column("jobs", sa.Column("num_samples", sa.Integer(), nullable=False, server_default=sa.text("1")))


def downgrade() -> None:
    op.drop_column("jobs", "num_samples")
