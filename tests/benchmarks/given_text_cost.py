"""What tracing given text costs: ``python -m tests.benchmarks.given_text_cost [--quick]``.

At 256, 1,024 and 4,096 tokens, beside plain prefill in the same process and in turn, in
float32 on SmolLM2:

- time without the lens, and with the lens of all layers; for that also the floor, the time
  of the multiply-adds that it needs: the model's and one head a layer;
- peak memory, each run in a process of its own;
- what ``--trace-prompt light`` adds to a turn of 128 tokens after a prompt of about 100.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (256, 1024, 4096)
MODES = ("plain", "no lens", "all layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Short texts, one round.")
    parser.add_argument("--one", nargs=2, metavar=("MODE", "LENGTH"))
    arguments = parser.parse_args()
    if arguments.one:
        mode, length = arguments.one
        print(json.dumps(peak_mb(mode, int(length))))
        return
    lengths, rounds = (LENGTHS[:1], 1) if arguments.quick else (LENGTHS, 3)
    times(lengths, rounds)
    memory(lengths, rounds)
    turn(rounds)


def times(lengths: tuple[int, ...], rounds: int) -> None:
    """Medians of rounds in turn; ratios to plain prefill and to the floor."""
    loaded, instrument = prepared()
    for length in lengths:
        runs = {mode: run_of(loaded, instrument, mode, length) for mode in MODES}
        took: dict[str, list[float]] = {mode: [] for mode in (*MODES, "floor")}
        for _ in range(rounds):
            for mode, run in runs.items():
                took[mode].append(timed(run))
            took["floor"].append(took["plain"][-1] + timed(heads(loaded, length)))
        median = {mode: statistics.median(values) for mode, values in took.items()}
        print(
            f"{length:,} tokens: plain {median['plain']:.2f} s; no lens {median['no lens']:.2f} s, "
            f"{median['no lens'] / median['plain']:.2f} times plain; all layers "
            f"{median['all layers']:.2f} s, {median['all layers'] / median['floor']:.2f} times the "
            f"floor of {median['floor']:.2f} s",
            flush=True,
        )


def heads(loaded: Any, length: int) -> Callable[[], None]:
    """The multiply-adds of one head for every layer and position, and nothing else."""
    import torch

    layers = loaded.model.config.num_hidden_layers + 1
    rows = torch.randn(128, loaded.model.config.hidden_size)

    @torch.no_grad()
    def run() -> None:
        for _ in range(layers * length // 128):
            loaded.model.lm_head(rows)

    return run


def memory(lengths: tuple[int, ...], rounds: int) -> None:
    for length in lengths:
        peaks = {mode: statistics.median(peak(mode, length, rounds)) for mode in MODES}
        more = {mode: f"{peaks[mode] / peaks['plain'] - 1:+.0%}" for mode in MODES[1:]}
        print(
            f"{length:,} tokens, peak memory: plain {peaks['plain']:,.0f} MB, no lens "
            f"{more['no lens']}, all layers {more['all layers']}",
            flush=True,
        )


def peak(mode: str, length: int, rounds: int) -> list[float]:
    command = [sys.executable, "-m", "tests.benchmarks.given_text_cost", "--one", mode, str(length)]
    found = []
    for _ in range(rounds):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(float(json.loads(done.stdout.splitlines()[-1])))
    return found


def peak_mb(mode: str, length: int) -> float:
    run_of(*prepared(), mode, length)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def turn(rounds: int) -> None:
    """A turn of 128 tokens with and without the light trace of its prompt."""
    from oki_trace.records import CapturePolicy, ChatMessage, Role, Sampling
    from oki_trace.tracing import Collector, trace_turn

    loaded, instrument = prepared()
    loaded.model.generation_config.eos_token_id = None
    said = "Write about the sea, " + "and tell me of its fish, its winds and its sailors, " * 5
    ratios = []
    for _ in range(rounds):
        took = []
        for level in (None, "light"):
            policy = replace(CapturePolicy(), trace_prompt=level)
            kept = Collector()
            began = time.perf_counter()
            messages = [ChatMessage(Role.USER, said)]
            trace_turn(instrument, "smollm2", messages, Sampling(128), policy, [kept])
            took.append(time.perf_counter() - began)
        ratios.append(took[1] / took[0])
        tokens = len(kept.prompt_steps) + 1
    print(f"a turn of 128 tokens, prompt of {tokens}: light {statistics.median(ratios) - 1:+.0%}")


def prepared() -> tuple[Any, Any]:
    from oki_trace.llm.capture.instrument import instrument
    from oki_trace.llm.loading.load import load
    from oki_trace.records import ModelChoice

    loaded = load(ModelChoice("smollm2", dtype="float32"))
    return loaded, instrument(loaded.model, loaded.tokenizer)


def run_of(loaded: Any, instrument: Any, mode: str, length: int) -> Callable[[], None]:
    import torch

    from oki_trace.llm.capture.teacher_forcing import teacher_force
    from oki_trace.llm.decoding.model_lock import lock_model
    from oki_trace.records import CapturePolicy

    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    ids = loaded.tokenizer(text, verbose=False)["input_ids"][:length]
    policy = CapturePolicy(
        tensors="none", trace_prompt="full", lens_layers="none" if mode == "no lens" else "all"
    )

    @torch.no_grad()
    def plain() -> None:
        loaded.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def traced() -> None:
        with lock_model(loaded.model):
            for _ in teacher_force(instrument, ids, policy.for_prompt):
                pass

    return plain if mode == "plain" else traced


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
