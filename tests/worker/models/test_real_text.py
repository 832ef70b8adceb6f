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
from reltrace_worker.types.jobs import (
    Chat,
    GenerateRequest,
    Message,
    Sampling,
    TargetRequest,
    TraceRequest,
)

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
    text = prepare(loaded, TraceRequest(TEXT))[0]
    ids = prepare(loaded, TraceRequest(text.token_ids))[0]
    assert (ids.prompt.text, ids.prompt.offsets) == (text.prompt.text, text.prompt.offsets)
    spans = dict.fromkeys(text.prompt.offsets)
    assert "".join(text.prompt.text[first:stop] for first, stop in spans) == text.prompt.text
    whole = [
        i for i, span in enumerate(text.prompt.offsets) if text.prompt.offsets.count(span) == 1
    ]
    assert [text.prompt.text[slice(*text.prompt.offsets[i])] for i in whole] == [
        text.prompt.tokens[i] for i in whole
    ]
    assert len(whole) > 10


def test_a_bos_is_there_once(real_models: RealModels) -> None:
    gemma, smollm = (real_models.loaded(name) for name in ("gemma3-270m", "smollm2"))
    plain, marked = prepare(gemma, TraceRequest("hello"), TraceRequest("<bos>hello"))
    assert plain == marked
    assert plain.prompt.tokens == ("<bos>", "hello")
    assert plain.prompt.special_positions == (0,)
    (bare,) = prepare(gemma, TraceRequest("hello", add_special_tokens=False))
    assert bare.prompt.tokens == ("hello",)
    # It has a BOS, and its tokenizer does not add it.
    plain, marked = prepare(smollm, TraceRequest("hello"), TraceRequest("<|im_start|>hello"))
    assert (plain.prompt.tokens, marked.prompt.tokens) == (("hello",), ("<|im_start|>", "hello"))


@pytest.mark.parametrize("name", NAMES)
def test_a_continuation_is_what_the_model_reads(real_models: RealModels, name: str) -> None:
    loaded = real_models.loaded(name)
    target = TargetRequest(continuation="ld and dogs")
    (job,) = prepare(loaded, TraceRequest("hello wor", targets=(target,)))
    assert job.prompt.text.endswith("hello world and")
    found = Vocabulary(loaded.tokenizer).texts(job.targets[0].continuation_ids)
    assert found == (" world", " and", " dogs")
    assert "' world' holds ' wor' of the prompt" in job.prompt.hints[0]


def test_a_chat_has_its_turns(real_models: RealModels) -> None:
    (job,) = prepare(real_models.loaded("smollm2"), TraceRequest(CHAT))
    assert job.prompt.text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert job.prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    said = [job.prompt.tokens[slice(*turn.tokens)] for turn in job.prompt.turns]
    assert said == [(" Say", " hello", "."), ("user",), ("Hi",)]
    for turn in job.prompt.turns[1:]:
        assert job.prompt.text[: job.prompt.offsets[turn.tokens[0]][0]].endswith(
            f"<|im_start|>{turn.role}\n"
        )
    with pytest.raises(InvalidJob, match="messages: need a chat template"):
        preparer(real_models.loaded("gemma3-270m")).prepare(TraceRequest(CHAT))


def test_a_chat_is_answered_up_to_the_end_of_the_turn(real_models: RealModels) -> None:
    loaded = real_models.loaded("smollm2")
    chat = Chat((Message("user", "Say hello."),))
    (result,) = run(Engine(loaded), prepare(loaded, GenerateRequest(chat, Sampling(80))))
    assert result.generated is not None
    assert result.generated.stopped
    assert result.generated.tokens[-1] == "<|im_end|>"
    assert "<|im_end|>" not in result.generated.text


def test_an_unlikely_twin_is_named(real_models: RealModels) -> None:
    loaded = real_models.loaded("smollm2")
    prompt = "The Eiffel Tower is located in the city of"
    specs = [
        TraceRequest(prompt, (), targets=(TargetRequest(token=text),))
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
