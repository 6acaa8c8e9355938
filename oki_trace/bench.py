"""Measures the cost of tracing: pairs of plain ``generate()`` and traced runs in one process.

Both decode the same greedy tokens from the same prompt. The traced run ends when the
reply is complete in a temporary store on disk. Machines drift, so the figures are medians
over pairs of runs, and the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from oki_trace.errors import UsageError
from oki_trace.generate import generate_reply
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.chat.prompt import render
from oki_trace.llm.loading.hardware import input_device
from oki_trace.llm.loading.load import LoadedModel
from oki_trace.queueing import ReplyRequest, new_messages, submit
from oki_trace.records import CapturePolicy, ChatMessage, Role, Sampling
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter

PROMPT = "Write a long story about a lighthouse keeper and the sea."


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Tokens per second of both; ``ratio`` is traced / plain, so 1.0 means no cost."""

    model_id: str
    dtype: str
    device: str
    threads: int
    tokens: int
    rounds: int
    plain_tok_s: float
    traced_tok_s: float
    ratio: float
    ratio_min: float
    ratio_max: float
    bytes_per_token: float


def run(
    loaded: LoadedModel,
    *,
    tokens: int,
    rounds: int,
    policy: CapturePolicy,
    report: Callable[[str], None],
) -> BenchResult:
    """Time ``rounds`` pairs of runs of ``tokens`` tokens each, after one warm-up pair."""
    if tokens < 2 or rounds < 1:
        raise UsageError("A benchmark needs --tokens of 2 or more and --rounds of 1 or more.")
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="oki-trace-bench-") as folder:
        db = str(Path(folder) / "bench.db")
        with TraceWriter(db) as writer, TraceReader(db) as reader:
            for number in range(rounds + 1):
                plain = _plain(loaded, tokens)
                traced = _traced(loaded, tokens, policy, writer, reader)
                if number:
                    pairs.append((plain, traced))
                    report(
                        f"round {number}: plain {plain:.1f}, traced {traced:.1f} tokens/s, "
                        f"ratio {traced / plain:.3f}"
                    )
            info = reader.info()
    ratios = [traced / plain for plain, traced in pairs]
    return BenchResult(
        model_id=loaded.model_id,
        dtype=loaded.dtype,
        device=loaded.device,
        threads=torch.get_num_threads(),
        tokens=tokens,
        rounds=rounds,
        plain_tok_s=statistics.median(plain for plain, _ in pairs),
        traced_tok_s=statistics.median(traced for _, traced in pairs),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        bytes_per_token=info.bytes / max(info.steps, 1),
    )


def _plain(loaded: LoadedModel, tokens: int) -> float:
    prompt = render(loaded.tokenizer, [ChatMessage(Role.USER, PROMPT)])
    ids = torch.tensor([prompt.token_ids], device=input_device(loaded.model))
    began = time.perf_counter()
    output = loaded.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
    )
    return float((output.shape[1] - ids.shape[1]) / (time.perf_counter() - began))


def _traced(
    loaded: LoadedModel,
    tokens: int,
    policy: CapturePolicy,
    writer: TraceWriter,
    reader: TraceReader,
) -> float:
    instrument(loaded.model, loaded.tokenizer)  # the checks at load are not part of a reply
    sampling = Sampling(max_new_tokens=tokens)
    request = ReplyRequest(new_messages(PROMPT), loaded.requested, sampling, policy)
    _, reply_id = submit(writer, request, claim=True)
    began = time.perf_counter()
    generate_reply(writer, reader, reader.message(reply_id), loaded)
    seconds = time.perf_counter() - began
    return reader.message(reply_id).tokens / seconds
