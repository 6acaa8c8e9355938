"""The undocumented interfaces this project uses: what a new version of a library has broken.

Each failure names the library with its version, the name, and how it has changed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.hooks
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import chat_template_utils

from oki_trace.llm import accelerate_internals, tokenizers_internals, torch_internals
from oki_trace.llm.capture.instrument import instrument
from oki_trace.records import CapturePolicy
from tests import tiny

LLM = Path(__file__).resolve().parents[2] / "oki_trace" / "llm"
ADAPTERS = {path.name for path in LLM.glob("*_internals.py")}
Problem = str | None


def called(owner: Any, name: str, *args: Any, **kwargs: Any) -> Problem:
    """What is wrong with a function that is called like this."""
    function = getattr(owner, name, None)
    if function is None:
        return "is gone"
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return f"takes {inspect.signature(function)}: {error}"
    return None


def has(owner: Any, *names: str) -> Problem:
    gone = [name for name in names if not hasattr(owner, name)]
    return f"has no {', '.join(gone)}" if gone else None


def equals(value: Any, expected: Any) -> Problem:
    return None if value == expected else f"is {value!r} instead of {expected!r}"


def hooked() -> nn.Module:
    module = nn.Linear(1, 1)
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    accelerate.hooks.add_hook_to_module(module, hook)
    return module


def traced() -> Problem:
    def branching(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x

    graph, branches = torch_internals.traced(branching, (torch.ones(2),))
    if not torch.equal(graph(torch.ones(2)), torch.full((2,), 2.0)):
        return "gives other numbers"
    return None if [Path(b.filename).name for b in branches] == [Path(__file__).name] else "is mute"


def prepacked() -> Problem:
    weight, x = torch.eye(64, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bfloat16)
    product = torch_internals.prepacked_linear(x, torch_internals.prepacked(weight), None)
    return None if torch.equal(product, x) else "gives other numbers"


def fast_tokenizer() -> Any:
    backend = Tokenizer(BPE())
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return SimpleNamespace(backend_tokenizer=backend)


BATCH: Any = torch.zeros(1, 1, 1, 1)
LAYER = DynamicLayer()
MODULE = nn.Linear(1, 1)
CHECKS: dict[str, dict[str, Callable[[], Problem]]] = {
    "transformers": {
        "GenerationMixin._prefill": lambda: called(
            GenerationMixin, "_prefill", None, BATCH, GenerationConfig(), {}
        ),
        "GenerationMixin._update_model_kwargs_for_generation": lambda: called(
            GenerationMixin, "_update_model_kwargs_for_generation", None, {}, {}, num_new_tokens=1
        ),
        "GenerationMixin._optimize_model_for_decode": lambda: called(
            GenerationMixin, "_optimize_model_for_decode", None
        ),
        "GenerationMixin.prepare_inputs_for_generation": lambda: called(
            GenerationMixin, "prepare_inputs_for_generation", None, BATCH, next_sequence_length=1
        ),
        "GenerationConfig._get_default_generation_params": lambda: called(
            GenerationConfig(), "_get_default_generation_params"
        ),
        "DynamicLayer.update": lambda: called(LAYER, "update", BATCH, BATCH),
        "DynamicLayer.lazy_initialization": lambda: called(
            LAYER, "lazy_initialization", BATCH, BATCH
        ),
        "DynamicLayer.get_seq_length": lambda: called(LAYER, "get_seq_length"),
        "DynamicLayer.get_mask_sizes": lambda: called(LAYER, "get_mask_sizes", 1),
        "DynamicLayer.crop": lambda: called(LAYER, "crop", -1),
        "DynamicSlidingWindowLayer": lambda: has(
            DynamicSlidingWindowLayer(sliding_window=4), "sliding_window", "get_seq_length"
        ),
        "DynamicLayer": lambda: has(LAYER, "is_initialized", "keys", "values"),
        "DynamicCache": lambda: has(DynamicCache(), "layers", "offloading"),
        "PreTrainedConfig": lambda: has(
            LlamaConfig(), "_attn_implementation", "_attn_implementation_internal", "_name_or_path"
        ),
        "render_jinja_template": lambda: called(
            chat_template_utils, "render_jinja_template", [[]], chat_template="", tools=[]
        ),
        "modeling_gguf_pytorch_utils": lambda: has(modeling_gguf_pytorch_utils, "tqdm"),
    },
    "torch": {
        "nn.Module": lambda: has(
            MODULE,
            *("_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_buffers"),
            "_compiled_call_impl",
        ),
        "Tensor._version": lambda: equals(torch_internals.version_of(torch.zeros(1).add_(1)), 1),
        "mkldnn._reorder_linear_weight, mkldnn._linear_pointwise": prepacked,
        "_create_graph_by_tracing, _create_function_from_graph": traced,
        "jit.optimized_execution": lambda: has(torch.jit, "optimized_execution"),
        "compile(module)": lambda: has(torch.compile(MODULE), "_orig_mod"),
        "compile(function)": lambda: has(
            torch.compile(MODULE.forward), "_torchdynamo_orig_callable"
        ),
    },
    "tokenizers": {
        "Decoder.__getstate__": lambda: equals(
            tokenizers_internals.decoder_types(fast_tokenizer()),
            {"Sequence", "ByteFallback", "Metaspace"},
        ),
    },
    "accelerate": {
        "_hf_hook": lambda: equals(accelerate_internals.has_hook(hooked()), True),
        "AlignDevicesHook.execution_device": lambda: equals(
            accelerate_internals.execution_device(hooked()), torch.device("cpu")
        ),
    },
}


def broken(library: str) -> list[str]:
    """What the installed version of ``library`` has removed or changed, a sentence each."""
    found = ((name, check()) for name, check in CHECKS[library].items())
    return [f"{library} {version(library)}: {name} {what}" for name, what in found if what]


# torch.compile imports what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("library", CHECKS)
def test_everything_undocumented_that_is_used_exists(library: str) -> None:
    assert broken(library) == []


def test_a_name_that_is_gone_and_a_signature_that_changed_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(GenerationMixin, "_prefill")
    monkeypatch.setattr(DynamicLayer, "update", lambda self, key_states: None)
    found = broken("transformers")
    assert len(found) == 2
    prefix = f"transformers {version('transformers')}: "
    assert found[0] == f"{prefix}GenerationMixin._prefill is gone"
    assert found[1].startswith(f"{prefix}DynamicLayer.update takes (key_states)")


# ---------------------------------------------------------------- one module per library


def foreign_private_names(path: Path) -> Iterator[str]:
    """Private attributes of others' objects, and internal modules, that a module uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _of_self(n)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and _name(n.target)}
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and _name(node.func) in {"getattr", "hasattr", "setattr"}:
            name = getattr(node.args[1], "value", "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            # The logging of transformers.utils is documented.
            yield from {str(node.module)} - {"transformers.utils"}
        if re.match("_[a-z]", name) and name not in own:
            yield name


def _of_self(node: ast.Attribute) -> bool:
    return _name(node.value) in {"self", "cls"}


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


# Attributes of PEFT's adapters, which are read if they exist, and documented ones.
ALLOWED = {"_disable_adapters", "_active_adapter", "_asdict", "_replace"}


def test_only_the_adapter_modules_use_private_names_of_libraries() -> None:
    found = {
        f"{path.relative_to(LLM)}: {name}"
        for path in LLM.rglob("*.py")
        if path.name not in ADAPTERS
        for name in foreign_private_names(path)
        if name not in ALLOWED
    }
    assert found == set()
    assert len(ADAPTERS) == len(CHECKS)


def test_the_libraries_whose_private_names_are_used_have_an_upper_bound() -> None:
    project = (LLM.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for library in ("transformers", "torch", "streamlit"):
        bounds = re.search(rf'"{library}>=[\d.]+,<(\d+)\.(\d+)"', project)
        assert bounds is not None, f"{library} has no upper bound"
        installed = tuple(int(part) for part in version(library).split("+")[0].split(".")[:2])
        assert installed < (int(bounds[1]), int(bounds[2]))


# ---------------------------------------------------------------- TorchScript


def test_without_torchscript_the_graph_is_off_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch has deprecated TorchScript, and does not support it on Python 3.14."""
    monkeypatch.setattr(torch_internals, "sys", SimpleNamespace(version_info=(3, 14, 0)))
    fast = instrument(tiny.model("llama"), tiny.tokenizer()).report(CapturePolicy()).speedups
    reason = "torch does not support TorchScript on Python 3.14"
    assert fast["step graph"] == reason
    assert fast["prepacked weights"] == "needs a step graph"
    assert fast["preallocated KV cache"] is None
