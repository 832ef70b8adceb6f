"""What text becomes, and which characters each token holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.small_tokenizers import TOKENIZERS, byte_level, sentencepiece
from reltrace_worker.models.text import Encoded, TextEncoder
from reltrace_worker.models.vocabulary import Vocabulary

PARTS = ["dogs", " dogs", "cats", " and ", "  ", "\n", "é", "😀", "東", "<s>", "s", "Ã", "e\u0301"]


def names(tokenizer: Any, encoded: Encoded) -> list[str]:
    return list(Vocabulary(tokenizer).texts(encoded.token_ids))


def pieces(encoded: Encoded) -> list[str]:
    return [encoded.text[first:stop] for first, stop in encoded.offsets]


def check_spans(tokenizer: Any, encoded: Encoded) -> None:
    """The spans cover the text, without gaps and in order, and hold what their tokens say."""
    at = 0
    for span in dict.fromkeys(encoded.offsets):
        assert span[0] == at
        at = span[1]
    assert at == len(encoded.text)
    backend = tokenizer.backend_tokenizer
    for place, (token, name) in enumerate(zip(encoded.token_ids, pieces(encoded), strict=True)):
        # A token that shares its characters says less than them.
        if encoded.offsets.count(encoded.offsets[place]) == 1 and name:
            said = Vocabulary(tokenizer).joined([token])
            # SentencePiece reads "▁" as a space, and puts one before a text that is not in it.
            spaced = name.replace("▁", " ") if "▁" in backend.id_to_token(token) else name
            assert said in (name, spaced) or (said == f" {spaced}" and place <= 1), token


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8"), max_size=8))
def test_spans_of_text_cover_it(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts)
    encoder = TextEncoder(tokenizer)
    for special in (True, False):
        encoded = encoder.encode(text, special=special)
        assert encoded.text.endswith(text)
        check_spans(tokenizer, encoded)
    assert encoded.text == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8"), max_size=8))
def test_spans_of_ids_cover_their_text(tokenizer: Any, parts: list[str]) -> None:
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode("".join(parts), special=True).token_ids
    encoded = encoder.decode(ids)
    assert encoded.token_ids == ids
    assert encoded.text == tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    check_spans(tokenizer, encoded)


def test_ids_that_are_no_text_are_shown_as_such() -> None:
    tokenizer = byte_level()
    token = tokenizer.convert_tokens_to_ids
    part, letter = token("Ã"), token("a")
    encoder = TextEncoder(tokenizer)
    for ids in ([part], [part] * 40, [part, letter], [letter, part], [9999, letter]):
        encoded = encoder.decode(ids)
        assert encoded.text == tokenizer.backend_tokenizer.decode(ids)
        assert len(encoded.offsets) == len(ids)
        assert encoded.offsets[-1][1] == len(encoded.text)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_tokens_that_share_a_character_have_its_whole_span(make: Callable[[], Any]) -> None:
    tokenizer = make()
    encoded = TextEncoder(tokenizer).encode("s 鳥 s", special=False)
    of_it = [span for span in encoded.offsets if encoded.text[slice(*span)].strip() == "鳥"]
    assert len(of_it) >= 3
    assert len(set(of_it)) == 1
    assert TextEncoder(tokenizer).decode(encoded.token_ids) == encoded


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("<s> $A", ["<s>"]),
        ("<s> $A </s>", ["<s>"]),
        ("$A </s>", []),
        ("$A", []),
        ("<s> <|im_start|> $A <|im_end|> </s>", ["<s>", "<|im_start|>"]),
    ],
)
def test_what_is_in_front_of_a_text_is_there_once_and_nothing_is_behind(
    template: str, prefix: list[str]
) -> None:
    tokenizer = byte_level(template)
    encoder = TextEncoder(tokenizer)

    def read(text: str, *, special: bool = True) -> tuple[list[str], str]:
        encoded = encoder.encode(text, special=special)
        return names(tokenizer, encoded), encoded.text

    start = "".join(prefix)
    assert read(" cats") == ([*prefix, " cats"], start + " cats")
    assert read(" cats", special=False) == ([" cats"], " cats")
    # It has them already, or the last of them.
    for have in range(len(prefix)):
        text = "".join(prefix[have:]) + " cats"
        assert read(text) == ([*prefix, " cats"], start + " cats")
        assert read(text, special=False)[1] == text


def test_a_text_that_begins_like_the_prefix_is_as_it_was_given() -> None:
    tokenizer = byte_level("<s> <|im_start|> $A")
    encoded = TextEncoder(tokenizer).encode("<s> cats", special=True)
    assert names(tokenizer, encoded) == ["<s>", " cats"]


def test_runs_of_spaces_are_exact() -> None:
    for make in TOKENIZERS.values():
        tokenizer = make()
        encoder = TextEncoder(tokenizer)
        text = "dogs   and  dogs    \n  s"
        assert encoder.encode(text, special=False).text == text
        ids = encoder.encode(text, special=False).token_ids
        assert Vocabulary(tokenizer).joined(ids).removeprefix(" ") == text


def test_a_continuation_is_encoded_with_its_prompt() -> None:
    """
    Given a tokenizer that puts a space before a text
    If a continuation begins with one
    I expect the tokens that are in the text, and none between.
    """
    tokenizer = sentencepiece()
    encoder = TextEncoder(tokenizer)
    prompt = encoder.joined("dogs", " dogs and cats", special=True)
    assert prompt.length == 2
    assert tokenizer.convert_ids_to_tokens(prompt.continuation) == ["▁dogs", "▁and", "▁cats"]
    assert prompt.hints == ()
    # Within a word no space comes in.
    prompt = encoder.joined("dog", "s and", special=True)
    assert pieces(prompt.encoded) == ["<s>", "dogs", " and"]
    assert prompt.length == 1
    (hint,) = prompt.hints
    assert "' dogs' holds 'dog' of the prompt" in hint


def test_a_continuation_may_begin_within_a_token() -> None:
    tokenizer = byte_level()
    encoder = TextEncoder(tokenizer)
    whole = encoder.encode("My cats", special=True)
    for cut in (4, 5, 6):
        prompt = encoder.joined("My cats"[:cut], "My cats"[cut:], special=True)
        assert prompt.encoded == whole
        assert prompt.encoded.text[prompt.encoded.offsets[prompt.length][0] :] == " cats"
        assert prompt.hints
    prompt = encoder.joined("My", " cats", special=True)
    assert (prompt.encoded, prompt.hints) == (whole, ())
    # A space at the prompt's end belongs to the word that follows it.
    prompt = encoder.joined("My ", "cats", special=True)
    assert prompt.encoded == whole
    assert Vocabulary(tokenizer).texts(prompt.continuation) == (" cats",)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_continuation_of_ids_stands_behind_the_prompt(make: Callable[[], Any]) -> None:
    tokenizer = make()
    encoder = TextEncoder(tokenizer)
    whole = encoder.encode("dogs and cats é東", special=True)
    # Right behind a BOS the space of SentencePiece would be written.
    for cut in range(2, len(whole.token_ids)):
        prompt = encoder.appended(whole.up_to(cut), whole.token_ids[cut:])
        assert prompt.encoded.token_ids == whole.token_ids
        assert prompt.continuation == whole.token_ids[cut:]
        if whole.up_to(cut).offsets[-1] != whole.offsets[cut]:
            assert prompt.encoded == whole


def test_a_continuation_of_text_behind_ids() -> None:
    tokenizer = sentencepiece()
    encoder = TextEncoder(tokenizer)
    ids = encoder.decode(encoder.encode("dogs", special=True).token_ids)
    prompt = encoder.appended(ids, " and cats")
    assert tokenizer.convert_ids_to_tokens(prompt.continuation) == ["▁and", "▁cats"]
    assert prompt.hints == ()
    # Ids that the tokenizer does not give for their text.
    ids = encoder.decode(tokenizer.convert_tokens_to_ids(["▁", "d", "o", "g"]))
    prompt = encoder.appended(ids, " and")
    assert tokenizer.convert_ids_to_tokens(prompt.continuation) == ["▁and"]
    assert "encoded alone" in prompt.hints[0]


def test_a_file_that_cuts_and_pads_texts_does_not_cut_and_pad_prompts() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    encoded = TextEncoder(tokenizer).encode("My cats love to play", special=True)
    assert encoded.text == "<s>My cats love to play"
    assert "".join(pieces(encoded)) == encoded.text
