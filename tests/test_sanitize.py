"""Text from a model is shown completely and has no effect on the display."""

from __future__ import annotations

import pytest

from oki_trace.sanitize import inert, visible


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("the", "the"),
        ("\n", "⏎"),
        ("a\t b", "a⇥␣b"),
        ("", "∅"),
        ("\u202eabc", "<U+202E>abc"),
        ("\x1b[31m", "␛[31m"),
        ("\x00", "␀"),
        ("\x9b", "<U+009B>"),
        ("\u200b", "<U+200B>"),
        ("\u00a0", "<U+00A0>"),
        ("\u2028", "<U+2028>"),
        ("\ud800", "<U+D800>"),
        ("<b>&amp;", "<b>&amp;"),
        ("é🙂字", "é🙂字"),
    ],
)
def test_a_token_alone_hides_nothing(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_running_text_keeps_its_spaces_and_line_ends() -> None:
    assert inert("a b\n\tc\u00a0d") == "a b\n\tc\u00a0d"
    assert inert("a\nb", keep="") == "a␊b"
    assert inert("\x1b[2J\u202e") == "␛[2J<U+202E>"
