"""Loads what reads hidden states: a model's embeddings, final norm and head, and one block.

A config that says one block makes transformers read the tensors of that block alone, so
memory and time are those of the tail, not of the model. The block is there so that the
model runs, and its parts can be found and checked as those of a whole one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from oki_trace.errors import ModelError
from oki_trace.llm.loading.load import LoadedModel, load
from oki_trace.records import ModelChoice


@dataclass(frozen=True)
class LoadedTail:
    """A model that may lack all blocks but the first.

    ``blocks`` is how many it has, ``bytes`` the size of its weights.
    """

    loaded: LoadedModel
    blocks: int
    bytes: int


def load_tail(choice: ModelChoice, dtype: str) -> LoadedTail:
    """Load the tail of a model in ``dtype``; all of it where it has no smaller form.

    Raises ModelError, UsageError.
    """
    whole = ModelChoice(choice.model_id, False, dtype, choice.device)
    try:
        loaded = load(whole, change_config=_keep_one_block)
    except ModelError:
        # A family whose config cannot be cut, or a model that is not there: then this says so.
        loaded = load(whole)
    model: Any = loaded.model
    config = model.config.get_text_config(decoder=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return LoadedTail(loaded, int(getattr(config, "num_hidden_layers", 0)), size)


def _keep_one_block(config: Any) -> Any:
    """A copy of a config that declares one block; lists with an entry for each are cut."""
    one = copy.deepcopy(config)
    text = one.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 2:
        return one
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:1])
    text.num_hidden_layers = 1
    return one
