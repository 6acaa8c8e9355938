"""How long the built-in questions take.

``python -m tests.benchmarks.bench_questions FOLDER 1000 10000 100000``

For each size a store is built in FOLDER through the public writer (or found
there from an earlier run), the cache is written anew, and every view of every
question is asked over everything and over one conversation: the median of
five. A process of its own each, so that its peak memory is its own. Prints
Markdown; one size alone prints JSON, and ``report FILE…`` makes a table of such.

``… FOLDER tensors`` measures the questions that read full
tensors, on 4,000 steps that have them: two models that never part.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from oki_trace.analysis import questions
from oki_trace.analysis.folder import folder_of
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.questions.compare import SAMPLE
from oki_trace.analysis.scope import Scope
from oki_trace.store.writing.writer import TraceWriter
from tests.benchmarks import synthetic

TIMES = 5
PROMPTS = 20
# What a token of SmolLM2 takes, traced, on the two cores of the README's figures.
TOKEN_MS = 1000 / 22.3


def measure(path: Path, steps: int) -> dict[str, Any]:
    """Everything about one size, in this process."""
    writing: float | None = None
    if not path.exists():
        began = time.perf_counter()
        with TraceWriter(path) as writer:
            synthetic.fill(writer, steps)
        writing = (time.perf_counter() - began) / steps * 1000
    with QuerySession(path) as session:
        began, cpu = time.perf_counter(), time.process_time()
        session.rebuild()
        written = time.perf_counter() - began
        written_cpu = time.process_time() - cpu
        began = time.perf_counter()
        (found,) = session.ask("SELECT count(*) FROM step").rows
        opened = time.perf_counter() - began
        assert found == (steps,)
        conversation = session.ask("SELECT median(conversation_id)::BIGINT FROM message").rows[0][0]
        times = {
            f"{question.name} --by {view}": [
                asked(session, question.name, view, scope=scope)
                for scope in (Scope(), Scope(conversation=conversation))
            ]
            for question in questions.QUESTIONS.values()
            for view in question.views
            if not question.views[view].reads_tensors and not question.compares
        }
        two = session.ask(
            f"SELECT id FROM message WHERE role = 'assistant' AND conversation_id = {conversation}"
        ).rows
        times["compare"] = [
            asked(session, "compare", subjects=("smollm2", "other/model")),
            asked(session, "compare", subjects=tuple(str(row[0]) for row in two)),
        ]
    files = list(folder_of(str(path)).rglob("*.parquet"))
    return {
        "steps": steps,
        "writer, ms a step": writing,
        "cache, ms a step": written / steps * 1000,
        "cache, CPU ms a step": written_cpu / steps * 1000,
        "cache, share of the time of a token": written_cpu / steps * 1000 / TOKEN_MS,
        "cache, bytes a step": sum(file.stat().st_size for file in files) / steps,
        "cache, files a table": len(files) / 8,
        "open, ms": opened * 1000,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "times": times,
    }


def measure_tensors(path: Path) -> dict[str, float]:
    """Milliseconds for what reads full tensors, and the peak memory."""
    if not path.exists():
        with TraceWriter(path) as writer:
            synthetic.fill_pairs(writer, PROMPTS)
    with QuerySession(path) as session:
        session.rebuild()
        a, b = (
            session.ask(f"SELECT min(id) FROM message WHERE model_id = '{model}'").rows[0][0]
            for model in ("smollm2", "other/model")
        )
        found = {
            "two steps": asked(session, "compare", subjects=(f"{a}:50", f"{b}:50")),
            "two replies, 100 steps": asked(session, "compare", subjects=(str(a), str(b))),
            **{
                f"two models, {min(sample, prompts * 100):,} of {prompts * 100:,} steps": asked(
                    session,
                    "compare",
                    subjects=("smollm2", "other/model"),
                    top=prompts,
                    sample=sample,
                )
                for prompts, sample in ((5, SAMPLE), (20, SAMPLE), (20, 2000))
            },
            "heads, 64 steps": asked(session, "heads"),
            "heads, 640 steps": asked(session, "heads", sample=640),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {**found, "peak memory, MB": peak}


def asked(session: QuerySession, name: str, view: str | None = None, **given: Any) -> float:
    """The median time of a question, in milliseconds."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        questions.answer(session, name, view=view, **given)
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def report(found: list[dict[str, Any]]) -> str:
    """Two Markdown tables."""
    head = "| | " + " | ".join(f"{one['steps']:,} steps" for one in found) + " |"
    rule = "| --- |" + " ---: |" * len(found)
    lines = [head, rule]
    for name in found[0]["times"]:
        cells = [f"{one['times'][name][0]:.0f} / {one['times'][name][1]:.0f}" for one in found]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", head, rule]
    for name in list(found[0])[1:-1]:
        cells = ["" if one[name] is None else f"{one[name]:,.3g}" for one in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1] == "report":
        print(report([json.loads(Path(name).read_text()) for name in sys.argv[2:]]))
        return
    folder = Path(sys.argv[1])
    if sys.argv[2] == "tensors":
        print(json.dumps(measure_tensors(folder / "tensors.db"), indent=2))
        return
    sizes = [int(size) for size in sys.argv[2:]]
    if len(sizes) == 1:
        print(json.dumps(measure(folder / f"{sizes[0]}.db", sizes[0])))
        return
    found = []
    for size in sizes:
        command = [sys.executable, "-m", "tests.benchmarks.bench_questions", str(folder), str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(report(found))


if __name__ == "__main__":
    main()
