"""The shipped model: it answers, its relevance points to the answer, and it is small."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_model import corpus, tokenizer
from demo_model.measure import Outcome, by_family, measure, score
from reltrace_worker import demo
from reltrace_worker.models import LoadedModel, load_model
from transformers import AutoTokenizer

SENTENCES = 450
SEED = 20  # not the seed of the model card: other held-out sentences
TEXTS_OF_OTHERS = (
    "Grüße aus Köln, señor!",
    "東京は晴れ。 Привет, мир",
    "🐈‍⬛ meets 🐕: naïve café",
    "tabs\tand\nlines  and   spaces ",
    "x = {'a': [1, 2.5e-3]}  # code",
    "\x00 control \x7f",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo.path()


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), dtype="float32", device="cpu", name=demo.DEMO_MODEL)


@pytest.fixture(scope="module")
def outcomes(loaded: LoadedModel) -> list[Outcome]:
    return measure(loaded, corpus.held_out(SENTENCES, SEED))


def test_it_completes_the_example(loaded: LoadedModel) -> None:
    example = corpus.example()
    assert example.prompt == "I have 5 cats and 3 dogs. My cats love to play with my"
    [outcome] = measure(loaded, [example])
    assert outcome.predicted == "dogs"
    assert outcome.answered
    assert outcome.located


def test_it_asks_which_animal(loaded: LoadedModel) -> None:
    # The same facts with the question turned round: "dogs" is not simply its favourite.
    prompt = "I have 5 cats and 3 dogs. My dogs love to play with my"
    start = prompt.index("cats")
    turned = corpus.Example(prompt, "cats", "pets", (start, start + 4), ("cats", "dogs"))
    [outcome] = measure(loaded, [turned])
    assert outcome.predicted == "cats"


def test_accuracy_on_held_out_sentences(outcomes: list[Outcome]) -> None:
    assert score(outcomes).accuracy >= 0.95


def test_localization_on_held_out_sentences(outcomes: list[Outcome]) -> None:
    assert score(outcomes).localization >= 0.90


def test_no_family_is_left_behind(outcomes: list[Outcome]) -> None:
    for name, part in by_family(outcomes).items():
        assert part.sentences >= 30
        assert part.accuracy >= 0.80, name
        assert part.localization >= 0.80, name


def test_the_measure_can_fail(loaded: LoadedModel) -> None:
    # A sentence whose "answer" and deciding word are the wrong ones must count against the model.
    example = corpus.example()
    start = example.prompt.index("have")
    wrong = corpus.Example(example.prompt, "have", "pets", (start, start + 4), ("cats", "dogs"))
    [outcome] = measure(loaded, [wrong])
    assert not outcome.answered
    assert not outcome.located


def test_the_folder_is_small_and_complete(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000


def test_the_card_tells_how_it_was_made(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "python -m demo_model.train --seed 0" in card
    assert "| **all** |" in card


def test_every_word_of_the_corpus_is_one_token(folder: Path) -> None:
    encode = AutoTokenizer.from_pretrained(folder)
    words = [word for word in corpus.vocabulary() if word.isalnum()]
    assert len(words) > 400
    for word in words:
        bare = encode(word, add_special_tokens=False).input_ids
        assert len(bare) == 1
        assert encode(f" {word}", add_special_tokens=False).input_ids == bare
        assert encode.convert_ids_to_tokens(bare) == [f"Ġ{word}"]


def test_a_prompt_begins_with_the_begin_of_text_token(folder: Path) -> None:
    encode = AutoTokenizer.from_pretrained(folder)
    ids = encode("I have 5 cats.").input_ids
    assert encode.convert_ids_to_tokens(ids) == [
        "<|begin_of_text|>", "ĠI", "Ġhave", "Ġ5", "Ġcats", ".",
    ]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS_OF_OTHERS)
def test_any_text_survives_the_round_trip(folder: Path, text: str) -> None:
    encode = AutoTokenizer.from_pretrained(folder)
    ids = encode(text, add_special_tokens=False).input_ids
    assert encode.unk_token_id is None
    # The tokenizer puts one space before a text that has none.
    assert encode.decode(ids) == (text if text.startswith(" ") else f" {text}")


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(folder: Path) -> None:
    shipped = AutoTokenizer.from_pretrained(folder)
    built = tokenizer.build(shipped.model_max_length)
    assert shipped.get_vocab() == built.get_vocab()
