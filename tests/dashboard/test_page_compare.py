"""Two replies side by side without a browser."""

from __future__ import annotations

import pytest

from tests.dashboard import app_pages, sample_stores


def test_compare_on_an_empty_store_leads_to_the_chat(empty_store: str) -> None:
    app = app_pages.comparing()
    assert not app.exception
    assert "No replies yet. Start a chat" in app.markdown[-1].value
    assert not app_pages.comparing(1, 2).exception


def test_two_replies_are_compared(filled_store: sample_stores.Samples) -> None:
    left, right = filled_store.bare[1], filled_store.without_tensors[1]
    app = app_pages.comparing(left, right)
    assert not app.exception
    assert [box.value for box in app.selectbox] == [left, right]
    assert app.markdown[0].value.startswith("The replies diverge at step 0;")
    assert any("the lower bound that the kept" in caption.value for caption in app.caption)
    assert app_pages.shown(app, "compare-replies")["chosen"] == 0
    table = app_pages.shown(app, "settings")
    settings = {name: values for name, *values in table["rows"]}
    assert settings["model"][0] == "tiny/model"
    assert settings["temperature"][1] == "0.7"
    assert settings["seed"][1] == "3"
    differ = {table["rows"][number][0] for number in table["marked"]}
    assert differ == {name for name, (one, two) in settings.items() if one != two}
    app.selectbox(key="compare-right").set_value(left).run()
    assert not app.exception
    assert app.markdown[0].value == "Both replies have the same 3 tokens."
    assert app.query_params["right"] in (str(left), [str(left)])


def test_the_distance_is_exact_where_the_logits_were_kept(
    filled_store: sample_stores.Samples,
) -> None:
    app = app_pages.comparing(filled_store.first[1], filled_store.second[1])
    assert not app.exception
    assert any("Exact, from the full logits" in caption.value for caption in app.caption)


def test_two_steps_are_compared_and_one_that_is_alone(filled_store: sample_stores.Samples) -> None:
    app = app_pages.comparing(filled_store.first[1], filled_store.second[1], pair=0)
    one, two = (
        app_pages.shown(
            app_pages.chat(conversation=conversation, message=message, step=0), "facts"
        )["what"]
        for conversation, message in (filled_store.first, filled_store.second)
    )
    assert [row[1] for row in app_pages.shown(app, "compare-steps")["rows"]] == [one, two]
    assert app_pages.shown(app, "lens-left")["pins"] is False
    assert app_pages.shown(app, "bars-right")["rows"]
    last = len(app_pages.shown(app, "compare-replies")["sides"][1]["tokens"])
    alone = app_pages.comparing(filled_store.bare[1], filled_store.second[1], pair=last - 1)
    assert not alone.exception
    assert app_pages.shown(alone, "compare-steps")["rows"][0][1] == "–"
    assert any("left reply has no step here" in caption.value for caption in alone.caption)


@pytest.mark.parametrize("story", ["hostile", "long", "unknown", "failed"])
def test_any_two_replies_can_be_compared(filled_store: sample_stores.Samples, story: str) -> None:
    left, right = getattr(filled_store, story)[1], filled_store.hostile[1]
    app = app_pages.comparing(left, right)
    assert not app.exception
    sides = app_pages.shown(app, "compare-replies")["sides"]
    assert [side["message"] for side in sides] == [left, right]
    assert {row[0] for row in app_pages.shown(app, "compare-steps")["rows"]} == {"left", "right"}
    assert not app_pages.comparing(filled_store.failed_at_once[1], 10**9).exception
