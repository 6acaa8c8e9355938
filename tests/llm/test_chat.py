"""The prompt is written by the model's own template, and each token belongs to its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from oki_trace.errors import CaptureError
from oki_trace.llm.chat.prompt import render
from oki_trace.records import ChatMessage, Prompt, Role
from tests import tiny

SYSTEM = ChatMessage(Role.SYSTEM, "You are brief.")
HELLO = ChatMessage(Role.USER, "Hello there")
REPLY = ChatMessage(Role.ASSISTANT, "General Kenobi")
AGAIN = ChatMessage(Role.USER, "Again?")

# Llama 2 writes the system message into the first user message.
MERGING = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n"
    "<</SYS>>\n\n{% endif %}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
REFUSING_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported.') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def with_bos(chat_template: str | None) -> Any:
    """A tokenizer that puts ``<s>`` before every text, as Llama's does."""
    tokenizer = tiny.tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def said_by(prompt: Prompt, tokenizer: Any) -> dict[str, str]:
    """The text of all tokens of each segment, as the tokenizer decodes it."""
    return {
        segment: tokenizer.decode(
            [
                i
                for i, of in zip(prompt.token_ids, prompt.segments, strict=True)
                if of == segment and i not in tokenizer.all_special_ids
            ]
        )
        for segment in dict.fromkeys(prompt.segments)
    }


def test_the_models_own_template_is_used(smollm2_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [SYSTEM, HELLO, REPLY, AGAIN]
    prompt = render(tokenizer, messages)
    turns = [{"role": str(m.role), "content": m.content} for m in messages]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert list(prompt.token_ids) == list(expected["input_ids"])
    assert prompt.text.startswith("<|im_start|>system\nYou are brief.<|im_end|>\n")
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert "".join(prompt.tokens) == prompt.text
    assert len(prompt) == len(prompt.tokens) == len(prompt.segments)


def test_without_a_template_the_plain_form_is_used() -> None:
    prompt = render(tiny.tokenizer(None), [SYSTEM, HELLO, REPLY, AGAIN])
    assert prompt.text == (
        "SYSTEM: You are brief.\n\nUSER: Hello there\n\nASSISTANT: General Kenobi\n\n"
        "USER: Again?\n\nASSISTANT:"
    )
    assert "".join(prompt.tokens) == prompt.text


@pytest.mark.parametrize("template", [None, tiny.CHAT_TEMPLATE])
def test_the_text_begins_with_one_bos(template: str | None) -> None:
    """A template writes it itself; without a template, the tokenizer adds it."""
    prompt = render(with_bos(template), [HELLO])
    assert prompt.tokens[:2] != ("<s>", "<s>")
    assert prompt.tokens[0] == "<s>"
    assert prompt.tokens.count("<s>") == (1 if template is None else 2), "a turn begins with it too"


def test_a_refused_system_message_has_a_fix() -> None:
    tokenizer = tiny.tokenizer(REFUSING_SYSTEM)
    assert render(tokenizer, [HELLO]).text == "Hello there"
    with pytest.raises(CaptureError) as caught:
        render(tokenizer, [SYSTEM, HELLO])
    assert str(caught.value) == (
        "The model's chat template refused the messages: System role not supported. "
        "Leave out the system message, or fix chat_template.jinja in the model's folder."
    )


def test_a_refused_order_of_roles_has_a_fix() -> None:
    with pytest.raises(CaptureError) as caught:
        render(tiny.tokenizer(ALTERNATING), [HELLO, AGAIN])
    assert str(caught.value) == (
        "The model's chat template refused the messages: Conversation roles must alternate. "
        "Begin a new conversation, or fix chat_template.jinja in the model's folder."
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }",
        "{% for m in messages %}",
        "{{ no_such_function(messages) }}",
        "{{ messages[9]['content'] }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages.no_such_method() }}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
    ],
)
def test_a_broken_template_is_one_line_that_names_the_fix(template: str) -> None:
    with pytest.raises(CaptureError) as caught:
        render(tiny.tokenizer(template), [HELLO])
    message = str(caught.value)
    assert message.startswith("The model's chat template refused the messages: ")
    assert message.endswith("or fix chat_template.jinja in the model's folder.")
    assert "\n" not in message


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"The prompt has no tokens\. Give it some text\."):
        render(tiny.tokenizer("{{ '' }}"), [HELLO])


def test_half_a_character_is_refused() -> None:
    """It comes from bytes on a command line that are not UTF-8, or from broken JSON."""
    with pytest.raises(CaptureError, match=r"contains '\\udcff', a lone surrogate"):
        render(tiny.tokenizer(), [ChatMessage(Role.USER, "caf\udcff")])


def test_a_long_prompt_prints_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    """A prompt that is too long is refused later; transformers' warning says less."""
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 8
    assert len(render(tokenizer, [ChatMessage(Role.USER, "word " * 20)])) > 8
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("template", [None, tiny.CHAT_TEMPLATE, MERGING])
def test_segments_are_of_the_message_whose_text_they_show(template: str | None) -> None:
    tokenizer = tiny.tokenizer(template)
    prompt = render(tokenizer, [SYSTEM, HELLO, REPLY, AGAIN])
    said = said_by(prompt, tokenizer)
    assert said["system"].strip() == SYSTEM.content
    assert said["user"].replace(" ", "") == (HELLO.content + AGAIN.content).replace(" ", "")
    assert said["assistant"].strip() == REPLY.content
    for message in (SYSTEM, HELLO, REPLY, AGAIN):
        assert message.content not in said["template"]


@pytest.mark.parametrize("content", ["user", "s", "assistant: ", "system", "a", ":"])
@pytest.mark.parametrize("template", [None, tiny.CHAT_TEMPLATE])
def test_a_message_is_not_found_inside_the_templates_words(
    template: str | None, content: str
) -> None:
    tokenizer = tiny.tokenizer(template)
    prompt = render(tokenizer, [SYSTEM, ChatMessage(Role.USER, content)])
    marked = render(tokenizer, [SYSTEM, ChatMessage(Role.USER, "§")])
    assert prompt.segments.index("user") == marked.segments.index("user")
    assert said_by(prompt, tokenizer)["user"].strip() == content.strip()


def test_a_default_system_message_is_the_templates(smollm2_dir: Path) -> None:
    """Without a system message, SmolLM2's template writes its own; "a" occurs in it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    prompt = render(tokenizer, [ChatMessage(Role.USER, "a")])
    (at,) = [i for i, of in enumerate(prompt.segments) if of == "user"]
    assert prompt.tokens[at - 1 : at + 2] == ("\n", "a", "<|im_end|>")
    assert "system" not in prompt.segments


def test_a_trimmed_message_is_found() -> None:
    tokenizer = tiny.tokenizer(MERGING)
    prompt = render(tokenizer, [ChatMessage(Role.USER, "  spaced out \n")])
    assert said_by(prompt, tokenizer)["user"].strip() == "spaced out"


def test_a_rewritten_message_is_found_by_the_text_after_it() -> None:
    """Templates of reasoning models remove the thinking from earlier replies."""
    template = (
        "{% for m in messages %}[{{ m['content'].split('</think>')[-1] | upper }}]\n{% endfor %}:"
    )
    tokenizer = tiny.tokenizer(template)
    messages = [HELLO, ChatMessage(Role.ASSISTANT, "hm </think>yes"), AGAIN]
    prompt = render(tokenizer, messages)
    assert prompt.text == "[HELLO THERE]\n[YES]\n[AGAIN?]\n:"
    assert said_by(prompt, tokenizer) == {
        "template": "[]\n[]\n[]\n:",
        "user": "HELLO THEREAGAIN?",
        "assistant": "YES",
    }


def test_text_that_is_not_found_gets_no_segment() -> None:
    """The template changes all of the content and writes nothing after it."""
    prompt = render(tiny.tokenizer("{{ messages[0]['content'] | upper }}"), [HELLO])
    assert prompt.text == "HELLO THERE" and set(prompt.segments) == {"template"}


def test_unreadable_text_of_a_template_is_refused() -> None:
    backwards = "{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}"
    with pytest.raises(CaptureError, match="leaves out one of your messages"):
        render(tiny.tokenizer(backwards), [HELLO])


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ).filter(lambda texts: all(text.strip() for text in texts)),
    plain=st.booleans(),
)
def test_any_contents_are_found_where_they_are(contents: list[str], plain: bool) -> None:
    roles = (Role.USER, Role.ASSISTANT)
    messages = [ChatMessage(roles[i % 2], text) for i, text in enumerate(contents)]
    tokenizer = tiny.tokenizer(None if plain else tiny.CHAT_TEMPLATE)
    prompt = render(tokenizer, messages)
    for role in roles:
        said = [m.content for m in messages if m.role is role]
        ids = [
            i for i, of in zip(prompt.token_ids, prompt.segments, strict=True) if of == role.value
        ]
        # A token that reaches over the edge of a message belongs to it:
        # a space, or a line end of the template.
        inside = tokenizer.decode(ids)
        at = 0
        for text in said:
            found = inside.find(text, at)
            assert found >= at
            assert not inside[at:found].strip()
            at = found + len(text)
        assert not inside[at:].strip()
