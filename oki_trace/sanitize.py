"""Text that a model wrote, made safe to look at.

Spaces, line ends, control characters and direction marks are shown as symbols,
so that nothing hides, nothing moves what stands beside it, and no terminal is
told to do anything.
"""

from __future__ import annotations

import unicodedata

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# Controls, direction marks, lone surrogates, line and paragraph ends.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(token: str) -> str:
    """A token standing alone: every space is seen too, and an empty one is ``∅``."""
    return "".join(_MARKS.get(c) or _symbol(c, _UNSAFE | {"Zs"}) for c in token) or "∅"


def inert(text: str, keep: str = "\n\t") -> str:
    """Running ``text``: as it is but for what would act on where it is shown."""
    return "".join(c if c in keep else _symbol(c, _UNSAFE) for c in text)


def _symbol(character: str, unsafe: frozenset[str]) -> str:
    if unicodedata.category(character) not in unsafe:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"
