"""Installed lenses: an independent reference in plain torch, and the refusals of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from oki_trace.api import run_traced, score_traced
from oki_trace.errors import CaptureError, ModelError, UsageError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.lenses import library
from oki_trace.llm.lenses.files import read_lens
from oki_trace.llm.lenses.transport import unembedding_hash
from tests import tiny

WIDTH = 32


@pytest.fixture(autouse=True)
def _own_lenses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lenses are installed for this test alone."""
    folder = tmp_path / "lenses"
    monkeypatch.setattr(library, "lenses_dir", lambda: folder)


def jacobian_file(path: Path, width: int, layers: int, seed: int = 1, **more: Any) -> Path:
    """A random Jacobian lens of a model with so many blocks."""
    generator = torch.Generator().manual_seed(seed)
    maps = {
        layer: (torch.eye(width) + torch.randn(width, width, generator=generator) / width).half()
        for layer in range(layers - 1)
    }
    content = {"J": maps, "source_layers": [*maps], "n_prompts": 10, "d_model": width}
    torch.save(content | more, path)
    return path


def tuned_folder(
    folder: Path, width: int, layers: int, seed: int = 2, scale: float = 1.0, **config: Any
) -> Path:
    """A random Tuned Lens of a model with so many blocks; ``scale`` 0 maps nothing."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    settings = {
        "base_model_name_or_path": "tiny",
        "d_model": width,
        "num_hidden_layers": layers,
        "bias": True,
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    content = {}
    for layer in range(layers):
        weight = torch.randn(width, width, generator=generator) / width
        content[f"{layer}.weight"] = weight * scale
        content[f"{layer}.bias"] = torch.randn(width, generator=generator) * scale / 10
    torch.save(content, folder / "params.pt")
    return folder


def _mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _cohere() -> Any:
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            logit_scale=0.25,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _mamba() -> Any:
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=WIDTH,
            state_size=8,
            num_hidden_layers=3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    **{name: tiny.FAMILIES[name] for name in ("llama", "gemma2", "gpt2")},
    "cohere": _cohere,
    "mixtral": _mixtral,
    "mamba": _mamba,
}


def _built(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def _tail(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The family's own final norm, head and what comes after, written out by hand."""
    if isinstance(model, MambaForCausalLM):
        return lambda h: model.lm_head(model.backbone.norm_f(h))
    if isinstance(model, CohereForCausalLM):
        return lambda h: model.lm_head(model.model.norm(h)) * model.config.logit_scale
    return tiny.final_norm_and_head(model)


def _step(prediction: torch.Tensor, own: torch.Tensor, token: int, k: int) -> dict[str, Any]:
    """The numbers of a row from its logits and the model's own, both (vocab,)."""
    log_p, log_own = (x.double().log_softmax(-1) for x in (prediction, own))
    return {
        "logits": prediction.topk(k).values,
        "ids": prediction.topk(k).indices.tolist(),
        # Tokens closer to the chosen one than rounding may be above it or below.
        "ranks": [
            int((prediction > prediction[token] + change).sum()) + 1 for change in (1e-4, -1e-4)
        ],
        "prob": float(log_p[token].exp()),
        "entropy": float(-(log_p.exp() * log_p).sum()),
        "kl": float((log_own.exp() * (log_own - log_p)).sum()),
    }


def _run(model: Any, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The input of each block (positions, width), and the logits (positions, vocab)."""
    streams: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return streams, logits.float()


@torch.no_grad()
def _check_against_formulas(
    model: Any, tokenizer: Any, tail: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    jacobian = torch.load(jacobian_file(tmp_path / "a.pt", width, layers), weights_only=True)["J"]
    tuned_path = tuned_folder(tmp_path / "b", width, layers)
    tuned = torch.load(tuned_path / "params.pt", weights_only=True)
    library.add(str(tmp_path / "a.pt"), "jacobian")
    library.add(str(tuned_path), "tuned")
    names = ["tuned", "jacobian"]
    options: Any = {"model": model, "tokenizer": tokenizer, "lenses": names}
    _, trace = run_traced("hi there", max_new_tokens=3, trace_prompt="full", **options)
    ids = [*trace["prompt_token_ids"], *(step["chosen_id"] for step in trace["steps"])]
    streams, own_logits = _run(model, ids)
    steps = [*trace["prompt_steps"], *trace["steps"]]
    assert len(steps) == len(ids) - 1
    for position, step in enumerate(steps, start=1):
        own, token = own_logits[position - 1], ids[position]
        assert list(step["lenses"]) == sorted(names)
        for name, rows in step["lenses"].items():
            first = 1 if name == "jacobian" else 0
            assert [row["layer"] for row in rows] == list(range(first, layers + 1))
            for row in rows:
                layer = row["layer"]
                h = None if layer == layers else streams[layer][position - 1]
                if h is None:
                    logits = own
                elif name == "jacobian":
                    logits = tail(jacobian[layer - 1].float() @ h)
                else:
                    mapped = tuned[f"{layer}.weight"] @ h + tuned[f"{layer}.bias"]
                    logits = tail(h + mapped)
                wanted = _step(logits, own, token, len(row["topk"]))
                entries = row["topk"]
                torch.testing.assert_close(
                    torch.tensor([entry["logit"] for entry in entries]),
                    wanted["logits"].float(),
                    atol=1e-4,
                    rtol=1e-5,
                )
                assert [entry["token_id"] for entry in entries] == wanted["ids"]
                assert wanted["ranks"][0] <= row["chosen_rank"] <= wanted["ranks"][1]
                assert row["chosen_prob"] == pytest.approx(wanted["prob"], abs=1e-4)
                assert row["entropy"] == pytest.approx(wanted["entropy"], abs=1e-4)
                assert row["kl"] == pytest.approx(wanted["kl"], abs=1e-4, rel=1e-5)
        last = [rows[-1] for rows in (*step["lenses"].values(), step["logit_lens"])]
        assert last[0] == last[1] == last[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_agrees_with_the_formulas(family: str, tmp_path: Path) -> None:
    model = _built(family)
    _check_against_formulas(model, tiny.tokenizer(), _tail(model), tmp_path)


def test_every_number_agrees_with_the_formulas_on_smollm2(
    smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    tail = lambda h: model.lm_head(model.model.norm(h))  # noqa: E731
    _check_against_formulas(model, tokenizer, tail, tmp_path)


def _identity(path: Path, width: int, layers: int) -> Path:
    maps = {layer: torch.eye(width).half() for layer in range(layers - 1)}
    content = {"J": maps, "source_layers": [*maps], "n_prompts": 1, "d_model": width}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_maps_are_the_logit_lens_bit_for_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = _built(family).to(dtype)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    library.add(str(_identity(tmp_path / "a.pt", width, layers)), "jacobian")
    library.add(str(tuned_folder(tmp_path / "b", width, layers, scale=0.0)), "tuned")
    _, trace = run_traced(
        "hi there",
        max_new_tokens=3,
        model=model,
        tokenizer=tiny.tokenizer(),
        lenses=["jacobian", "tuned"],
        trace_prompt="full",
    )
    for step in (*trace["prompt_steps"], *trace["steps"]):
        assert step["lenses"]["tuned"] == step["logit_lens"]
        assert step["lenses"]["jacobian"] == step["logit_lens"][1:]


def test_a_score_is_read_too(tmp_path: Path) -> None:
    library.add(str(jacobian_file(tmp_path / "a.pt", WIDTH, 3)), "jacobian")
    made = tiny.model("llama"), tiny.tokenizer()
    trace = score_traced("the lazy dog", model=made[0], tokenizer=made[1], lenses=["jacobian"])
    assert all(
        [row["layer"] for row in step["lenses"]["jacobian"]] == [1, 2, 3]
        for step in trace["prompt_steps"]
    )


def test_a_lens_of_some_layers_has_rows_for_those_and_the_last(tmp_path: Path) -> None:
    maps = {1: torch.eye(WIDTH).half()}
    content = {"J": maps, "source_layers": [1], "n_prompts": 1, "d_model": WIDTH}
    torch.save(content, tmp_path / "a.pt")
    library.add(str(tmp_path / "a.pt"), "one")
    made = tiny.model("llama"), tiny.tokenizer()
    _, trace = run_traced("hi", max_new_tokens=1, model=made[0], tokenizer=made[1], lenses=["one"])
    (step,) = trace["steps"]
    assert [row["layer"] for row in step["lenses"]["one"]] == [2, 3]


@pytest.mark.parametrize(
    ("width", "layers", "reason"),
    [(16, 3, "the model's width is 32"), (32, 5, "the model has 3 layers")],
)
def test_a_lens_of_another_model_says_what_it_was_fitted_on(
    width: int, layers: int, reason: str, tmp_path: Path
) -> None:
    path = jacobian_file(tmp_path / "Other-1B_jacobian_lens.pt", width, layers)
    library.add(str(path), "other")
    made = tiny.model("llama"), tiny.tokenizer()
    with pytest.raises(CaptureError) as caught:
        run_traced("hi", max_new_tokens=1, model=made[0], tokenizer=made[1], lenses=["other"])
    assert str(caught.value) == (
        f"The lens other does not fit this model: {reason}. It was fitted on Other-1B "
        f"(width {width}, {layers} layers)."
    )


def test_a_lens_of_another_head_is_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    own, other = (unembedding_hash(m.lm_head.weight) for m in (model, tiny.model("llama", 1)))
    for name, hashed in (("own", own), ("other", other)):
        library.add(str(tuned_folder(tmp_path / name, WIDTH, 3, unembed_hash=hashed)))
    handle = instrument(model, tiny.tokenizer())
    for name, fits in (("own", True), ("other", False)):
        transport = library.load_transport(name)
        if fits:
            transport.require_fit(model, handle.structure.layers)
        else:
            with pytest.raises(CaptureError, match="the model's head has other weights"):
                transport.require_fit(model, handle.structure.layers)
    with pytest.raises(CaptureError, match="the model has several residual streams"):
        library.load_transport("own").require_fit(model, 3, streams=2)


def test_a_lens_that_is_not_installed_is_refused_before_the_model_runs() -> None:
    with pytest.raises(UsageError, match=r"No lens none is installed .*\(installed: none\)"):
        run_traced("hi", lenses=["none"])
    with pytest.raises(UsageError, match="not one text"):
        run_traced("hi", lenses="none")


def test_very_large_numbers_do_not_overflow(tmp_path: Path) -> None:
    """The residual stream of some models exceeds the largest number of float16."""
    path = jacobian_file(tmp_path / "a.pt", WIDTH, 3)
    library.add(str(path), "a")
    streams = torch.full((1, 2, WIDTH), 6e4)
    mapped = library.load_transport("a")(streams, [1, 2])
    maps = torch.load(path, weights_only=True)["J"]
    expected = torch.stack([maps[layer].float() @ streams[0, layer] for layer in (0, 1)])
    torch.testing.assert_close(mapped[0], expected)
    assert np.isfinite(mapped.numpy()).all()


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    lens = read_lens(jacobian_file(tmp_path / "Qwen_jacobian_lens.pt", 8, 4))
    assert (lens.kind, sorted(lens.weights), lens.biases) == ("jacobian", [1, 2, 3], {})
    assert (lens.fitted.model, lens.fitted.layers, lens.fitted.prompts) == ("Qwen", 4, 10)
    lens = read_lens(tuned_folder(tmp_path / "tuned", 8, 4))
    assert (lens.kind, sorted(lens.weights), sorted(lens.biases)) == (
        "tuned",
        [*range(4)],
    ) * 1 + ([*range(4)],)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no lens at"):
        read_lens(tmp_path / "none.pt")
