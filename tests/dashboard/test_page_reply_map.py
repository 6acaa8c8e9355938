"""The reply map without a browser, of any reply."""

from __future__ import annotations

import pytest

from dashboard.viewdata import attention
from dashboard.views import reply_map
from tests.dashboard import app_pages, sample_stores


def test_the_map_on_an_empty_store_leads_to_the_chat(empty_store: str) -> None:
    app = app_pages.wide_map()
    assert not app.exception
    assert "No replies yet. Start a chat, then see its map here." in app.markdown[-1].value


@pytest.mark.parametrize("story", ["first", "hostile", "long", "bare", "unknown", "failed"])
@pytest.mark.parametrize("kind", reply_map.KINDS)
def test_the_map_of_any_reply(filled_store: sample_stores.Samples, story: str, kind: str) -> None:
    conversation, message = getattr(filled_store, story)
    app = app_pages.wide_map(conversation=conversation, message=message)
    assert not app.exception
    app.button_group(key="map_kind").set_value(kind).run()
    assert not app.exception
    captions = " ".join(caption.value for caption in app.caption)
    if story == "bare":
        assert (sample_stores.LENS_REASON if kind == "layers" else "no attention") in captions
        assert app_pages.drawn(app) == 1  # the step alone
    else:
        assert app_pages.drawn(app) == 2


def test_the_attention_map_of_one_head_needs_its_tensors(
    filled_store: sample_stores.Samples,
) -> None:
    conversation, message = filled_store.first
    app = app_pages.wide_map(conversation=conversation, message=message)
    app.button_group(key="map_kind").set_value("attention").run()
    app.selectbox(key="map_head").set_value("head 3").run()
    assert not app.exception
    assert "from the full tensors" in app.caption[-1].value
    conversation, message = filled_store.without_tensors
    app = app_pages.wide_map(conversation=conversation, message=message)
    app.button_group(key="map_kind").set_value("attention").run()
    assert app.selectbox(key="map_head").options == [attention.MEAN]
    assert "were not kept" in app.selectbox(key="map_head").help
