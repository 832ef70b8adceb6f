"""Text in the tokens of real models: a byte-level one with a chat template, SentencePiece with BOS.

Slow: the models are read out of their packages.
"""

from __future__ import annotations

import pytest
from reference.loaded import prepare, preparer, run
from reference.real_models import RealModels
from reltrace_worker.engine import Engine
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.jobs import Chat, GenerationSpec, JobSpec, Message, TargetSpec

pytestmark = pytest.mark.slow

NAMES = ("smollm2", "gemma3-270m")
TEXT = "My café 😀  has\n\n\t5 naïve cats… 東京鳥!  "
CHAT = Chat((Message("user", " Say hello. "), Message("assistant", "user"), Message("user", "Hi")))


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_name_is_given_back(real_models: RealModels, name: str) -> None:
    loaded = real_models.loaded(name)
    vocabulary = Vocabulary(loaded.tokenizer)
    names = vocabulary.texts(range(loaded.shape.vocab_size))
    assert len(set(names)) == len(names)
    assert [vocabulary.find(text) for text in names] == list(range(len(names)))


@pytest.mark.parametrize("name", NAMES)
def test_spans_hold_what_tokens_say(real_models: RealModels, name: str) -> None:
    loaded = real_models.loaded(name)
    text = prepare(loaded, JobSpec(TEXT))[0]
    ids = prepare(loaded, JobSpec(text.token_ids))[0]
    assert (ids.text, ids.offsets) == (text.text, text.offsets)
    spans = dict.fromkeys(text.offsets)
    assert "".join(text.text[first:stop] for first, stop in spans) == text.text
    whole = [i for i, span in enumerate(text.offsets) if text.offsets.count(span) == 1]
    assert [text.text[slice(*text.offsets[i])] for i in whole] == [text.tokens[i] for i in whole]
    assert len(whole) > 10


def test_a_bos_is_there_once(real_models: RealModels) -> None:
    gemma, smollm = (real_models.loaded(name) for name in ("gemma3-270m", "smollm2"))
    plain, marked = prepare(gemma, JobSpec("hello"), JobSpec("<bos>hello"))
    assert plain == marked
    assert plain.tokens == ("<bos>", "hello")
    assert plain.special_positions == (0,)
    (bare,) = prepare(gemma, JobSpec("hello", add_special_tokens=False))
    assert bare.tokens == ("hello",)
    # It has a BOS, and its tokenizer does not add it.
    plain, marked = prepare(smollm, JobSpec("hello"), JobSpec("<|im_start|>hello"))
    assert (plain.tokens, marked.tokens) == (("hello",), ("<|im_start|>", "hello"))


@pytest.mark.parametrize("name", NAMES)
def test_a_continuation_is_what_the_model_reads(real_models: RealModels, name: str) -> None:
    loaded = real_models.loaded(name)
    target = TargetSpec(continuation="ld and dogs")
    (job,) = prepare(loaded, JobSpec("hello wor", targets=(target,)))
    assert job.text.endswith("hello world and")
    found = Vocabulary(loaded.tokenizer).texts(job.targets[0].continuation_ids)
    assert found == (" world", " and", " dogs")
    assert "' world' holds ' wor' of the prompt" in job.hints[0]


def test_a_chat_has_its_turns(real_models: RealModels) -> None:
    (job,) = prepare(real_models.loaded("smollm2"), JobSpec(CHAT, tokenize_only=True))
    assert job.text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert job.text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    said = [job.tokens[slice(*turn.tokens)] for turn in job.turns]
    assert said == [(" Say", " hello", "."), ("user",), ("Hi",)]
    for turn in job.turns[1:]:
        assert job.text[: job.offsets[turn.tokens[0]][0]].endswith(f"<|im_start|>{turn.role}\n")
    with pytest.raises(InvalidJob, match="messages: need a chat template"):
        preparer(real_models.loaded("gemma3-270m")).prepare(JobSpec(CHAT))


def test_a_chat_is_answered_up_to_the_end_of_the_turn(real_models: RealModels) -> None:
    loaded = real_models.loaded("smollm2")
    chat = Chat((Message("user", "Say hello."),))
    (result,) = run(Engine(loaded), prepare(loaded, JobSpec(chat, generation=GenerationSpec(80))))
    assert result.written is not None
    assert result.written.stopped
    assert result.written.tokens[-1] == "<|im_end|>"
    assert "<|im_end|>" not in result.written.text


def test_an_unlikely_twin_is_named(real_models: RealModels) -> None:
    loaded = real_models.loaded("smollm2")
    prompt = "The Eiffel Tower is located in the city of"
    specs = [
        JobSpec(prompt, (), targets=(TargetSpec(token=text),), forward_only=True)
        for text in ("Paris", " Paris")
    ]
    asked, meant = run(Engine(loaded), prepare(loaded, *specs))
    assert (asked.targets[0].token, meant.targets[0].token) == ("Paris", " Paris")
    assert asked.hints == (
        f"The target 'Paris' has the logit {asked.targets[0].logit:.2f}; ' Paris', which is "
        f"another token, has {meant.targets[0].logit:.2f} at the same position.",
    )
    assert meant.hints == ()
    assert meant.targets[0].candidates[0].token == " Paris"
