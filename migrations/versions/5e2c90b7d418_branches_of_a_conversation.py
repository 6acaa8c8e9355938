"""Makes a conversation a tree: each message names the one that it follows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "5e2c90b7d418"
down_revision = "8d41f6b0c7a3"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_COLUMNS = {
    "parent_id": ID,
    "branch_of": ID,
    "branch_step": sa.Integer(),
    "prefix_len": sa.Integer(),
    "forced": sa.JSON(),
}


def upgrade() -> None:
    for name, kind in _COLUMNS.items():
        op.add_column("message", sa.Column(name, kind, nullable=True))
    # Until now each message followed the one before it.
    message = sa.table(
        "message", *map(sa.column, ("id", "conversation_id", "position", "parent_id"))
    )
    before = message.alias()
    parent = (
        sa.select(before.c.id)
        .where(
            before.c.conversation_id == message.c.conversation_id,
            before.c.position == message.c.position - 1,
        )
        .scalar_subquery()
    )
    op.execute(sa.update(message).values(parent_id=parent))


def downgrade() -> None:
    for name in _COLUMNS:
        op.drop_column("message", name)
