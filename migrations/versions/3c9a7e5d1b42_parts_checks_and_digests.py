"""Adds parts, template arguments, checks and digests of replies; renames heartbeat columns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3c9a7e5d1b42"
down_revision = "f0b1c5a7d2e4"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Thinking, answer and tool calls of a reply, each with its steps. Without them the next turn
    # would pass the thinking to the model as if it were the answer.
    op.add_column("message", sa.Column("parts", sa.JSON(), nullable=True))
    # The arguments and tool schemas of the chat template: the prompt of a reply cannot be
    # rendered again without them.
    op.add_column("message", sa.Column("template", sa.JSON(), nullable=True))
    # The tool whose result a message of role "tool" holds.
    op.add_column("message", sa.Column("tool_name", sa.Text(), nullable=True))
    # How well the lens and the attention of this reply agree with the model, measured on its
    # steps: a model can change after the check at load.
    op.add_column("message", sa.Column("checks", sa.JSON(), nullable=True))
    # Covers the message, its prompt, its settings and the digests of its steps, and reveals a
    # change of any of them.
    op.add_column("message", sa.Column("digest", sa.String(length=64), nullable=True))
    # Empty for messages recorded without digests: from now on, a missing digest is a fault.
    op.execute("UPDATE message SET digest = ''")
    # Covers the step's rows.
    op.add_column("step", sa.Column("digest", sa.LargeBinary(), nullable=True))
    # Covers the step's full tensors separately: pruning removes them and keeps the rows.
    op.add_column("step", sa.Column("tensor_digest", sa.LargeBinary(), nullable=True))
    # A time is named after its event, as in the other tables.
    op.alter_column("message", "seen_at", new_column_name="heartbeat_at")
    op.alter_column("worker", "heartbeat", new_column_name="heartbeat_at")


def downgrade() -> None:
    op.alter_column("worker", "heartbeat_at", new_column_name="heartbeat")
    op.alter_column("message", "heartbeat_at", new_column_name="seen_at")
    for table, columns in (
        ("step", ("tensor_digest", "digest")),
        ("message", ("digest", "checks", "tool_name", "template", "parts")),
    ):
        for column in columns:
            op.drop_column(table, column)
