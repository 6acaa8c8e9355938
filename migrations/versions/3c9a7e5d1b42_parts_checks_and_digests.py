"""Parts of a reply, arguments of its chat template, checks of its numbers, digests; heartbeats."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3c9a7e5d1b42"
down_revision = "f0b1c5a7d2e4"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # What a reply consists of: thinking, answer and tool calls, each with its steps. Without it
    # the next turn would hand thinking back to the model as if it had been the answer.
    op.add_column("message", sa.Column("parts", sa.JSON(), nullable=True))
    # The arguments and tool schemas that the chat template was given: the prompt of a reply
    # cannot be rendered again without them.
    op.add_column("message", sa.Column("template", sa.JSON(), nullable=True))
    # The tool whose answer a message of role "tool" holds.
    op.add_column("message", sa.Column("tool_name", sa.Text(), nullable=True))
    # How far this reply's own lens and attention agree with the model, measured on its steps: a
    # model can change after the check at load.
    op.add_column("message", sa.Column("checks", sa.JSON(), nullable=True))
    # Covers the message, its prompt, its settings and the digests of its steps, so that a change
    # of any of them is found.
    op.add_column("message", sa.Column("digest", sa.String(length=64), nullable=True))
    # What was recorded before there were digests has none: a missing one is a fault from now on.
    op.execute("UPDATE message SET digest = ''")
    # Covers the step's rows.
    op.add_column("step", sa.Column("digest", sa.LargeBinary(), nullable=True))
    # Covers the step's full tensors, by themselves: pruning removes them and keeps the rows.
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
