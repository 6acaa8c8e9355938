"""What a branch costs: ``python -m tests.benchmarks.branch_cost [--rounds N]``.

A branch from the middle of a conversation of about 1,000 tokens, on SmolLM2 in float32, with
and without the KV cache of the reply before, in turn: the time to its first token. Then a
hundred branches of one reply without full tensors: what each adds to the store.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from oki_trace.generate import generate_reply
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.loading.load import load
from oki_trace.queueing import ReplyRequest, new_messages, submit, submit_branch
from oki_trace.records import CapturePolicy, Forced, ModelChoice, Sampling
from oki_trace.store.maintenance.vacuum import vacuum
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter

CHOICE = ModelChoice("smollm2", dtype="float32")
POLICY = CapturePolicy(tensors="none")
QUESTION = "Summarize: " + "The sea is wide and the wind is cold, says the old sailor. " * 66
BRANCHES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    loaded = load(CHOICE)
    prefix: Any = instrument(loaded.model, loaded.tokenizer).fast.prefix
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        with TraceWriter(path) as writer, TraceReader(path) as reader:
            request = ReplyRequest(new_messages(QUESTION), CHOICE, Sampling(20), POLICY)

            def answer(reply_id: int) -> float:
                """Generate the reply; returns the time to its first token."""
                began = time.perf_counter()
                first: list[float] = []

                def tick() -> bool:
                    first.append(time.perf_counter() - began)
                    return False

                reply = reader.message(reply_id)
                generate_reply(writer, reader, reply, loaded, should_stop=tick)
                return first[0]

            reply_id = submit(writer, request, claim=True)[1]
            answer(reply_id)
            origin = reader.message(reply_id)
            assert origin.prompt_len is not None

            def branch(step: int, tokens: int) -> float:
                forced = Forced(text=" never")
                sampling = Sampling(tokens)
                return answer(
                    submit_branch(writer, origin, step, sampling, POLICY, forced=forced, claim=True)
                )

            reused, fresh = [], []
            for _ in range(rounds):
                prefix.drop()
                fresh.append(branch(10, 8))
                reused.append(branch(10, 8))
            one, two = statistics.median(reused), statistics.median(fresh)
            print(
                f"first token of a branch after {origin.prompt_len + 10:,} tokens: {one:.3f} s "
                f"with the KV cache, {two:.3f} s without ({one / two:.2f} times)"
            )
            vacuum(path)
            before = path.stat().st_size
            for _ in range(BRANCHES):
                branch(10, 1)
            vacuum(path)
            size = (path.stat().st_size - before) / BRANCHES
            print(
                f"each of {BRANCHES} branches of two tokens adds {size / 1e3:.1f} kB to the store"
            )


if __name__ == "__main__":
    main()
