"""What capture costs: ``python tests/benchmarks/capture_cost.py [--quick]``.

Five figures, each of a traced run into a real store under the default capture
policy against plain ``generate()`` in the same process, in turn, greedy:

- speed, in float32 and in bfloat16 (what ``oki-trace bench`` prints);
- against re-running the whole sequence for every token with every layer through
  the head, as tools that keep no cache do;
- peak memory with a prompt of 4,096 tokens, each run in a process of its own, and
  how much more of it a reply ten times as long takes;
- time a step at 4,096 tokens of context, against 256;
- time to import the package and to print the help.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORD = "lighthouse "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer tokens and rounds.")
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "DTYPE", "CONTEXT", "TOKENS"))
    arguments = parser.parse_args()
    if arguments.one:
        what, dtype, context, tokens = arguments.one
        print(json.dumps(one_run(what, dtype, int(context), int(tokens))))
        return
    rounds, tokens = (2, 32) if arguments.quick else (5, 128)
    for dtype in ("float32", "bfloat16"):
        found = bench(dtype, tokens, rounds)
        print(
            f"speed, {dtype}: plain {found['plain_tok_s']:.1f}, traced {found['traced_tok_s']:.1f} "
            f"tokens/s, ratio {found['ratio']:.2f} ({found['ratio_min']:.2f} to "
            f"{found['ratio_max']:.2f})",
            flush=True,
        )
    rerun(32 if arguments.quick else 256)
    memory(rounds, 8 if arguments.quick else 32)
    growth(rounds, 16 if arguments.quick else 128)
    starting(rounds)


def bench(dtype: str, tokens: int, rounds: int) -> dict[str, float]:
    """``oki-trace bench`` in its own process."""
    command = [sys.executable, "-m", "oki_trace", "bench", "--json", "--dtype", dtype]
    command += ["--tokens", str(tokens), "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rerun(tokens: int) -> None:
    """Traced decoding against a forward pass over the whole sequence for each token."""
    import torch

    from oki_trace.llm.capture.instrument import instrument
    from oki_trace.llm.chat.prompt import render
    from oki_trace.llm.loading.load import load
    from oki_trace.records import CapturePolicy, ChatMessage, ModelChoice, Role, Sampling
    from oki_trace.tracing import Collector, trace_turn

    loaded = load(ModelChoice("smollm2", dtype="float32"))
    said = [ChatMessage(Role.USER, "Write a long story about a lighthouse keeper and the sea.")]
    made = instrument(loaded.model, loaded.tokenizer)

    def traced() -> float:
        kept = Collector()
        began = time.perf_counter()
        trace_turn(made, "smollm2", said, Sampling(tokens), CapturePolicy(), [kept])
        return (time.perf_counter() - began) / len(kept.steps)

    @torch.no_grad()
    def again() -> float:
        model = loaded.model
        ids = torch.tensor([render(loaded.tokenizer, said).token_ids])
        # Its cost grows evenly with the length: a few steps at the middle length stand for all.
        ids = torch.cat([ids, torch.full((1, tokens // 2), 30)], dim=-1)
        began = time.perf_counter()
        for _ in range(4):
            out = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
            for hidden in out.hidden_states:
                model.lm_head(model.model.norm(hidden[:, -1])).softmax(-1).topk(5)  # type: ignore[operator,union-attr]
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=-1)
        return (time.perf_counter() - began) / 4

    traced()
    loaded.model.set_attn_implementation("eager")
    slow = again()
    loaded.model.set_attn_implementation("sdpa")
    fast = traced()
    print(
        f"against re-running, {tokens} new tokens: {1e3 * fast:.0f} ms a step against "
        f"{1e3 * slow:.0f}, {slow / fast:.1f} times as fast",
        flush=True,
    )


def memory(rounds: int, tokens: int) -> None:
    """Peak memory at a long prompt, and of a reply ten times as long.

    How a plain run's activations fall into memory differs by 300 MB from one process to
    the next: medians of pairs, in turn.
    """
    peaks: dict[str, list[float]] = {what: [] for what in PREPARED}
    for _ in range(rounds):
        for what, found in peaks.items():
            found.append(in_process(what, "float32", 4096, tokens)["peak_mb"])
    plain, traced = (statistics.median(found) for found in peaks.values())
    longer = in_process("traced", "float32", 256, 20 * tokens)
    shorter = in_process("traced", "float32", 256, 2 * tokens)
    print(
        f"peak memory, prompt of 4,096: plain {_range(peaks['plain'])} MB, traced "
        f"{_range(peaks['traced'])} MB, {traced / plain - 1:+.1%}",
        flush=True,
    )
    print(
        f"peak memory, {20 * tokens} new tokens against {2 * tokens}: "
        f"{longer['peak_mb'] - shorter['peak_mb']:+.0f} MB",
        flush=True,
    )


def _range(found: Sequence[float]) -> str:
    return f"{statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"


def growth(rounds: int, tokens: int) -> None:
    """How much slower a step is with a long context, plain and traced in turn."""
    from oki_trace.llm.loading.load import load
    from oki_trace.records import ModelChoice

    loaded = load(ModelChoice("smollm2", dtype="float32"))
    loaded.model.generation_config.eos_token_id = None
    took: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="oki-trace-bench-") as folder, chdir(folder):
        for _ in range(rounds):
            for what, prepare in PREPARED.items():
                for context in (256, 4096):
                    step = step_ms(loaded, prepare(loaded, context), tokens)
                    took.setdefault((what, context), []).append(step)
    for what in PREPARED:
        short, long = (statistics.median(took[what, context]) for context in (256, 4096))
        print(
            f"a step, {what}: {short:.1f} ms at 256 tokens of context, {long:.1f} ms at 4,096: "
            f"{long / short:.2f} times, {long - short:+.1f} ms",
            flush=True,
        )


def starting(rounds: int) -> None:
    """Seconds until the package is imported, and until the help is printed."""
    for name, arguments in (
        ("import oki_trace", ["-c", "import oki_trace"]),
        ("oki-trace --help", ["-m", "oki_trace", "--help"]),
    ):
        took = []
        for _ in range(max(rounds, 5)):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
            took.append(time.perf_counter() - began)
        print(f"{name}: {statistics.median(took):.2f} s", flush=True)


def in_process(what: str, dtype: str, context: int, tokens: int) -> dict[str, float]:
    """``one_run`` in a process of its own."""
    command = [sys.executable, __file__, "--one", what, dtype, str(context), str(tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_run(what: str, dtype: str, context: int, tokens: int) -> dict[str, float]:
    """One reply after a prompt of ``context`` tokens, as long whatever the model says: its peak."""
    from oki_trace.llm.loading.load import load
    from oki_trace.records import ModelChoice

    loaded = load(ModelChoice("smollm2", dtype=dtype))
    loaded.model.generation_config.eos_token_id = None
    run = PREPARED[what](loaded, context)
    with tempfile.TemporaryDirectory(prefix="oki-trace-bench-") as folder, chdir(folder):
        run(1)
        run(tokens)
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def step_ms(loaded: Any, run: Callable[[int], float], tokens: int) -> float:
    """Time a step, from the end of the prompt's pass to the end of the reply, all of it written."""
    prompt_ended = _when_first_called(loaded.model)
    run(tokens)
    return 1e3 * (time.perf_counter() - prompt_ended[0]) / (tokens - 1)


def _when_first_called(model: Any) -> list[float]:
    """Where the time will stand at which the next pass ends. A hook that stays would slow steps."""
    when: list[float] = []

    def note(*_: object) -> None:
        when.append(time.perf_counter())
        handle.remove()

    handle = model.register_forward_hook(note)
    return when


def plain(loaded: object, context: int) -> Callable[[int], float]:
    import torch

    ids = torch.tensor([prompt_ids(loaded, context)])

    def run(tokens: int) -> float:
        began = time.perf_counter()
        loaded.model.generate(  # type: ignore[attr-defined]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
        )
        return time.perf_counter() - began

    return run


def traced(loaded: object, context: int) -> Callable[[int], float]:
    from oki_trace.generate import generate_reply
    from oki_trace.llm.capture.instrument import instrument
    from oki_trace.queueing import ReplyRequest, new_messages, submit
    from oki_trace.records import CapturePolicy, Sampling
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    instrument(loaded.model, loaded.tokenizer)  # type: ignore[attr-defined]
    said = loaded.tokenizer.decode(prompt_ids(loaded, context))  # type: ignore[attr-defined]

    def run(tokens: int) -> float:
        with TraceWriter("bench.db") as writer, TraceReader("bench.db") as reader:
            choice = loaded.requested  # type: ignore[attr-defined]
            request = ReplyRequest(new_messages(said), choice, Sampling(tokens), CapturePolicy())
            _, reply = submit(writer, request, claim=True)
            began = time.perf_counter()
            generate_reply(writer, reader, reader.message(reply), loaded)  # type: ignore[arg-type]
            return time.perf_counter() - began

    return run


def prompt_ids(loaded: object, context: int) -> list[int]:
    ids: list[int] = loaded.tokenizer(WORD * context)["input_ids"]  # type: ignore[attr-defined]
    return ids[:context]


PREPARED = {"plain": plain, "traced": traced}


if __name__ == "__main__":
    main()
