"""An installed lens in the explorer: chosen in the step panel and on the map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Lens,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.dashboard import app_pages

NAME = "jacobian"


def mapped(lens: Lens) -> Lens:
    """A reading by another lens, which has no map for the embedding."""
    kept = range(1, len(lens.entropy))
    return Lens(
        step_index=lens.step_index,
        token_ids=lens.token_ids[1:],
        tokens=tuple(tuple(f"{text}!" for text in lens.tokens[row]) for row in kept),
        logits=lens.logits[1:],
        probs=lens.probs[1:],
        entropy=lens.entropy[1:],
        chosen_rank=lens.chosen_rank[1:],
        chosen_prob=lens.chosen_prob[1:],
        kl=lens.kl[1:],
        name=NAME,
        layers=np.array(kept),
    )


def build(db: Path) -> tuple[int, int, list[Lens]]:
    rng = np.random.default_rng(2)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Read twice")
        writer.add_message(conversation, ChatMessage(Role.USER, "Hello"))
        policy = CapturePolicy(tensors="none", lenses=(NAME,))
        reply = writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(), policy, claim=True
        )
        writer.start_reply(reply, builders.turn_start("none"))
        lenses = []
        for index in range(3):
            step = replace(builders.step(index, rng, with_lens=True), tensors=())
            assert step.lens is not None
            lenses.append(step.lens)
            writer.append(reply, [replace(step, lenses=(mapped(step.lens),))])
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "ok", "end of turn", 1.0))
    return conversation, reply, lenses


def test_the_panel_and_the_map_show_the_chosen_lens(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    conversation, reply, lenses = build(tmp_path / "store.db")
    open_store(str(tmp_path / "store.db"))
    app = app_pages.chat(conversation=conversation, message=reply, step=1)
    assert not app.exception
    box = app.selectbox(key="lens_name")
    assert box.options == ["Logit Lens", NAME]
    layers = len(lenses[1].entropy)
    assert len(app_pages.shown(app, "lens")["rows"]) == layers
    box.set_value(NAME).run()
    assert not app.exception
    rows = app_pages.shown(app, "lens")["rows"]
    assert [row["layer"] for row in rows] == list(range(layers - 1, 0, -1))
    assert all(cell["text"].endswith("!") for row in rows for cell in row["cells"])
    captions = " ".join(app_pages.plainly(c.value) for c in app.caption)
    assert f"The installed lens {NAME}" in captions
    app.selectbox(key="map_lens").set_value(NAME).run()
    assert not app.exception


def test_a_reply_that_only_the_logit_lens_has_read_offers_no_choice(
    filled_store: object,
) -> None:
    app = app_pages.chat(conversation=1)
    assert not app.exception
    assert not [box for box in app.selectbox if box.key in ("lens_name", "map_lens")]
