"""Every token has a name of its own."""

from __future__ import annotations

import pytest
from reference.small_tokenizers import TOKENIZERS, byte_level, sentencepiece
from reltrace_worker.models.vocabulary import Vocabulary


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_name_is_given_back_as_its_token(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    vocabulary = Vocabulary(tokenizer)
    # Some beyond the tokenizer's too: a model's vocabulary may be the larger one.
    ids = range(len(tokenizer) + 5)
    names = vocabulary.texts(ids)
    assert len(set(names)) == len(names)
    assert [vocabulary.find(name) for name in names] == list(ids)


def test_names_are_what_tokens_say() -> None:
    tokenizer = sentencepiece()
    vocabulary = Vocabulary(tokenizer)

    def names(*pieces: str) -> tuple[str, ...]:
        return vocabulary.texts(tokenizer.convert_tokens_to_ids(list(pieces)))

    assert names("s", "▁s", "▁dogs", "▁", "▁▁") == ("s", " s", " dogs", " ", "  ")
    # Two tokens that say the same: the plain one has the text, the byte keeps its own name.
    assert names("\n", "<0x0A>", "a", "<0x61>") == ("\n", "<0x0A>", "a", "<0x61>")
    assert names("<s>", "<0xC3>", "é") == ("<s>", "<0xC3>", "é")
    assert vocabulary.text(len(tokenizer)) == f"<{len(tokenizer)}>"


def test_a_part_of_a_character_is_named_by_its_bytes() -> None:
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    vocabulary = Vocabulary(tokenizer)
    # The byte C3 is written "Ã" in the vocabulary, which reads as a letter.
    part = backend.token_to_id("Ã")
    assert (vocabulary.text(part), vocabulary.find("<0xC3>")) == ("<0xC3>", part)
    assert vocabulary.find("Ã") is None
    # Unless a token has that very text.
    tokenizer.add_tokens(["<0xC3>"])
    again = Vocabulary(tokenizer)
    assert again.text(part) == f"<{part}>"
    assert again.find("<0xC3>") == backend.token_to_id("<0xC3>") != part


@pytest.mark.parametrize("text", ["", "no such token", "<5>", "<99999999999>", "\ufffd"])
def test_what_names_no_token(text: str) -> None:
    assert Vocabulary(byte_level()).find(text) is None


def test_texts_that_are_written_keep_their_first_space() -> None:
    tokenizer = sentencepiece()
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["▁dogs", "▁and", "▁▁", "▁cats", "</s>"])
    assert vocabulary.decoded(ids) == " dogs and   cats"
    assert vocabulary.joined(ids) == " dogs and   cats</s>"
    assert vocabulary.decoded([]) == ""
    assert vocabulary.decoded([2]) == ""
