"""Adds the origin of each step's token, and steps for given tokens."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "8d41f6b0c7a3"
down_revision = "3c9a7e5d1b42"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# SQLite rebuilds the table, which must go on without reusing ids.
_KEPT = {"sqlite_autoincrement": True}
_CHILDREN = (
    *("tensor", "topk_entry", "attention_layer", "attention_entry", "lens_layer", "lens_entry"),
)


def _last_id() -> int | None:
    """The last id that SQLite gave a step, which may have been deleted since."""
    if op.get_bind().dialect.name != "sqlite":
        return None
    query = sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'step'")
    return op.get_bind().execute(query).scalar()


def _set_last_id(last: int | None) -> None:
    if last is None:
        return
    connection = op.get_bind()
    connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = 'step'"))
    statement = sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES ('step', :last)")
    connection.execute(statement, {"last": last})


def upgrade() -> None:
    last = _last_id()
    with op.batch_alter_table("step", table_kwargs=_KEPT) as step:
        # The tokens of a prompt or of a text become steps beside the generated ones.
        step.add_column(sa.Column("origin", sa.String(8), nullable=False, server_default="sampled"))
        # It counts generated tokens, which a given one is not.
        step.alter_column("step_index", existing_type=sa.Integer(), nullable=True)
        # Made anew in this order: SQLite's table is rebuilt, and Alembic reads them in any order.
        step.drop_constraint("fk_step_message_id_message", type_="foreignkey")
        step.drop_constraint("uq_step_message_id_step_index", type_="unique")
        step.create_foreign_key(
            "fk_step_message_id_message", "message", ["message_id"], ["id"], ondelete="CASCADE"
        )
        step.create_unique_constraint("uq_step_message_id_step_index", ["message_id", "step_index"])
        step.create_unique_constraint("uq_step_message_id_position", ["message_id", "position"])
    _set_last_id(last)
    # The message whose text was scored under this or another model.
    op.add_column("message", sa.Column("score_of", ID, nullable=True))


def downgrade() -> None:
    op.drop_column("message", "score_of")
    step_table = sa.table("step", sa.column("id"), sa.column("step_index"))
    given = sa.select(step_table.c.id).where(step_table.c.step_index.is_(None))
    for name in _CHILDREN:
        child = sa.table(name, sa.column("step_id"))
        op.execute(sa.delete(child).where(child.c.step_id.in_(given)))
    op.execute(sa.delete(step_table).where(step_table.c.step_index.is_(None)))
    last = _last_id()
    with op.batch_alter_table("step", table_kwargs=_KEPT) as step:
        step.drop_constraint("uq_step_message_id_position", type_="unique")
        step.alter_column("step_index", existing_type=sa.Integer(), nullable=False)
        step.drop_column("origin")
    _set_last_id(last)
