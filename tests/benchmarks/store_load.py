"""What eight polling readers cost a writer, and how soon they see a step.

``python -m tests.benchmarks.store_load``, on a machine with nothing else to do.
Steps are as large as SmolLM2's, with full tensors. First at full speed, with
readers and without, in turn; then at the pace of a model, through the recorder;
then with SmolLM2 itself, from the moment a token is decoded until another
process has read it. Prints a table; nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oki_trace.records import Status, Step, TurnEnd
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from tests.store import crowd

DONE = TurnEnd(Status.COMPLETE, "x", "end of turn", 1.0)


def full_speed(
    made: Sequence[Step], readers: int, pause: float, watching: Any
) -> tuple[float, list[float], int]:
    """(steps a second, milliseconds from each append's return until seen, faults)."""
    with tempfile.TemporaryDirectory() as folder:
        db = str(Path(folder) / "store.db")
        with TraceWriter(db) as writer:
            message = crowd.begin(writer)
            with crowd.readers(readers, db, message, len(made), pause, **watching) as looking:
                returned = []
                began = time.perf_counter()
                for step in made:
                    writer.append(message, [step])
                    returned.append(time.monotonic_ns())
                took = time.perf_counter() - began
                seen = [crowd.told(process) for process in looking]
    return len(made) / took, latencies(seen, returned), sum(len(one.wrong) for one in seen)


def at_a_pace(
    made: Sequence[Step], readers: int, pause: float, a_second: float, watching: Any
) -> tuple[list[float], int]:
    """(milliseconds from handing each step to the recorder until seen, faults)."""
    with tempfile.TemporaryDirectory() as folder:
        db = str(Path(folder) / "store.db")
        with TraceWriter(db) as writer:
            message = crowd.begin(writer, start=False)
            recorder = Recorder(writer, message)
            recorder.start(crowd.START)
            with crowd.readers(readers, db, message, len(made), pause, **watching) as looking:
                handed = []
                began = time.monotonic()
                for number, step in enumerate(made):
                    time.sleep(max(0.0, began + number / a_second - time.monotonic()))
                    handed.append(time.monotonic_ns())
                    recorder.step(step)
                recorder.end(DONE)
                seen = [crowd.told(process) for process in looking]
    return latencies(seen, handed), sum(len(one.wrong) for one in seen)


def with_a_model(readers: int, pause: float, tokens: int, watching: Any) -> tuple[list[float], int]:
    """(milliseconds from the decode of each token until seen, faults): SmolLM2 in float32."""
    from oki_trace.generate import generate_reply
    from oki_trace.llm.capture import pipeline
    from oki_trace.llm.loading.load import load
    from oki_trace.queueing import ReplyRequest, new_messages, submit
    from oki_trace.records import CapturePolicy, ModelChoice, Sampling
    from oki_trace.store.reading.reader import TraceReader

    loaded = load(ModelChoice("smollm2", dtype="float32"))
    loaded.model.generation_config.eos_token_id = None
    decoded, decode = [], pipeline.decode

    def timed(*arguments: Any) -> Iterator[Any]:
        for raw in decode(*arguments):
            decoded.append(time.monotonic_ns())
            yield raw

    with tempfile.TemporaryDirectory() as folder:
        db = str(Path(folder) / "store.db")
        with TraceWriter(db) as writer, TraceReader(db) as reader:
            messages = new_messages("Write a story.")
            request = ReplyRequest(messages, loaded.requested, Sampling(tokens), CapturePolicy())
            for look in (False, True):
                _, message = submit(writer, request, claim=True)
                count = readers if look else 0
                with crowd.readers(count, db, message, tokens, pause, **watching) as looking:
                    decoded.clear()
                    pipeline.decode = timed  # type: ignore[assignment]
                    generate_reply(writer, reader, reader.message(message), loaded)
                    seen = [crowd.told(process) for process in looking]
    # The lens follows its step, so a step read at once may be without it.
    wrong = [fault for one in seen for fault in one.wrong if "no whole lens" not in fault]
    return latencies(seen, decoded), len(wrong)


def latencies(seen: Sequence[crowd.Seen], since: Sequence[int]) -> list[float]:
    """Of every step, for every reader. One seen before append returned was seen at once."""
    return [max(0.0, (at - since[i]) / 1e6) for one in seen for i, at in one.at.items()]


def shown(name: str, values: Sequence[float]) -> str:
    if not values:
        return f"{name:44} –"
    at = statistics.quantiles(values, n=100)
    return (
        f"{name:44} p50 {at[49]:6.1f} ms   p95 {at[94]:6.1f} ms   "
        f"slowest {max(values):6.1f} ms   ({len(values)} sights)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.05, help="Between polls, in seconds.")
    parser.add_argument(
        "--nice",
        type=int,
        default=0,
        help="Of the readers. 19 takes the rivalry for the processor out: what is left is "
        "what the store itself makes the writer wait.",
    )
    parser.add_argument("--pace", type=float, default=25.0, help="Tokens a second of a model.")
    parser.add_argument(
        "--strip",
        action="store_true",
        help="Read of each new step its token and numbers, as a reply on screen does, and not "
        "the newest one whole, as an open step panel does.",
    )
    given = parser.parse_args()
    watching = {"nice": given.nice, "whole": not given.strip}
    made = crowd.steps(given.steps)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {given.steps} steps a run")
    alone, watched, visible, wrong = [], [], [], 0
    for _ in range(given.pairs):
        alone.append(full_speed(made, 0, given.pause, {})[0])
        speed, late, faults = full_speed(made, given.readers, given.pause, watching)
        watched.append(speed)
        visible += late
        wrong += faults
        print(f"alone {alone[-1]:6.1f} steps/s   watched {speed:6.1f} steps/s", flush=True)
    loss = 1 - statistics.median(watched) / statistics.median(alone)
    print(
        f"medians: alone {statistics.median(alone):.1f}, with {given.readers} readers "
        f"{statistics.median(watched):.1f} steps/s: {loss:.1%} lost"
    )
    print(shown("full speed: append returned → seen", visible))
    paced, faults = at_a_pace(made, given.readers, given.pause, given.pace, watching)
    print(shown(f"{given.pace:g} tokens/s: handed over → seen", paced))
    real, more = with_a_model(given.readers, given.pause, 100, watching)
    print(shown("SmolLM2: decoded → seen", real))
    faults += more
    paced += real
    print(f"{wrong + faults} faults among {len(visible) + len(paced)} sights")


if __name__ == "__main__":
    main()
