"""``bench``: measures the cost of tracing on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import console, print_json, print_text
from oki_trace.cli.watchdog import watchdog
from oki_trace.reporting import size
from oki_trace.sanitize import inert


def bench(
    model: options.Model = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per run.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 5,
    four_bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    tensors: options.Tensors = "half",
    no_fast: options.NoFast = False,
    json: options.Json = False,
) -> None:
    """Compare the speed of plain generate() and of traced runs, in alternating pairs.

    The traces are written to a temporary store.

    Example: oki-trace bench --tokens 64

    Example: oki-trace bench --model ./my-model --json
    """
    from oki_trace import bench as benchmark
    from oki_trace.llm.loading.load import load

    def report(line: str) -> None:
        if not json:
            print_text(line, "dim")

    with watchdog():
        loaded = load(options.choice_of(model, four_bit, dtype, device))
        policy = options.policy_of(tensors)
        result = benchmark.run(loaded, tokens=tokens, rounds=rounds, policy=policy, report=report)
    if json:
        print_json(asdict(result), indent=None)
        return
    console().print(
        f"{inert(result.model_id)}, {result.dtype} on {result.device}: "
        f"plain {result.plain_tok_s:.1f}, traced {result.traced_tok_s:.1f} tokens/s, "
        f"ratio [bold]{result.ratio:.3f}[/] ({result.ratio_min:.3f} to {result.ratio_max:.3f}), "
        f"{size(result.bytes_per_token)} per token"
    )
