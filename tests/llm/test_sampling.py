"""Every choice is that of generate(), and its record describes what happened."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TypicalLogitsWarper,
)

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.choice_analysis import analyze_choice
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.decoding.sampling import choose, describe_processor
from oki_trace.records import CapturePolicy, ChatMessage, Decision, Role, Sampling, Step
from oki_trace.tracing import Collector, trace_turn
from tests import tiny

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox jumps")]
TOKENS = 12


def trace(model: Any, sampling: Sampling) -> Collector:
    collector = Collector()
    made = instrument(model, tiny.tokenizer())
    policy = CapturePolicy(topk_logits=1000, tensors="exact")
    trace_turn(made, "tiny", MESSAGES, sampling, policy, [collector])
    return collector


def decision_of(step: Step) -> Decision:
    assert step.decision is not None
    return step.decision


# ---------------------------------------------------------------------- the draw


def distributions() -> list[torch.Tensor]:
    """Logits (1, vocab) from flat to peaked, of many sizes, whole and cut."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in (2, 17, 300, 5_000, 49_152):
        for scale in (0.0, 0.3, 1.0, 4.0, 20.0):
            logits = torch.randn(1, size, generator=generator) * scale
            made.append(logits)
            kept = logits.topk(min(size, 5)).values[:, -1:]
            made.append(logits.masked_fill(logits < kept, -math.inf))
    return made


def test_the_draw_is_that_of_multinomial_and_leaves_the_generator_where_it_would() -> None:
    for at, logits in enumerate(distributions()):
        mine, theirs = torch.Generator(), torch.Generator()
        for seed in range(40):
            mine.manual_seed(1000 * at + seed)
            theirs.manual_seed(1000 * at + seed)
            for _ in range(2):
                choice = choose([], torch.zeros(1, 1, dtype=torch.long), logits, mine)
                expected = torch.multinomial(logits.softmax(-1), 1, generator=theirs)
                assert torch.equal(choice.token, expected)
            assert torch.equal(mine.get_state(), theirs.get_state())


def test_the_winner_has_the_largest_log_prob_and_noise() -> None:
    vocabulary = Vocabulary(tiny.tokenizer())
    ids = torch.arange(300)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, 300, generator=generator) * 2
        choice = choose([TopKLogitsWarper(20)], torch.zeros(1, 1).long(), logits, generator)
        analysis = analyze_choice(choice, logits[0], ids, vocabulary)
        noise, decision = analysis.noise, analysis.decision
        assert noise is not None and decision is not None
        score = torch.tensor(analysis.sampled_probs).log() + torch.tensor(noise)
        first, second = score.topk(2).indices.tolist()
        assert first == int(choice.token)
        runner_up = decision.runner_up
        assert runner_up is not None and runner_up.token_id == second
        assert runner_up.noise == pytest.approx(float(noise[second]))
        assert decision.candidates == 20


def test_noise_is_gumbel() -> None:
    """Mean Euler's constant, variance pi^2 / 6: independent of the probabilities."""
    generator = torch.Generator().manual_seed(1)
    choice = choose([], torch.zeros(1, 1).long(), torch.randn(1, 200_000), generator)
    ids = torch.arange(200_000)
    noise = analyze_choice(choice, choice.scores, ids, Vocabulary(tiny.tokenizer())).noise
    assert noise is not None
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


# ------------------------------------------------------------------- the decision


def test_each_setting_says_what_it_removed_and_what_became_of_the_token() -> None:
    sampling = Sampling(TOKENS, 0.7, top_p=0.8, top_k=20, repetition_penalty=1.3, seed=3)
    collector = trace(tiny.model("llama"), sampling)
    assert collector.started is not None
    ids = list(collector.started.prompt.token_ids)
    differing = 0
    for step in collector.steps:
        decision = decision_of(step)
        names = [(effect.name, effect.setting) for effect in decision.effects]
        assert names == [
            ("repetition penalty", "1.3"),
            ("temperature", "0.7"),
            ("top-k", "20"),
            ("top-p", "0.8"),
        ]
        # By hand, from the model's own logits.
        logits = torch.tensor(next(t.array for t in step.tensors if t.name == "logits"))
        assert logits.dtype == torch.float32
        seen = torch.tensor(sorted(set(ids)))
        penal = logits.clone()
        penal[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.3, logits[seen] / 1.3)
        warm = penal / 0.7
        top = warm.topk(20)
        cut = torch.full_like(warm, -math.inf).scatter(0, top.indices, top.values)
        probs = cut.softmax(-1).sort(descending=True)
        nucleus = int((probs.values.cumsum(0) < 0.8).sum()) + 1
        final = torch.zeros_like(cut)
        kept = probs.indices[:nucleus]
        final[kept] = probs.values[:nucleus] / probs.values[:nucleus].sum()
        removed = [effect.removed for effect in decision.effects]
        assert removed == [0, 0, len(logits) - 20, 20 - nucleus]
        masses = [effect.removed_mass for effect in decision.effects]
        outside = 1 - float(warm.softmax(-1)[top.indices].sum())
        assert masses == pytest.approx(
            [0, 0, outside, float(probs.values[nucleus:].sum())], abs=1e-5
        )
        after = [float(row.softmax(-1)[step.token_id]) for row in (penal, warm, cut)]
        expected = [*after, float(final[step.token_id])]
        assert [e.chosen_prob for e in decision.effects] == pytest.approx(expected, abs=1e-5)
        assert step.sampled_prob == pytest.approx(expected[-1], abs=1e-5)
        assert decision.candidates == nucleus
        assert decision.greedy.token_id == int(penal.argmax())
        differing += step.differs_from_greedy
        ids.append(step.token_id)
    assert 0 < differing < TOKENS, "both kinds of step have to be there to be tested"


def test_the_noise_of_every_candidate_tells_who_wins() -> None:
    collector = trace(tiny.model("llama"), Sampling(TOKENS, 1.0, top_k=30, seed=9))
    for step in collector.steps:
        top, decision = step.topk, decision_of(step)
        assert top.noise is not None and top.sampled_probs is not None
        score = torch.tensor(top.sampled_probs).log() + torch.tensor(top.noise)
        order = torch.tensor(top.token_ids)[score.topk(2).indices].tolist()
        assert decision.runner_up is not None
        assert order == [step.token_id, decision.runner_up.token_id]
        at = top.token_ids.tolist().index(step.token_id)
        assert decision.noise == pytest.approx(float(top.noise[at]))
        own = top.token_ids.tolist().index(decision.greedy.token_id)
        assert decision.greedy.noise == pytest.approx(float(top.noise[own]))
        assert decision.greedy.prob == pytest.approx(float(top.sampled_probs[own]))


def test_plain_greedy_has_no_decision_and_penalised_greedy_has_no_draw() -> None:
    assert all(s.decision is None for s in trace(tiny.model("qwen2"), Sampling(TOKENS)).steps)
    penalised = trace(tiny.model("qwen2"), Sampling(TOKENS, repetition_penalty=1.8))
    for step in penalised.steps:
        decision = decision_of(step)
        assert (decision.drawn, decision.noise, decision.runner_up) == (False, None, None)
        assert decision.greedy.token_id == step.token_id and not step.differs_from_greedy
        assert step.topk.noise is None
    assert any(step.rank > 1 for step in penalised.steps)


def test_sampling_without_any_setting_is_a_draw_all_the_same() -> None:
    collector = trace(tiny.model("llama"), Sampling(TOKENS, 1.0, top_k=0, seed=2))
    for step in collector.steps:
        decision = decision_of(step)
        assert (decision.drawn, decision.effects) == (True, ())
        assert step.sampled_prob == pytest.approx(step.prob, rel=1e-5)


def test_what_greedy_would_have_said_does_not_go_through_the_warpers() -> None:
    """Typical sampling may remove the most likely token itself."""
    logits = torch.tensor([[6.0, *[3.0 + 0.01 * i for i in range(40)]]])
    generator = torch.Generator().manual_seed(0)
    warpers = [TemperatureLogitsWarper(1.1), TypicalLogitsWarper(0.3)]
    choice = choose(warpers, torch.zeros(1, 1).long(), logits, generator)
    ids = torch.arange(5)
    decision = analyze_choice(choice, logits[0], ids, Vocabulary(tiny.tokenizer())).decision
    assert decision is not None
    assert (decision.greedy.token_id, decision.greedy.prob) == (0, 0.0)


def test_a_processor_that_writes_on_its_scores_does_not_write_on_the_models_own() -> None:
    class InPlace(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 3] = -math.inf
            return scores

    logits = torch.randn(1, 10)
    before = logits.clone()
    choose(LogitsProcessorList([InPlace()]), torch.zeros(1, 1).long(), logits, None)
    assert torch.equal(logits, before)
    assert describe_processor(InPlace()) == ("in place", "")


def test_the_real_model_draws_as_generate_does(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    asked: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.1}
    for seed in (0, 1, 2):
        collector = Collector()
        trace_turn(
            instrument(model, tokenizer),
            "smollm2",
            [ChatMessage(Role.USER, "Tell me a story.")],
            Sampling(12, **asked, seed=seed),
            CapturePolicy(tensors="none"),
            [collector],
        )
        assert collector.started is not None
        ids = torch.tensor([collector.started.prompt.token_ids])
        torch.manual_seed(seed)
        expected = model.generate(ids, do_sample=True, max_new_tokens=12, **asked)
        assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()
        for step in collector.steps:
            decision = decision_of(step)
            assert step.sampled_prob and decision.noise is not None
            score = math.log(step.sampled_prob) + decision.noise
            for other in (decision.runner_up, decision.greedy):
                if other is not None and other.token_id != step.token_id:
                    assert other.noise is not None and other.prob > 0
                    assert score > math.log(other.prob) + other.noise


# ------------------------------------------------------- settings that leave nothing


class Nothing(LogitsProcessor):
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, self.value)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("sampled", [False, True])
def test_settings_that_leave_no_token_are_named(value: float, sampled: bool) -> None:
    generator = torch.Generator() if sampled else None
    processors = [TemperatureLogitsWarper(0.5), Nothing(value)]
    with pytest.raises(CaptureError, match="The sampling setting nothing left no token"):
        choose(processors, torch.zeros(1, 1).long(), torch.randn(1, 10), generator)


# ---------------------------------------------------- the model's generation config

CONFIGS: dict[str, dict[str, Any]] = {
    "temperature, top_p": {"temperature": 0.6, "top_p": 0.7},
    "top_k": {"top_k": 7},
    "top_h": {"top_h": 0.5},
    "min_p": {"min_p": 0.08},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.3},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(2, 120))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 290))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(40, 80)] + [[100, 101]]},
    "sequence_bias": {"sequence_bias": [[[5], 3.0], [[6, 7], -2.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 0},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(1, 60))},
    "min_length": {"min_length": 30, "eos_token_id": list(range(1, 60))},
    "length penalty": {"exponential_decay_length_penalty": (3, 2.0)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "guidance_scale": {"guidance_scale": 1.7},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 2.5}},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "outputs asked for": {"output_hidden_states": True, "return_dict_in_generate": True},
}


def configured(config: dict[str, Any]) -> Any:
    model = tiny.model("llama")
    for name, value in config.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_generation_config_means_what_it_means_in_generate(name: str, sampled: bool) -> None:
    config = CONFIGS[name]
    temperature = config.get("temperature", 1.2) if sampled else None
    collector = trace(configured(config), Sampling(TOKENS, temperature, seed=11))
    assert collector.started is not None
    ids = torch.tensor([collector.started.prompt.token_ids])
    fresh = configured(config)
    torch.manual_seed(11)
    asked = {"temperature": temperature} if sampled else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fresh.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=sampled,
            max_new_tokens=TOKENS,
            return_dict_in_generate=False,
            **asked,
        )
    assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()
    # And its trace is complete.
    assert len(collector.lenses) == len(collector.steps)
    for step, lens in zip(collector.steps, collector.lenses, strict=True):
        assert lens.chosen_prob[-1] == pytest.approx(step.prob, rel=1e-4)
        if step.decision is not None:
            for effect in step.decision.effects:
                assert all(map(math.isfinite, (effect.removed_mass, effect.chosen_prob)))
                assert effect.name == effect.name.lower()


def test_guidance_runs_the_model_once_more_and_the_trace_is_of_the_first_pass() -> None:
    model = configured({"guidance_scale": 1.7})
    collector = trace(model, Sampling(TOKENS))
    assert collector.started is not None
    ids = list(collector.started.prompt.token_ids)
    for step, lens in zip(collector.steps, collector.lenses, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        for layer in range(tiny.LAYERS):
            with torch.no_grad():
                row = tiny.final_norm_and_head(model)(output.hidden_states[layer][0, -1])
            expected = row.softmax(-1)[step.token_id]
            assert lens.chosen_prob[layer] == pytest.approx(float(expected), abs=1e-5)
        evidence = step.evidence
        assert evidence is not None and evidence.positions.max() < len(ids)
        ids.append(step.token_id)


def test_the_settings_in_force_are_recorded() -> None:
    config = {"min_p": 0.05, "no_repeat_ngram_size": 3, "suppress_tokens": [3, 4, 5, 6, 7]}
    model = configured(config)
    sampled = trace(model, Sampling(1, temperature=0.5)).started
    assert sampled is not None
    generation = sampled.generation
    # 50 is the default of generate().
    assert (generation.top_k, generation.top_p, generation.repetition_penalty) == (50, 1.0, 1.0)
    assert set(generation.others) == {
        "min_p 0.05",
        "no_repeat_ngram_size 3",
        "suppress_tokens (5 entries)",
    }
    greedy = trace(model, Sampling(1)).started
    assert greedy is not None
    assert (greedy.generation.top_k, greedy.generation.seed) == (None, None)
    assert not any(words.startswith("min_p") for words in greedy.generation.others)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_beams": 4}, "beam search"),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, "beam search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "beam search in groups"),
        ({"num_beams": 3, "num_return_sequences": 3}, "several replies at once"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "forced words"),
        ({"token_healing": True}, "token healing"),
    ],
)
def test_what_is_not_one_choice_a_step_is_replaced_and_said(
    config: dict[str, Any], words: str, sampled: bool
) -> None:
    kept = {name: value for name, value in config.items() if name == "top_k"}
    sampling = Sampling(TOKENS, temperature=0.8 if sampled else None, seed=4)
    plain = trace(configured(kept), sampling)
    replaced = trace(configured(config), sampling)
    assert [s.token_id for s in replaced.steps] == [s.token_id for s in plain.steps]
    assert plain.started is not None and plain.started.generation.replaced == ()
    assert replaced.started is not None
    expected = not (sampled and words == "contrastive search")
    assert (words in replaced.started.generation.replaced) is expected


def test_a_stop_string_of_the_config_stops() -> None:
    tokenizer = tiny.tokenizer()
    free = trace(tiny.model("llama"), Sampling(TOKENS))
    word = next(s for s in free.steps[3:] if s.token.isprintable() and s.token.strip())
    collector = trace(configured({"stop_strings": [word.token]}), Sampling(TOKENS))
    assert collector.started is not None and collector.ended is not None
    ids = torch.tensor([collector.started.prompt.token_ids])
    expected = tiny.model("llama").generate(
        ids,
        do_sample=False,
        max_new_tokens=TOKENS,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, [word.token])]),
    )
    assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()
    assert len(collector.steps) < TOKENS
    assert collector.ended.reason == "stop string"
