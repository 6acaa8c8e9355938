"""One turn as its sinks receive it, however it ends."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.records import CapturePolicy, ChatMessage, Lens, Role, Sampling, Status, TurnEnd
from oki_trace.tracing import Collector, prepare, trace_turn
from tests import tiny

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox")]


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    return tiny.model("llama"), tiny.tokenizer()


def turn(llama: tuple[Any, Any], *sinks: Any, tokens: int = 12, **options: Any) -> TurnEnd:
    made = instrument(*llama)
    policy = CapturePolicy(tensors="none")
    return trace_turn(made, "tiny", MESSAGES, Sampling(tokens), policy, sinks, **options)


@pytest.mark.parametrize("tokens", range(1, 25))
def test_what_was_streamed_is_the_reply(llama: tuple[Any, Any], tokens: int) -> None:
    """A random model speaks in broken characters, so that some turns end within one."""
    pieces: list[str] = []
    end = turn(llama, tokens=tokens, on_text=lambda text, kind: pieces.append(text))
    assert "".join(pieces) == end.output
    assert end.output


def test_a_lens_comes_after_its_step_and_before_the_end(llama: tuple[Any, Any]) -> None:
    order: list[object] = []

    class Sink(Collector):
        def step(self, step: Any) -> None:
            order.append(step.step_index)

        def lens(self, lens: Lens) -> None:
            assert lens.step_index in order
            order.append(("lens", lens.step_index))

        def end(self, end: TurnEnd) -> None:
            order.append("end")

    turn(llama, Sink())
    assert order[-1] == "end"
    assert [i for i in order if isinstance(i, int)] == list(range(12))
    assert [i for i in order if isinstance(i, tuple)] == [("lens", i) for i in range(12)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_reply_as_stopped_and_goes_on(
    llama: tuple[Any, Any], error: type[BaseException]
) -> None:
    sink = Collector()
    pieces: list[str] = []

    def interrupt(text: str, kind: str) -> None:
        pieces.append(text)
        if len(sink.steps) == 4:
            raise error

    with pytest.raises(error):
        turn(llama, sink, on_text=interrupt)
    assert sink.ended is not None
    assert (sink.ended.status, sink.ended.reason) == (Status.STOPPED, "interrupted by the user")
    assert len(sink.steps) == 4
    assert sink.ended.output.startswith("".join(pieces))


def test_whatever_goes_wrong_is_told_to_every_sink_in_one_line(llama: tuple[Any, Any]) -> None:
    class Broken(Collector):
        def step(self, step: Any) -> None:
            if step.step_index == 2:
                raise RuntimeError("no more room\nand details")

    other, broken = Collector(), Broken()
    with pytest.raises(CaptureError) as caught:
        turn(llama, other, broken)
    for sink in (other, broken):
        assert sink.ended is not None
        assert (sink.ended.status, sink.ended.reason) == (Status.FAILED, str(caught.value))
    assert "RuntimeError: no more room" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_tokenizer_is_not_the_user_s_doing() -> None:
    """It is a BaseException, as what ends a program is."""
    tokenizer = tiny.tokenizer()
    split = Split(Regex("(a+)+$"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = split
    made, sink = instrument(tiny.model("llama"), tokenizer), Collector()
    said = [ChatMessage(Role.USER, "a" * 30 + "b")]
    with pytest.raises(CaptureError, match=r"tokenizer failed \(PanicException: "):
        trace_turn(made, "tiny", said, Sampling(4), CapturePolicy(tensors="none"), [sink])
    assert sink.ended is not None and sink.ended.status is Status.FAILED


def test_memory_that_runs_out_says_what_to_do(llama: tuple[Any, Any]) -> None:
    class Full(Collector):
        def step(self, step: Any) -> None:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(CaptureError, match=r"Out of memory .*\. Shorten the prompt, or load .*4"):
        turn(llama, Full())


def test_a_model_that_cannot_be_attached_to_ends_the_reply(llama: tuple[Any, Any]) -> None:
    sink = Collector()
    with pytest.raises(CaptureError) as caught:
        prepare(object(), llama[1], [sink])
    assert sink.ended is not None
    assert (sink.ended.status, sink.ended.reason) == (Status.FAILED, str(caught.value))
    assert "\n" not in str(caught.value)
