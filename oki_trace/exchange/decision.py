"""Why a token was chosen, in words: the same sentences in the terminal, the explorer and exports.

No library is needed for it, and no store: a step in, text out.
"""

from __future__ import annotations

from collections.abc import Callable

from oki_trace.records import Contender, Decision, Effect, Generation, Step

Quote = Callable[[str], str]

_TOP = "the model's most likely token"


def quoted(token: str) -> str:
    """A token between quotation marks, as it is."""
    return f"“{token}”"


def explain(step: Step, quote: Quote = quoted) -> str:
    """Why this token: one to three sentences. ``quote`` shows a token's text."""
    decision = step.decision
    if decision is None:
        known = step.rank == 1
        return f"Greedy: {_TOP}." if known else "How it was chosen is not recorded."
    if decision.candidates == 1:
        return "The settings left this token alone: there was nothing to choose from."
    if not decision.drawn:
        return _greedily(step, quote)
    return f"{_share(step, decision)}{_race(step, decision, quote)}. {_greedy(step, quote)}."


def explain_generation(generation: Generation) -> str:
    """What of the model's generation config was replaced; empty when nothing was."""
    if not generation.replaced:
        return ""
    how = "sampled" if generation.do_sample else "greedy"
    return f"{how} in place of {', '.join(generation.replaced)}"


def effects_table(step: Step) -> list[tuple[str, str, str, str]]:
    """(setting, tokens removed, the probability they had, the chosen token's after it).

    A row for the model itself, then one a setting that did something; empty
    when no setting was applied.
    """
    if step.decision is None or not step.decision.effects:
        return []
    rows = [("the model itself", "", "", _prob(step.prob))]
    before = step.prob
    for effect in step.decision.effects:
        if effect.removed or _differ(before, effect.chosen_prob):
            rows.append(_row(effect))
        before = effect.chosen_prob
    return rows


def _row(effect: Effect) -> tuple[str, str, str, str]:
    name = f"{effect.name} {effect.setting}".strip()
    gone = (f"{effect.removed:,}", _prob(effect.removed_mass)) if effect.removed else ("", "")
    return (name, *gone, _prob(effect.chosen_prob))


def _greedily(step: Step, quote: Quote) -> str:
    if step.rank == 1:
        return f"Greedy: {_TOP}, before and after the settings."
    first = f", {quote(step.topk.tokens[0])}" if step.topk.tokens else ""
    return (
        f"Greedy, after the settings: they took this token from {_prob(step.prob)}"
        f" (rank {step.rank:,}) to {_prob(step.sampled_prob)}, above the model's own first{first}."
    )


def _share(step: Step, decision: Decision) -> str:
    return f"Drawn: it had {_prob(step.sampled_prob)} among {decision.candidates:,} tokens"


def _race(step: Step, decision: Decision, quote: Quote) -> str:
    """What the draw did, against whom greedy decoding would have chosen, else the second."""
    rival = decision.greedy
    if not step.differs_from_greedy or rival.prob == 0:
        if decision.runner_up is None:
            return ""
        rival = decision.runner_up
    if decision.noise is None:
        return ""
    verb = "carried it above" if rival.prob > (step.sampled_prob or 0) else "kept it above"
    return f", and noise {_noise(decision.noise)} {verb} {_contender(rival, quote)}"


def _greedy(step: Step, quote: Quote) -> str:
    assert step.decision is not None
    if not step.differs_from_greedy:
        return "Greedy would have said the same"
    greedy = step.decision.greedy
    removed = ", which the settings removed" if greedy.prob == 0 else ""
    return f"Greedy would have said {quote(greedy.token)}{removed}"


def _contender(contender: Contender, quote: Quote) -> str:
    return f"{quote(contender.token)} ({_prob(contender.prob)}, noise {_noise(contender.noise)})"


def _differ(before: float, after: float) -> bool:
    return abs(before - after) > 1e-6 * max(before, after)


def _noise(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+z.2f}"


def _prob(value: float | None) -> str:
    """Three digits, also of what is small."""
    if value is None or value != value:
        return "–"
    return f"{value:z.3f}" if value >= 0.1 or value == 0 else f"{value:.3g}"
