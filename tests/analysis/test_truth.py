"""Every built-in question against plain NumPy on the full tensors of real replies.

``Facts`` works a step out from its logits, hidden states and attention alone:
the lens through the model's own norm and head, the probabilities, the entropies,
the weights by what they look at. The questions never see these.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from oki_trace.analysis import questions
from oki_trace.analysis.arrow_tables import token_class
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.scope import Scope
from oki_trace.records import Role
from oki_trace.store.reading.reader import TraceReader
from tests import tiny

# The lens is computed eight steps at a time in another precision; entries are 32-bit.
CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-4}
KEPT = 10  # attended positions kept of each layer


@dataclass(frozen=True)
class Facts:
    """One step, from its tensors: ``lens`` is (layers + 1, vocab), probabilities."""

    message: int
    conversation: int
    index: int
    token_id: int
    token: str
    is_special: bool
    before: str
    lens: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray

    @property
    def probs(self) -> np.ndarray:
        return self.lens[-1]

    @property
    def prob(self) -> float:
        return float(self.probs[self.token_id])

    @property
    def entropies(self) -> np.ndarray:
        return -(self.lens * np.log(np.maximum(self.lens, 1e-300))).sum(axis=1)

    @property
    def ranks(self) -> np.ndarray:
        return 1 + (self.lens > self.lens[:, [self.token_id]]).sum(axis=1)

    @property
    def kls(self) -> np.ndarray:
        logs = np.log(np.maximum(self.lens, 1e-300))
        return (self.probs * (logs[-1] - logs)).sum(axis=1)

    @property
    def settled(self) -> int | None:
        behind = [layer for layer, rank in enumerate(self.ranks) if rank > 1]
        first = behind[-1] + 1 if behind else 0
        return first if first < len(self.ranks) else None

    def on(self, kind: str) -> np.ndarray:
        """What each layer's kept weights give to this kind of position: (layers,)."""
        found = []
        for row in self.weights.mean(axis=1):
            kept = np.argsort(-row)[:KEPT]
            found.append(row[kept][self.kinds[kept] == kind].sum())
        return np.array(found)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def facts(traced: str, smollm2: tuple[Any, Any]) -> list[Facts]:
    model, _ = smollm2
    unembed = tiny.final_norm_and_head(model)
    found = []
    with TraceReader(traced) as reader:
        for conversation in sorted(c.id for c in reader.conversations()):
            for message in reader.messages(conversation):
                if message.role is not Role.ASSISTANT:
                    continue
                prompt = reader.prompt(message.id)
                before = ""
                for step in reader.steps(message.id):
                    at = (message.id, step.step_index)
                    hidden = torch.from_numpy(reader.tensor(*at, "hidden_states").array.copy())
                    with torch.no_grad():
                        lens = softmax(unembed(hidden).numpy())
                    lens[-1] = softmax(reader.tensor(*at, "logits").array)
                    kinds = [*prompt.segments, *["reply"] * (step.position - len(prompt))]
                    kinds[0] = "first_token"
                    found.append(
                        Facts(
                            message.id,
                            conversation,
                            step.step_index,
                            step.token_id,
                            step.token,
                            step.is_special,
                            before,
                            lens,
                            reader.tensor(*at, "attentions").array,
                            np.array(kinds),
                        )
                    )
                    before = step.token
    return found


def ask(
    session: QuerySession, name: str, view: str | None = None, **given: Any
) -> list[dict[str, Any]]:
    """The rows of an answer; its SQL, which stands alone, gives the same ones."""
    answer = questions.answer(session, name, view=view, **given)
    again = session.sql(answer.sql)
    assert len(again.rows) == len(answer.rows)
    assert again.columns == tuple(column.name for column in answer.columns)
    names = [column.name for column in answer.columns]
    return [dict(zip(names, row, strict=True)) for row in answer.rows]


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), **CLOSE)


def test_settle_by_layer(session: QuerySession, facts: list[Facts]) -> None:
    rows = ask(session, "settle")
    counts = Counter(f.settled for f in facts)
    assert {row["layer"]: row["steps"] for row in rows} == counts
    for row in rows:
        those = [f for f in facts if f.settled == row["layer"]]
        same(row["share"], len(those) / len(facts))
        if row["layer"] is None:
            assert row["prob_at_layer"] is None
            continue
        same(row["prob_at_layer"], mean(f.lens[f.settled, f.token_id] for f in those))
        same(
            row["cumulative_share"],
            sum(n for layer, n in counts.items() if layer is not None and layer <= row["layer"])
            / len(facts),
        )


@pytest.mark.parametrize("view", ["model", "position", "class"])
def test_settle_by_kind(session: QuerySession, facts: list[Facts], view: str) -> None:
    def kind(f: Facts) -> Any:
        if view == "class":
            return token_class(f.token, is_special=f.is_special, before=f.before)
        bucket = f.index if f.index < 2 else 2 ** int(np.log2(f.index))
        return bucket if view == "position" else facts_model(session)

    groups = defaultdict(list)
    for f in facts:
        groups[kind(f)].append(f)
    rows = ask(session, "settle", view)
    key = {"model": "model", "position": "from_step", "class": "class"}[view]
    assert {row[key]: row["steps"] for row in rows} == {k: len(v) for k, v in groups.items()}
    for row in rows:
        those = groups[row[key]]
        stay = [f for f in those if f.settled is not None]
        same(row["settled"], len(stay) / len(those))
        same(row["prob"], mean(f.prob for f in those))
        if stay:
            same(row["depth"], mean(f.settled / (len(f.lens) - 1) for f in stay))
            same(row["layer"], mean(f.settled for f in stay))
            same(row["in_last_layer"], mean(f.settled == len(f.lens) - 1 for f in stay))
            same(row["prob_at_layer"], mean(f.lens[f.settled, f.token_id] for f in stay))


def facts_model(session: QuerySession) -> str:
    (name,) = session.ask("SELECT DISTINCT model_id FROM message WHERE role = 'assistant'").rows[0]
    return str(name)


def test_layers(session: QuerySession, facts: list[Facts]) -> None:
    rows = ask(session, "layers")
    assert [row["layer"] for row in rows] == list(range(31))
    assert {row["steps"] for row in rows} == {len(facts)}
    same([row["agreement"] for row in rows], np.mean([f.ranks == 1 for f in facts], axis=0))
    same(
        [row["chosen_prob"] for row in rows],
        np.mean([f.lens[:, f.token_id] for f in facts], axis=0),
    )
    same([row["entropy"] for row in rows], np.mean([f.entropies for f in facts], axis=0))
    same([row["kl"] for row in rows], np.mean([f.kls for f in facts], axis=0))


def test_rivals(session: QuerySession, facts: list[Facts]) -> None:
    least = 0.3
    rows = ask(session, "rivals", "step", least=least, top=1000)
    expected = {}
    for f in facts:
        tops = f.lens.max(axis=1)
        held = [layer for layer in range(2, 31) if tops[layer] >= least and f.ranks[layer] > 1]
        if held:
            best = max(held, key=lambda layer: tops[layer])
            expected[f.message, f.index] = (best, tops[best], len(held), int(f.lens[best].argmax()))
    assert expected
    found = {(row["message"], row["step"]): row for row in rows}
    assert found.keys() == expected.keys()
    for key, (layer, prob, layers, _) in expected.items():
        assert (found[key]["layer"], found[key]["layers"]) == (layer, layers)
        same(found[key]["rival_prob"], prob)
    shares = ask(session, "rivals", "layer", least=least)
    for row in shares:
        at = row["layer"]
        same(row["share"], mean(f.ranks[at] > 1 and f.lens[at].max() >= least for f in facts))


@pytest.mark.parametrize("view", ["entropy", "margin"])
def test_unsure(session: QuerySession, facts: list[Facts], view: str) -> None:
    def margin(f: Facts) -> float:
        first, second = np.sort(f.probs)[-2:][::-1]
        return float(first - second)

    by = {
        "entropy": lambda f: -float(f.entropies[-1]),
        "margin": margin,
    }[view]
    ordered = sorted(facts, key=by)[:8]
    rows = ask(session, "uncertainty", view, top=8)
    assert [(row["message"], row["step"]) for row in rows] == [
        (f.message, f.index) for f in ordered
    ]
    for row, f in zip(rows, ordered, strict=True):
        assert row["chosen"] == f.token
        same(row["prob"], f.prob)
        same(row["entropy"], f.entropies[-1])
        same(row["margin"], margin(f))
        others = [i for i in np.argsort(-f.probs)[:5] if i != f.token_id][:3]
        same(row["alternative_probs"], f.probs[others])


def test_unsure_replies(session: QuerySession, facts: list[Facts]) -> None:
    replies = defaultdict(list)
    for f in facts:
        replies[f.message].append(f)
    worst = {m: max(fs, key=lambda f: f.entropies[-1]) for m, fs in replies.items()}
    rows = ask(session, "uncertainty", "reply")
    expected = sorted(replies, key=lambda m: -worst[m].entropies[-1])
    assert [row["message"] for row in rows] == expected
    for row in rows:
        those, least_certain = replies[row["message"]], worst[row["message"]]
        assert (row["steps"], row["step"]) == (len(those), least_certain.index)
        same(row["max_entropy"], least_certain.entropies[-1])
        same(row["surprisal"], mean(-np.log(f.prob) for f in those))
        same(row["entropy"], mean(f.entropies[-1] for f in those))


def test_unsure_tokens(session: QuerySession, facts: list[Facts]) -> None:
    least = 0.05
    nearly = Counter()
    total: dict[int, float] = defaultdict(float)
    for f in facts:
        other = next(int(i) for i in np.argsort(-f.probs) if i != f.token_id)
        if f.probs[other] >= least:
            nearly[other] += 1
            total[other] += f.probs[other]
    rows = ask(session, "uncertainty", "token", least=least, top=100)
    assert sorted(row["steps"] for row in rows) == sorted(nearly.values())
    same(sum(row["prob"] * row["steps"] for row in rows), sum(total.values()))


SHARES = ("first_token", "system", "user", "assistant", "template", "reply")


def test_looked(session: QuerySession, facts: list[Facts]) -> None:
    rows = ask(session, "attention")
    assert [row["layer"] for row in rows] == list(range(1, 31))
    for share in SHARES:
        same([row[share] for row in rows], np.mean([f.on(share) for f in facts], axis=0))
    for row in rows:
        same(sum(row[share] for share in SHARES) + row["rest"] + row["missing"], 1.0)
    buckets = defaultdict(list)
    for f in facts:
        buckets[f.index if f.index < 2 else 2 ** int(np.log2(f.index))].append(f)
    for view, layers in (("step", slice(None)), ("evidence", slice(-1, None))):
        rows = ask(session, "attention", view)
        assert {r["from_step"]: r["steps"] for r in rows} == {k: len(v) for k, v in buckets.items()}
        for row in rows:
            for share in SHARES:
                same(
                    row[share], mean(f.on(share)[layers].mean() for f in buckets[row["from_step"]])
                )
    for row in ask(session, "attention", "grid"):
        those = buckets[row["from_step"]]
        same(row["reply"], mean(f.on("reply")[row["layer"] - 1] for f in those))


def test_heads(session: QuerySession, facts: list[Facts]) -> None:
    answer = questions.answer(session, "heads", sample=1000, top=1000)
    assert len(ask(session, "heads", sample=1000, top=1000)) == len(answer.rows)
    names = [column.name for column in answer.columns]
    assert f"{len(facts)} of {len(facts)} steps" in answer.about
    kinds = []
    for f in facts:
        here = f.kinds.astype("<U12")
        here[here == "first_token"] = "first token"
        here[-1] = "itself"
        here[-2] = "token before"
        kinds.append(here)
    things = (
        "first token",
        "itself",
        "token before",
        "system",
        "user",
        "assistant",
        "template",
        "reply",
    )
    given = np.array(
        [
            [f.weights[..., k == thing].sum(axis=-1) for thing in things]
            for f, k in zip(facts, kinds, strict=True)
        ]
    ).mean(axis=0)
    most = given.argmax(axis=0)
    assert len(answer.rows) == int((most != 0).sum())
    for values in answer.rows:
        row = dict(zip(names, values, strict=True))
        at = (row["layer"] - 1, row["head"])
        assert things[most[at]] == row["looks_at"]
        same(row["share"], given[(most[at], *at)])
        same(row["first_token"], given[(0, *at)])
        same(row["focus"], mean(f.weights[at].max() for f in facts))


def test_compare_steps(session: QuerySession, facts: list[Facts]) -> None:
    a, b = facts[6], facts[-1]
    what = f"{a.message}:{a.index}", f"{b.message}:{b.index}"
    answer = questions.answer(session, "compare", what)
    assert len(ask(session, "compare", subjects=what)) == len(answer.rows)
    p, q = a.probs, b.probs
    m = (p + q) / 2
    kl = float((p * np.log(p / q)).sum())
    js = float((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2
    assert f"KL {kl:.4f} nats" in answer.about and "from full logits" in answer.about
    assert f"JS {js:.4f} nats, TV {np.abs(p - q).sum() / 2:.4f}" in answer.about
    listed = {int(i) for i in np.argsort(-p)[:10]}, {int(i) for i in np.argsort(-q)[:10]}
    where = Counter(answer.column("listed_in"))
    assert where["both"] == len(listed[0] & listed[1])
    assert where["first"] == where["second"] == len(listed[0] - listed[1])
    for _, prob, other, rank, other_rank, rank_gain, _ in answer.rows:
        assert prob == pytest.approx(np.sort(p)[-rank]) and other == pytest.approx(
            np.sort(q)[-other_rank]
        )
        assert rank_gain == rank - other_rank


def test_compare_replies(session: QuerySession, facts: list[Facts]) -> None:
    greedy, drawn = sorted({f.message for f in facts})[1:3]
    one = [f for f in facts if f.message == greedy]
    two = [f for f in facts if f.message == drawn]
    answer = questions.answer(session, "compare", (str(greedy), str(drawn)))
    alike = next(
        i for i, (f, g) in enumerate(zip(one, two, strict=False)) if f.token_id != g.token_id
    )
    assert answer.about.startswith(f"The first {alike} tokens are the same.")
    assert answer.column("same_before").count("yes") == alike + 1
    rows = ask(session, "compare", subjects=(str(greedy), str(drawn)))
    assert len(rows) == min(len(one), len(two))
    for row, f, g in zip(rows, one, two, strict=False):
        assert row["basis"] == "full logits"
        same(row["tv"], np.abs(f.probs - g.probs).sum() / 2)
        same(row["kl"], (f.probs * np.log(f.probs / g.probs)).sum())
        same(row["kl_reverse"], (g.probs * np.log(g.probs / f.probs)).sum())
        assert row["top_rank"] == 1 + (g.probs > g.probs[f.probs.argmax()]).sum()
        assert row["shared"] == len(set(np.argsort(-f.probs)[:10]) & set(np.argsort(-g.probs)[:10]))
        if row["step"] <= alike:
            # The same model after the same words.
            assert row["tv"] == pytest.approx(0.0, abs=1e-5)


def test_again(session: QuerySession, facts: list[Facts]) -> None:
    replies = defaultdict(list)
    for f in facts:
        replies[f.message].append(f)
    three = sorted(replies)[1:]
    (row,) = ask(session, "reproducibility")
    assert (row["prompt"], row["replies"], row["seeds"]) == ("What is the capital of France?", 3, 2)
    assert (row["models"], row["temperatures"]) == (1, 2)
    ids = [[f.token_id for f in replies[m]] for m in three]
    alike = next(i for i in range(99) if len({tuple(x[: i + 1]) for x in ids}) > 1)
    assert row["common_prefix"] == alike
    same(row["tokens"], mean(map(len, ids)))
    same(row["tokens_spread"], float(np.std([len(x) for x in ids])))
    surprisals = [mean(-np.log(f.prob) for f in replies[m]) for m in three]
    same(row["surprisal"], mean(surprisals))
    same(row["surprisal_spread"], float(np.std(surprisals)))
    greedy, drawn = ask(session, "reproducibility", "setting")
    assert (greedy["temperature"], drawn["temperature"]) == (0.0, pytest.approx(1.2))
    same(greedy["surprisal"], surprisals[0])
    same(
        [drawn["surprisal"], drawn["surprisal_spread"]],
        [mean(surprisals[1:]), np.std(surprisals[1:])],
    )
    assert drawn["replies"] == 2
    each = ask(session, "reproducibility", "reply")
    assert [r["message"] for r in each] == three and [r["seed"] for r in each] == [None, 1, 2]


def test_scope_narrows_every_question(session: QuerySession, facts: list[Facts]) -> None:
    first = facts[0]
    scope = Scope(conversation=first.conversation)
    mine = [f for f in facts if f.conversation == first.conversation]
    (row,) = ask(session, "settle", "model", scope=scope)
    assert row["steps"] == len(mine)
    assert {r["steps"] for r in ask(session, "layers", scope=scope)} == {len(mine)}
    assert {r["steps"] for r in ask(session, "attention", scope=scope)} == {len(mine)}
    assert {r["message"] for r in ask(session, "uncertainty", scope=scope)} == {first.message}
