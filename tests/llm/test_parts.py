"""A reply's parts: read from its markers, passed to the template, segments of the next prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from oki_trace.errors import CaptureError, UsageError
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.markers import format_of
from oki_trace.llm.chat.parts import ReplyToken, answer_of, parts_of
from oki_trace.llm.chat.prompt import render
from oki_trace.llm.chat.reply_text import ReplyText
from oki_trace.records import ChatMessage, Part, Prompt, Role, TemplateOptions
from tests import tiny

HELLO = ChatMessage(Role.USER, "Capital of France?")
AGAIN = ChatMessage(Role.USER, "And of Italy?")
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}

# Thinking in <think>, removed from the turns before the last question; calls as JSON.
THINK = (
    "{%- if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}"
    '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n{% endif %}'
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{% endif %}"
    "{%- if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{%- else %}{{ m.content.lstrip('\n') }}{% endif %}"
    "{%- for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{%- endif %}{% endif %}"
)
OPENED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
HARMONY = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if m.tool_calls %}"
    "{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{%- elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant"
    "<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{%- endfor %}"
    "{%- if reasoning_effort %}<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>"
    "{%- endif %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}|{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}"
    "{% if b.type == 'thinking' %}[THINK]{{ b.thinking }}[/THINK]{% else %}{{ b.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs must have 9 characters') }}"
    "{% endif %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}</s>{% endif %}{% endfor %}"
)
# Reads contents only as lists, as multimodal templates do.
LISTS = (
    "{% for m in messages %}<s>{{ m.role }}:{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
# Reads arguments only as text, and calls only without a content.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
    "{% for c in m.tool_calls %}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
    "{{ c.type }}<｜tool▁sep｜>"
    "{{ c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>{% endfor %}{% else %}<s>{{ m.role }}:{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def tokenizer(template: str | None, *special: str) -> Any:
    made = tiny.tokenizer(template)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def read(made: Any, text: str, prompt: str = "", tools: Sequence[Any] = ()) -> tuple[Part, ...]:
    vocabulary = Vocabulary(made)
    tokens = [
        ReplyToken(vocabulary.token_bytes(i), vocabulary.is_special(i))
        for i in made(text, add_special_tokens=False)["input_ids"]
    ]
    parts = parts_of(format_of(made), prompt, tokens, tools)
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert not tokens or parts[-1].end == len(tokens)
    return parts


def brief(parts: Sequence[Part]) -> list[tuple[Any, ...]]:
    return [
        (p.kind, p.text) if p.kind != "tool_call" else (p.kind, p.name, p.arguments) for p in parts
    ]


def segments(prompt: Any) -> dict[str, str]:
    """The text of each segment of the prompt."""
    found: dict[str, str] = {}
    for token, segment in zip(prompt.tokens, prompt.segments, strict=True):
        found[segment] = found.get(segment, "") + token
    return found


HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>")


def test_harmony_channels_are_parts() -> None:
    made = tokenizer(HARMONY, *HARMONY_TOKENS)
    text = (
        "<|channel|>analysis<|message|>User asks capital.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Paris.<|return|>"
    )
    parts = read(made, text)
    assert brief(parts) == [("thinking", "User asks capital."), ("answer", "Paris.")]
    said = ChatMessage(Role.ASSISTANT, answer_of(parts), parts)
    prompt = render(made, [HELLO, said, AGAIN])
    right = [
        {"role": "user", "content": HELLO.content},
        {"role": "assistant", "content": "Paris.", "thinking": "User asks capital."},
        {"role": "user", "content": AGAIN.content},
    ]
    assert prompt.text == made.apply_chat_template(
        right, tokenize=False, add_generation_prompt=True
    )
    assert segments(prompt)["assistant"] == "Paris."


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<|channel|>analysis<|message|>Hm", [("thinking", "Hm")]),
        ("<|channel|>analy", [("thinking", "")]),
        ("<|channel|>final<|message|>Paris", [("answer", "Paris")]),
        ("Paris", [("answer", "Paris")]),
        (
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
            [("thinking", "Hm"), ("tool_call", "get_weather", {"city": "Rome"})],
        ),
        (
            " to=functions.get_weather<|channel|>commentary json<|message|>{}<|call|>",
            [("tool_call", "get_weather", {})],
        ),
    ],
)
def test_harmony_that_is_cut_off_or_calls(text: str, parts: list[tuple[Any, ...]]) -> None:
    assert brief(read(tokenizer(HARMONY, *HARMONY_TOKENS), text)) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "<think>\nFrance.\n</think>\n\nParis.<|im_end|>",
            [("thinking", "France."), ("answer", "Paris.")],
        ),
        ("<think>\nFrance", [("thinking", "France")]),
        ("<think>\n\n</think>\n\nParis.", [("thinking", ""), ("answer", "Paris.")]),
        ("France.\n</think>\n\nParis.", [("thinking", "France."), ("answer", "Paris.")]),
        (" Paris.\n", [("answer", " Paris.\n")]),
        ("<|im_end|>", [("answer", "")]),
        (
            "<think>\nHm\n</think>\n\nLet me look.\n<tool_call>\n"
            '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
            [
                ("thinking", "Hm"),
                ("answer", "Let me look."),
                ("tool_call", "get_weather", {"city": "Rome"}),
                ("tool_call", "get_weather", {"city": "Oslo"}),
            ],
        ),
        ('<tool_call>\n{"name": "get_w', [("tool_call", None, None)]),
        (
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
            [("tool_call", "get_weather", {"city": "Rome"})],
        ),
        (
            "<tool_call>\n<function=get_weather>\n<parameter=days>\n3\n</parameter>\n</function>\n"
            "</tool_call>",
            [("tool_call", "get_weather", {"days": 3})],
        ),
    ],
)
def test_thinking_and_calls_between_tags(text: str, parts: list[tuple[Any, ...]]) -> None:
    assert brief(read(tokenizer(THINK, "<|im_end|>"), text)) == parts


def test_a_reply_that_the_template_opens_as_thinking() -> None:
    made = tokenizer(OPENED, "<|user|>", "<|assistant|>")
    prompt = render(made, [HELLO])
    assert brief(read(made, "France.\n</think>\n\nParis.", prompt.text)) == [
        ("thinking", "France."),
        ("answer", "Paris."),
    ]
    assert brief(read(made, "<think>\nFrance.</think>Paris.", prompt.text)) == [
        ("thinking", "France."),
        ("answer", "Paris."),
    ]
    cut = read(made, "France", prompt.text)
    assert brief(cut) == [("thinking", "France")]
    # The template has no thinking: the turn is empty, and thinking is not an answer.
    said = ChatMessage(Role.ASSISTANT, "", cut)
    assert "France" not in render(made, [HELLO, said, AGAIN]).text.replace(HELLO.content, "")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[THINK]Hm[/THINK]Paris.</s>", [("thinking", "Hm"), ("answer", "Paris.")]),
        (
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}</s>',
            [("tool_call", "get_weather", {"city": "Rome"})],
        ),
        (
            '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]',
            [("tool_call", "a", {"x": 1}), ("tool_call", "b", {})],
        ),
        (
            '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}',
            [("tool_call", "a", {"x": 1}), ("tool_call", "b", {})],
        ),
    ],
)
def test_bracket_markers(text: str, parts: list[tuple[Any, ...]]) -> None:
    assert brief(read(tokenizer(BRACKETS, "[THINK]", "[TOOL_CALLS]", "[ARGS]"), text)) == parts


def test_too_deeply_nested_arguments_are_text() -> None:
    made = tokenizer(THINK, "<|im_end|>")
    deep = "[" * 400 + "]" * 400
    (call,) = read(made, f'<tool_call>{{"name": "f", "arguments": {deep}}}</tool_call>')
    assert (call.kind, call.name) == ("tool_call", None) and deep in call.text
    with pytest.raises(UsageError, match="nested deeper than 50 levels"):
        TemplateOptions({"x": json.loads(deep)})


def test_an_object_is_a_call_if_the_template_and_tools_ask_for_one() -> None:
    made = tokenizer('{# {"name": function name, "parameters": dictionary} #}{{ messages }}')
    text = '{"name": "get_weather", "parameters": {"city": "Rome"}}</s>'
    call = ("tool_call", "get_weather", {"city": "Rome"})
    assert brief(read(made, text, tools=[WEATHER])) == [call]
    assert [part.kind for part in read(made, text)] == ["answer"]
    assert [part.kind for part in read(made, f"See: {text}", tools=[WEATHER])] == ["answer"]


def test_a_marker_that_is_not_in_the_template_is_text() -> None:
    assert brief(read(tokenizer(tiny.CHAT_TEMPLATE), "<think>no</think>")) == [
        ("answer", "<think>no</think>")
    ]


def test_a_declared_format_is_used() -> None:
    made = tokenizer(tiny.CHAT_TEMPLATE, "<R>", "</R>")
    made.response_template = {
        "start_anchor": "assistant:",
        "defaults": {"role": "assistant"},
        "fields": {
            "thinking": {"open": "<R>", "close": "</R>"},
            "tool_calls": {
                "open_pattern": r"<C name=(?P<name>\w+)>",
                "close": "</C>",
                "content": "json",
                "repeats": True,
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            },
            "content": {},
        },
    }
    parts = read(made, "<R>Hm.</R>Paris.</s>", "<s>assistant: ")
    assert [part.kind for part in parts] == ["thinking", "answer"]
    assert parts[0].text == "Hm." and "Paris." in parts[1].text
    call = read(made, '<C name=f>{"x": 1}</C>', "<s>assistant: ")
    assert brief(call) == [("tool_call", "f", {"x": 1})]


CALL = Part("tool_call", "", name="get_weather", arguments={"city": "Rome", "days": 2})


def conversation(content: str = "") -> list[ChatMessage]:
    thinking = Part("thinking", "I need the weather.")
    said = (Part("answer", content),) if content else ()
    return [
        HELLO,
        ChatMessage(Role.ASSISTANT, content, (thinking, *said, CALL)),
        ChatMessage(Role.TOOL, '18 "degrees"', tool_name="get_weather"),
    ]


@pytest.mark.parametrize("template", [THINK, HARMONY, BRACKETS])
def test_thinking_calls_and_answers_of_tools_are_segments(template: str) -> None:
    prompt = render(tokenizer(template), conversation())
    found = segments(prompt)
    assert found["thinking"].strip() == "I need the weather."
    assert found["tool_call"].startswith("get_weather") and found["tool_call"].endswith("}")
    arguments = found["tool_call"][found["tool_call"].index("{") :]
    assert json.JSONDecoder().raw_decode(arguments)[0] == CALL.arguments
    assert '18 "degrees"' in found["tool"].replace("\\", "")
    assert found["user"] == HELLO.content


def test_thinking_of_earlier_turns_is_left_to_the_template() -> None:
    said = ChatMessage(
        Role.ASSISTANT, "Paris.", (Part("thinking", "France."), Part("answer", "Paris."))
    )
    prompt = render(tokenizer(THINK), [HELLO, said, AGAIN])
    assert "<think>" not in prompt.text and segments(prompt)["assistant"] == "Paris."


@pytest.mark.parametrize("template", [LISTS, TEXT_ARGUMENTS])
def test_every_message_appears_whatever_form_the_template_reads(template: str) -> None:
    made = tokenizer(template)
    found = segments(render(made, [HELLO, ChatMessage(Role.ASSISTANT, "Paris."), AGAIN]))
    assert found["user"] == HELLO.content + AGAIN.content and found["assistant"] == "Paris."
    if template is TEXT_ARGUMENTS:
        prompt = render(made, conversation())
        assert '{"city": "Rome", "days": 2}' in prompt.text
        assert segments(prompt)["tool"] == '18 "degrees"'


def test_a_prompt_that_omits_a_message_is_refused() -> None:
    made = tokenizer("{% for m in messages %}<s>{{ m.role }}{% endfor %}")
    with pytest.raises(CaptureError, match="leaves out one of your messages") as refused:
        render(made, [ChatMessage(Role.USER, "user")])
    assert len(str(refused.value).splitlines()) == 1


def test_calls_are_text_for_a_template_without_calls() -> None:
    made = tokenizer("{# <tool_call> #}{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    prompt = render(made, conversation("Let me look."))
    assert "Let me look.\n<tool_call>\n{" in prompt.text
    found = segments(prompt)
    assert found["tool_call"].startswith("get_weather") and found["assistant"] == "Let me look."


def test_arguments_and_tools_go_to_the_template() -> None:
    made = tokenizer(THINK)
    options = TemplateOptions({"enable_thinking": False}, (WEATHER,))
    prompt = render(made, [HELLO], options=options)
    assert prompt.text.endswith("<think>\n\n</think>") and '"get_weather"' in prompt.text
    assert not format_of(made).begins_thinking(prompt.text)
    effort = render(
        tokenizer(HARMONY), [HELLO], options=TemplateOptions({"reasoning_effort": "low"})
    )
    assert "Reasoning: low" in effort.text


def test_options_that_the_template_ignores_are_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"no argument enable_thinkng\. It reads enable_thinking"
    ):
        render(tokenizer(THINK), [HELLO], options=TemplateOptions({"enable_thinkng": False}))
    with pytest.raises(CaptureError, match="accepts no tools"):
        render(tokenizer(BRACKETS), [HELLO], options=TemplateOptions({}, (WEATHER,)))
    with pytest.raises(CaptureError, match="has no chat template"):
        render(tokenizer(None), [HELLO], options=TemplateOptions({"x": 1}))
    with pytest.raises(UsageError, match="tokenize is no argument"):
        TemplateOptions({"tokenize": True})
    with pytest.raises(UsageError, match="Each tool must be"):
        TemplateOptions({}, ({"name": "f"},))


def test_a_last_reply_is_continued() -> None:
    begun = ChatMessage(Role.ASSISTANT, "The capital is")
    for template in (tiny.CHAT_TEMPLATE, THINK):
        prompt = render(tokenizer(template), [HELLO, begun])
        assert prompt.text.endswith("The capital is")
    assert render(tokenizer(None), [HELLO, begun]).text.endswith("ASSISTANT: The capital is")


@pytest.mark.parametrize("reply", [" Paris.", "Paris.", "\nParis.", "  Paris \n"])
def test_plain_turns_begin_with_the_earlier_turns(reply: str) -> None:
    """Without a template, turn 2 begins with turn 1's exact tokens."""
    made = tokenizer(None)
    first = render(made, [HELLO])
    ids = made(first.text + reply, add_special_tokens=False)["input_ids"][len(first) :]
    vocabulary = Vocabulary(made)
    parts = parts_of(
        format_of(made), first.text, [ReplyToken(vocabulary.token_bytes(i), False) for i in ids]
    )
    second = render(made, [HELLO, ChatMessage(Role.ASSISTANT, reply, parts), AGAIN])
    assert second.text.startswith(first.text + reply + "\n\nUSER:")
    assert list(second.token_ids[: len(first) + len(ids)]) == [*first.token_ids, *ids]
    assert segments(second)["assistant"] == reply


def test_a_plain_prompt_has_the_bos_token_and_no_eos_token() -> None:
    made = tokenizer(None)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    prompt = render(made, [HELLO])
    assert prompt.token_ids[0] == 0 and prompt.token_ids[-1] != 1
    assert list(prompt.token_ids).count(0) == 1 and 1 not in prompt.token_ids


def test_text_is_streamed_with_its_kind() -> None:
    made = tokenizer(THINK, "<|im_end|>")
    text = ReplyText(made)
    told: list[tuple[str, str]] = []
    vocabulary = Vocabulary(made)
    text.replies_to(Prompt("", (), (), ()), (), 0, vocabulary)
    written = "<think>\nFrance, I think.\n</think>\n\nThe capital of France is Paris.<|im_end|>"
    for i in made(written, add_special_tokens=False)["input_ids"]:
        text.push_token(i, vocabulary.token_bytes(i), vocabulary.is_special(i))
        told += text.fresh()
    output, parts = text.finish()
    told += text.rest()
    assert output == "The capital of France is Paris." and len(parts) == 2
    for kind, whole in (("thinking", "France, I think."), ("answer", output)):
        assert "".join(piece for piece, of in told if of == kind) == whole


@pytest.mark.parametrize("kept", [0, 3, 9, 14])
def test_a_branch_has_the_parts_of_the_whole_reply_and_streams_what_is_new(kept: int) -> None:
    made = tokenizer(THINK, "<|im_end|>")
    vocabulary = Vocabulary(made)
    written = "<think>\nFrance, I think.\n</think>\n\nThe capital of France is Paris.<|im_end|>"
    ids = made(written, add_special_tokens=False)["input_ids"]
    whole = ReplyText(made)
    whole.replies_to(Prompt("", (), (), ()), (), 0, vocabulary)
    branch = ReplyText(made)
    prefix = tuple(ids[:kept])
    tokens = tuple(vocabulary.text(i) for i in prefix)
    text = "".join(tokens)
    prompt = Prompt("Hello" + text, (5, *prefix), ("Hello", *tokens), ("user",) * (kept + 1))
    told = branch.replies_to(prompt, (), kept, vocabulary)
    assert told == "".join(
        t for i, t in zip(prefix, tokens, strict=True) if not vocabulary.is_special(i)
    )
    streamed = ""
    for at, i in enumerate(ids):
        one = (i, vocabulary.token_bytes(i), vocabulary.is_special(i))
        whole.push_token(*one)
        if at >= kept:
            branch.push_token(*one)
            streamed += "".join(piece for piece, _ in branch.fresh())
    output, parts = whole.finish()
    assert branch.finish()[0] == output
    streamed += "".join(piece for piece, _ in branch.rest())
    shown = "".join(part.text for part in parts)
    assert shown.endswith(streamed) and (len(streamed) == len(shown)) is (kept < 2)
    for one, two in zip(parts, branch.finish()[1], strict=True):
        assert (one.kind, one.text) == (two.kind, two.text)
        assert (max(one.start - kept, 0), max(one.end - kept, 0)) == (two.start, two.end)
