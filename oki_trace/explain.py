"""Explains in words why a token was chosen, for the terminal, the explorer and exports.

Pure functions of records that need no library and no store.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from oki_trace.records import Contender, Decision, Generation, Part, Step

Quote = Callable[[str], str]

_TOP = "the model's most likely token"


def quoted(token: str) -> str:
    """A token between quotation marks, unchanged."""
    return f"“{token}”"


def explain(step: Step, quote: Quote = quoted) -> str:
    """Why the step's token was chosen, in one to three sentences.

    ``quote`` formats the text of a token.
    """
    decision = step.decision
    if step.origin == "given":
        return "Given: part of the text that the model read, not chosen by it."
    if step.origin == "forced":
        return "Forced: you chose this token. The probabilities are the model's own."
    if decision is None:
        unknown = "The trace does not record how this token was chosen."
        return f"Greedy: {_TOP}." if step.rank == 1 else unknown
    if decision.candidates == 1:
        return "The settings removed every other token."
    if not decision.drawn:
        return _explain_greedy(step, quote)
    return (
        f"Sampled with probability {_prob(step.sampled_prob)} from {decision.candidates:,} tokens"
        f"{_explain_noise(step, decision, quote)}. {_compare_greedy(step, decision, quote)}."
    )


def call_line(part: Part) -> str:
    """A tool call in one line: the tool's name and its arguments."""
    if part.name is None:
        return part.text
    arguments = part.arguments
    if isinstance(arguments, dict):
        pairs = (f"{name}={_json(value)}" for name, value in arguments.items())
        return f"{part.name}({', '.join(pairs)})"
    return f"{part.name}({'' if arguments is None else _json(arguments)})"


def explain_generation(generation: Generation) -> str:
    """Which settings of the model's generation config were replaced; "" when none were."""
    if not generation.replaced:
        return ""
    method = "sampled" if generation.do_sample else "greedy"
    return f"{method} in place of {', '.join(generation.replaced)}"


def effects_table(step: Step) -> list[tuple[str, str, str, str]]:
    """Rows of (setting, removed tokens, their probability, the chosen token's afterwards).

    The first row is the model itself; each further row is a setting that changed
    something. Empty when no setting was applied.
    """
    if step.decision is None or not step.decision.effects:
        return []
    rows = [("the model itself", "", "", _prob(step.prob))]
    before = step.prob
    for effect in step.decision.effects:
        after = effect.chosen_prob
        if effect.removed or abs(before - after) > 1e-6 * max(before, after):
            name = f"{effect.name} {effect.setting}".strip()
            removed = f"{effect.removed:,}" if effect.removed else ""
            mass = _prob(effect.removed_mass) if effect.removed else ""
            rows.append((name, removed, mass, _prob(after)))
        before = after
    return rows


def _explain_greedy(step: Step, quote: Quote) -> str:
    if step.rank == 1:
        return f"Greedy: {_TOP}, before and after the settings."
    first = f", {quote(step.topk.tokens[0])}" if step.topk.tokens else ""
    return (
        f"Greedy, after the settings: they changed its probability from {_prob(step.prob)}"
        f" (rank {step.rank:,}) to {_prob(step.sampled_prob)}, above {_TOP}{first}."
    )


def _explain_noise(step: Step, decision: Decision, quote: Quote) -> str:
    """The effect of the noise, compared with the greedy token or, if it is this, the runner-up."""
    rival: Contender | None = decision.greedy
    if not step.differs_from_greedy or decision.greedy.prob == 0:
        rival = decision.runner_up
    if rival is None or decision.noise is None:
        return ""
    verb = "raised it above" if rival.prob > (step.sampled_prob or 0) else "kept it above"
    other = f"{quote(rival.token)} ({_prob(rival.prob)}, noise {_noise(rival.noise)})"
    return f"; noise {_noise(decision.noise)} {verb} {other}"


def _compare_greedy(step: Step, decision: Decision, quote: Quote) -> str:
    if not step.differs_from_greedy:
        return "Greedy decoding would have chosen the same token"
    removed = ", which the settings removed" if decision.greedy.prob == 0 else ""
    return f"Greedy decoding would have chosen {quote(decision.greedy.token)}{removed}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _noise(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+z.2f}"


def _prob(value: float | None) -> str:
    """Three significant digits for small probabilities too."""
    if value is None or value != value:
        return "–"
    return f"{value:z.3f}" if value >= 0.1 or value == 0 else f"{value:.3g}"
