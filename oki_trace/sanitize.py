"""Makes text from a model safe to show.

Spaces, line ends, control characters and direction marks become symbols, so that no
text is hidden, none changes the order of the text around it, and none controls the terminal.
"""

from __future__ import annotations

import unicodedata

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# Controls, direction marks, lone surrogates, line and paragraph ends.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(token: str) -> str:
    """A single token: spaces become symbols too, and an empty token is ``∅``."""
    return "".join(_MARKS.get(c) or _symbol(c, _UNSAFE | {"Zs"}) for c in token) or "∅"


def inert(text: str, keep: str = "\n\t") -> str:
    """Running text: only characters that would act on the display become symbols."""
    return "".join(c if c in keep else _symbol(c, _UNSAFE) for c in text)


def _symbol(character: str, unsafe: frozenset[str]) -> str:
    if unicodedata.category(character) not in unsafe:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"
