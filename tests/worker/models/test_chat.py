"""Conversations by a chat template, and where each turn is."""

from __future__ import annotations

from typing import Any

import pytest
from reference.chat_templates import CHATML, REASONING, STRICT
from reference.small_tokenizers import byte_level
from reltrace_worker.models import chat as chats
from reltrace_worker.models.chat import RenderedChat, render
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.jobs import Chat, Message


def tokenizer(template: str | None) -> Any:
    found = byte_level()
    found.chat_template = template
    return found


def rendered(template: str, *messages: tuple[str, str]) -> tuple[str, list[str]]:
    found: RenderedChat = render(tokenizer(template), chat(*messages))
    return found.text, [found.text[first:stop] for first, stop in found.contents]


def chat(*messages: tuple[str, str]) -> Chat:
    return Chat(tuple(Message(role, content) for role, content in messages))


def refused(template: str | None, *messages: tuple[str, str]) -> str:
    with pytest.raises(InvalidJob) as caught:
        render(tokenizer(template), chat(*messages))
    (fault,) = caught.value.violations
    assert fault.field == "messages"
    return fault.description


def test_contents_are_found_by_their_place_and_not_by_their_words() -> None:
    """Each of them is somewhere in the template's own marks as well."""
    text, contents = rendered(CHATML, ("user", "a"), ("assistant", "user"), ("user", "cat"))
    assert text.startswith("<|im_start|>system\nYou are a cat<|im_end|>\n<|im_start|>user\na<|im")
    assert text.endswith("<|im_start|>assistant\n")
    assert contents == ["a", "user", "cat"]
    found = render(tokenizer(CHATML), chat(("user", "a"), ("assistant", "user"), ("user", "cat")))
    for (first, _), role in zip(found.contents, ("user", "assistant", "user"), strict=True):
        assert found.text[:first].endswith(f"<|im_start|>{role}\n")


def test_white_space_around_a_content_is_not_of_it() -> None:
    text, contents = rendered(CHATML, ("system", " \n"), ("user", "\n two words\n\n"))
    assert "user\n\n two words\n\n<|im_end|>" in text
    assert contents == ["", "two words"]
    text, contents = rendered(STRICT, ("system", "a "), ("user", " a"), ("assistant", " b "))
    assert text == "<s>[user] a / a [assistant] b [assistant]"
    assert contents == ["a", "a", "b"]
    found = render(tokenizer(STRICT), chat(("system", "a"), ("user", "a")))
    assert found.contents == ((10, 11), (14, 15))


def test_a_template_that_looks_at_what_a_message_says() -> None:
    text, contents = rendered(
        REASONING, ("user", "/help"), ("assistant", "<think>\nhm\n</think>\n\nHi"), ("user", "Hi")
    )
    assert "(command) /help" in text
    assert "hm" not in text
    # What is left of a message is not what it said: its turn has no tokens.
    assert contents == ["/help", "", "Hi"]


def test_what_a_template_leaves_out_has_no_place() -> None:
    text, contents = rendered("{{ messages[-1].content }}>", ("user", "one"), ("user", "two"))
    assert (text, contents) == ("two>", ["", "two"])


def test_marks_in_a_message_are_text() -> None:
    content = "a\ufdd0b\ufdd1<|im_end|>"
    text, contents = rendered(CHATML, ("user", content), ("user", content))
    assert text.count(content) == 2
    assert contents == [content, content]


def test_what_is_refused() -> None:
    assert refused(None, ("user", "a")) == (
        "need a chat template, and the model has none; give a prompt"
    )
    assert refused(CHATML).startswith("are none")
    assert refused(STRICT, ("user", "a"), ("user", "b")) == (
        "are not what the model's chat template takes: "
        "Roles must alternate user/assistant/user/assistant/..."
    )
    assert "template" in refused("{{ messages[0].content + 1 }}", ("user", "a"))
    assert "template" in refused("{{ nobody.knows }}", ("user", "a"))


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"]
)
def test_a_template_is_in_a_sandbox(template: str) -> None:
    assert "chat template" in refused(template, ("user", "a"))


def test_a_chat_that_grows_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "MAX_CHARACTERS", 99)
    assert refused("{{ messages[0].content * 50 }}", ("user", "ab")) == (
        "are 100 characters as text; at most 99 are allowed"
    )
