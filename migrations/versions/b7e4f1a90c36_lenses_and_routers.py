"""Adds readings by lenses of any name, and the experts that routers chose."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "b7e4f1a90c36"
down_revision = "5e2c90b7d418"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LOGIT = "logit"
# Ordered by its bytes on both engines.
NAME = sa.String(64).with_variant(sa.String(64, collation="C"), "postgresql")

# The tables by name: the rest of their key, and their other columns.
_TABLES = {
    "lens_layer": (
        ("layer",),
        (
            ("entropy", sa.Double(), True),
            ("chosen_rank", sa.Integer(), False),
            ("chosen_prob", sa.Double(), True),
            ("kl", sa.Double(), True),
        ),
    ),
    "lens_entry": (
        ("layer", "rank"),
        (
            ("token_id", sa.Integer(), False),
            ("token", sa.Text(), False),
            ("logit", sa.Double(), True),
            ("prob", sa.Double(), True),
        ),
    ),
}


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _rebuild(name: str, *, with_lens: bool) -> None:
    """SQLite: another table in place of this one, whose rows are in the order of its key."""
    keys, others = _TABLES[name]
    lens = [sa.Column("lens", NAME, nullable=False, server_default=LOGIT)]
    rebuilt = op.create_table(
        f"rebuilt_{name}",
        sa.Column("step_id", ID, nullable=False),
        *(lens if with_lens else []),
        *(sa.Column(key, sa.Integer(), autoincrement=False, nullable=False) for key in keys),
        *(sa.Column(column, kind, nullable=nullable) for column, kind, nullable in others),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name=f"fk_{name}_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(
            "step_id", *(["lens"] if with_lens else []), *keys, name=f"pk_{name}"
        ),
        sqlite_with_rowid=False,
    )
    copied = ["step_id", *keys, *(column for column, _, _ in others)]
    old = sa.table(name, *map(sa.column, copied))
    rows = sa.select(*(old.c[column] for column in copied))
    rows = rows.order_by(old.c.step_id, *(old.c[key] for key in keys))
    op.execute(sa.insert(rebuilt).from_select(copied, rows))
    op.drop_table(name)
    op.rename_table(f"rebuilt_{name}", name)


def upgrade() -> None:
    # A step is read by several lenses: the Logit Lens, and those that others published.
    for name, (keys, _) in _TABLES.items():
        if _is_sqlite():
            _rebuild(name, with_lens=True)
            continue
        lens = sa.Column("lens", NAME, nullable=False, server_default=LOGIT)
        op.add_column(name, lens)
        op.drop_constraint(f"pk_{name}", name, type_="primary")
        op.create_primary_key(f"pk_{name}", name, ["step_id", "lens", *keys])
    # Readings can be added to a reply that has ended, which nothing else changes.
    op.add_column(
        "message", sa.Column("readings", sa.Integer(), nullable=False, server_default="0")
    )
    # The experts of a mixture that each layer's router chose for a token.
    op.create_table(
        "router_entry",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("expert", sa.Integer(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_router_entry_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("step_id", "layer", "rank", name="pk_router_entry"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("router_entry")
    op.drop_column("message", "readings")
    for name, (keys, _) in _TABLES.items():
        table = sa.table(name, sa.column("lens"))
        op.execute(sa.delete(table).where(table.c.lens != LOGIT))
        if _is_sqlite():
            _rebuild(name, with_lens=False)
            continue
        op.drop_constraint(f"pk_{name}", name, type_="primary")
        op.drop_column(name, "lens")
        op.create_primary_key(f"pk_{name}", name, ["step_id", *keys])
