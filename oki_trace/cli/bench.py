"""``bench``: what tracing costs on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import console, inert, print_json
from oki_trace.cli.watchdog import watchdog
from oki_trace.reporting import size


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(bench)


def bench(
    model: options.Model = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="New tokens a run.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Pairs of runs.")] = 5,
    four_bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    tensors: options.Tensors = "half",
    no_fast: options.NoFast = False,
    json: options.Json = False,
) -> None:
    """Plain generate() against the traced run, side by side, several times.

    The traces go into a store that is deleted afterwards.

    Example: oki-trace bench --tokens 64

    Example: oki-trace bench --model ./my-model --json
    """
    from oki_trace import bench as benchmark
    from oki_trace.llm.loading.load import load

    out = console()

    def report(line: str) -> None:
        if not json:
            out.print(f"[dim]{line}[/]")

    with watchdog():
        loaded = load(options.choice_of(model, four_bit, dtype, device))
        found = benchmark.run(
            loaded, tokens=tokens, rounds=rounds, policy=options.policy_of(tensors), report=report
        )
    if json:
        print_json(asdict(found), indent=None)
        return
    out.print(
        f"{inert(found.model_id)}, {found.dtype} on {found.device}: "
        f"plain {found.plain_tok_s:.1f}, traced {found.traced_tok_s:.1f} tokens/s, "
        f"ratio [bold]{found.ratio:.3f}[/] ({found.ratio_min:.3f} to {found.ratio_max:.3f}), "
        f"{size(round(found.bytes_per_token))} a token"
    )
