"""Tokens of every kind of tokenizer, as people read them."""

from __future__ import annotations

import pytest
from reltrace.types import token_text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("Ġcats", " cats"),
        ("▁cats", " cats"),
        ("Ċ", "↵"),
        ("a\x1b[0m", "a\\x1b[0m"),
        ("ü", "ü"),
        ("ä½łå¥½", "你好"),
        ("âĢĻs", "’s"),
        ("ä½", "ä½"),
        ("Ã¼ber", "über"),
        ("猫", "猫"),
        ("", ""),
        ("a\u3000b\u00a0c\u2009", "a b c "),
        # A space that is not broken, as byte-level tokenizers write it; and a Maltese letter.
        ("Âł", " "),
        ("Äł", "Ġ"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("a\r\n\tb", "a\\r↵→b"),
        ("<0x0A>", "↵"),
        ("<0xE3>", "<0xE3>"),
        ("\u202eab\u2066\u200f\ufeff", "\\u202eab\\u2066\\u200f\\ufeff"),
    ],
)
def test_readable(token: str, shown: str) -> None:
    assert token_text.readable(token) == shown


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("Ġ", "␣"),
        ("\u3000\u3000", "␣␣"),
        ("\u200c", "\\u200c"),
        (" \u200d", "␣\\u200d"),
        ("Ġa", " a"),
    ],
)
def test_a_name_can_be_seen(token: str, name: str) -> None:
    assert token_text.visible_token(token) == name


def test_a_part_of_a_text_is_shown_as_in_the_whole() -> None:
    # Whether white space is marked is told by a token outside of the part.
    for tokens in (["Ġa", "b", "c", "d"], ["a", "b", "c", "d"]):
        assert token_text.readable_all(tokens, slice(1, 3)) == token_text.readable_all(tokens)[1:3]
    assert token_text.readable_all(["a", "b"], slice(1, 2)) == ["b "]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], [" a", "😀", "₂", "₃", "₄"]),
        (["▁a", "<0xF0>", "<0x9F>", "▁b"], [" a", "<0xF0>", "<0x9F>", " b"]),
        ([" a", "<0xE4BD>", "<0xA0E5>", "<0xA5BD>", " b"], [" a", "你好", "₂", "₃", " b"]),
        ([" caf", "<0xC3>", "é"], [" caf", "<0xC3>", "é"]),
        (["Ġa", "ä½łå", "¥½"], [" a", "你好", "₂"]),
        (["Ġa", "ä½", "łå", "¥½"], [" a", "你好", "₂", "₃"]),
        (["Ġa", "ĠcafÃ", "Ġb"], [" a", r" caf\xc3", " b"]),
        (["Ã", "b"], ["Ã ", "b "]),
        (["▁a", "é", "t"], [" a", "é", "t"]),
        (["ĠH", "âĤĤ", "O"], [" H", "₂", "O"]),
    ],
)  # fmt: skip
def test_bytes_are_put_together_where_they_make_characters(
    tokens: list[str], shown: list[str]
) -> None:
    assert token_text.readable_all(tokens) == shown


def test_a_part_of_a_text_may_begin_within_a_character() -> None:
    tokens = ["<s>", "Ġmy", "ĠcafÃ", "©", "ĠðŁ", "ĺ", "Ģ", "Ġyou", "å¥", "½"]
    shown = ["<s>", " my", " café", "₂", " 😀", "₂", "₃", " you", "好", "₂"]
    for start in range(len(tokens)):
        for stop in range(start, len(tokens) + 1):
            assert token_text.readable_all(tokens, slice(start, stop)) == shown[start:stop]
