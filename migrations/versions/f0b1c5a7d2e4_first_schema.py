"""The first schema: conversations, messages, steps, and everything captured at a step."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "f0b1c5a7d2e4"
down_revision = None
branch_labels = None
depends_on = None

# SQLite numbers rows by itself only in a column declared INTEGER.
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "conversation",
        sa.Column("id", ID, nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        # The same in every copy of a conversation, so that none is copied twice.
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_conversation"),
        sa.UniqueConstraint("uid", name="uq_conversation_uid"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_conversation_updated_at_id", "conversation", ["updated_at", "id"])
    op.create_table(
        "store_state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name="ck_store_state_one_row"),
        sa.PrimaryKeyConstraint("id", name="pk_store_state"),
    )
    op.create_table(
        "worker",
        sa.Column("id", ID, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=True),
        sa.Column("heartbeat", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_worker"),
        sa.UniqueConstraint("owner", name="uq_worker_owner"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "message",
        sa.Column("id", ID, nullable=False),
        sa.Column("conversation_id", ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("model_id", sa.Text(), nullable=True),
        sa.Column("prompt_len", sa.Integer(), nullable=True),
        sa.Column("owner", sa.Text(), nullable=True),
        # A process on another machine is judged by its last sign of life.
        sa.Column("seen_at", TIME, nullable=True),
        sa.Column("stop_requested", sa.Boolean(), nullable=False),
        # Tells tensors that were thrown away from tensors that were never kept.
        sa.Column("tensors_pruned_at", TIME, nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("choice", sa.JSON(), nullable=True),
        sa.Column("sampling", sa.JSON(), nullable=True),
        sa.Column("policy", sa.JSON(), nullable=True),
        sa.Column("generation", sa.JSON(), nullable=True),
        sa.Column("capture", sa.JSON(), nullable=True),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversation.id"],
            name="fk_message_conversation_id_conversation",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_message"),
        sa.UniqueConstraint(
            "conversation_id", "position", name="uq_message_conversation_id_position"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_message_status_id", "message", ["status", "id"])
    op.create_table(
        "prompt_token",
        sa.Column("message_id", ID, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("segment", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(
            ["message_id"],
            ["message.id"],
            name="fk_prompt_token_message_id_message",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("message_id", "position", name="pk_prompt_token"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "step",
        sa.Column("id", ID, nullable=False),
        sa.Column("message_id", ID, nullable=False),
        sa.Column("step_index", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("token_bytes", sa.LargeBinary(), nullable=False),
        sa.Column("is_special", sa.Boolean(), nullable=False),
        sa.Column("logit", sa.Double(), nullable=True),
        sa.Column("prob", sa.Double(), nullable=True),
        sa.Column("logprob", sa.Double(), nullable=True),
        sa.Column("entropy", sa.Double(), nullable=True),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("margin", sa.Double(), nullable=True),
        sa.Column("sampled_prob", sa.Double(), nullable=True),
        sa.Column("elapsed_ms", sa.Double(), nullable=True),
        sa.Column("settle_layer", sa.Integer(), nullable=True),
        sa.Column("tensor_bytes", sa.BigInteger(), nullable=False),
        sa.Column("greedy_id", sa.Integer(), nullable=True),
        sa.Column("decision", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(
            ["message_id"], ["message.id"], name="fk_step_message_id_message", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_step"),
        sa.UniqueConstraint("message_id", "step_index", name="uq_step_message_id_step_index"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "attention_entry",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_attention_entry_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("step_id", "layer", "rank", name="pk_attention_entry"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "attention_layer",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("missing", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_attention_layer_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("step_id", "layer", name="pk_attention_layer"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "lens_entry",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("logit", sa.Double(), nullable=True),
        sa.Column("prob", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_lens_entry_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("step_id", "layer", "rank", name="pk_lens_entry"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "lens_layer",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("entropy", sa.Double(), nullable=True),
        sa.Column("chosen_rank", sa.Integer(), nullable=False),
        sa.Column("chosen_prob", sa.Double(), nullable=True),
        sa.Column("kl", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_lens_layer_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("step_id", "layer", name="pk_lens_layer"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "tensor",
        sa.Column("id", ID, nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("dtype", sa.String(length=16), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("layers", sa.JSON(), nullable=False),
        sa.Column("key_offset", sa.Integer(), nullable=False),
        sa.Column("codec", sa.String(length=16), nullable=False),
        sa.Column("checksum", sa.String(length=32), nullable=False),
        sa.Column("raw_bytes", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_tensor_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_tensor"),
        sa.UniqueConstraint("step_id", "name", name="uq_tensor_step_id_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "topk_entry",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("logit", sa.Double(), nullable=True),
        sa.Column("prob", sa.Double(), nullable=True),
        sa.Column("sampled_prob", sa.Double(), nullable=True),
        sa.Column("noise", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["step_id"], ["step.id"], name="fk_topk_entry_step_id_step", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("step_id", "rank", name="pk_topk_entry"),
        sqlite_with_rowid=False,
    )
    # The one row every write counts up.
    op.execute("INSERT INTO store_state (id, version) VALUES (1, 0)")


def downgrade() -> None:
    op.drop_table("topk_entry")
    op.drop_table("tensor")
    op.drop_table("lens_layer")
    op.drop_table("lens_entry")
    op.drop_table("attention_layer")
    op.drop_table("attention_entry")
    op.drop_table("step")
    op.drop_table("prompt_token")
    op.drop_table("message")
    op.drop_table("worker")
    op.drop_table("store_state")
    op.drop_table("conversation")
