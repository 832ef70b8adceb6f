"""Prompts, chats, continuations and targets by text, as jobs have them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from reference.chat_templates import CHATML, STRICT
from reference.loaded import Checkpoints, preparer
from reference.small_tokenizers import TOKENIZERS, sentencepiece
from reltrace_worker.engine.preparing import JobPreparer
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.jobs import (
    AtlasRequest,
    Chat,
    GenerateRequest,
    Message,
    Sampling,
    TargetRequest,
    TokenizeRequest,
    TraceJob,
    TraceRequest,
    Turn,
)


@pytest.fixture(scope="module")
def preparers(checkpoints: Checkpoints) -> Any:
    plain = checkpoints.loaded("plain")

    @cache
    def make(kind: str, template: str | None = None) -> JobPreparer:
        tokenizer = TOKENIZERS[kind]()
        tokenizer.chat_template = template
        shape = replace(plain.shape, vocab_size=len(tokenizer) + 5)
        return preparer(replace(plain, tokenizer=tokenizer, shape=shape))

    return make


def token_names(job: TraceJob) -> list[str]:
    return [job.prompt.text[first:stop] for first, stop in job.prompt.offsets]


def only_fault(jobs: JobPreparer, spec: TraceRequest) -> tuple[str, str]:
    with pytest.raises(InvalidJob) as caught:
        jobs.prepare(spec)
    (fault,) = caught.value.violations
    return fault.field, fault.description


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["dogs and", (3, 4, 5)])
def test_every_printed_name_is_a_target(preparers: Any, kind: str, prompt: Any) -> None:
    tokenizer = TOKENIZERS[kind]()
    names = Vocabulary(tokenizer).texts(range(len(tokenizer) + 5))
    targets = tuple(TargetRequest(token=name) for name in names)
    job = preparers(kind).prepare(TraceRequest(prompt, targets=targets))
    assert [target.terms[0].token_id for target in job.targets] == list(range(len(names)))


def test_a_target_is_the_token_of_its_text(preparers: Any) -> None:
    """With a tokenizer that puts a space before what it encodes alone."""
    jobs = preparers("sentencepiece")
    raw = sentencepiece().convert_ids_to_tokens

    def token(text: str, prompt: str = "dog") -> str:
        job = jobs.prepare(TraceRequest(prompt, targets=(TargetRequest(token=text),)))
        return raw(job.targets[0].terms[0].token_id)

    assert token("s") == "s"
    assert token(" s") == "▁s"
    # Not a token's text, but all there is of it alone.
    assert token("dogs") == "▁dogs"
    assert token("<0x0A>") == "<0x0A>"
    assert token("\n") == "\n"
    # What it lacks is bytes, and no single token.
    assert only_fault(jobs, TraceRequest("dog", targets=(TargetRequest(token="ß"),))) == (
        "targets[0].token",
        "'ß' is not exactly one token but 2: '<0xC3>' (198), '<0x9F>' (162); to trace them all, "
        "ask for a continuation (continuation='ß')",
    )


def test_a_split_is_shown_as_it_is_behind_the_prompt(preparers: Any) -> None:
    jobs = preparers("sentencepiece")
    targets = (TargetRequest(token="s and"), TargetRequest(contrast="s and"))
    with pytest.raises(InvalidJob) as caught:
        jobs.prepare(TraceRequest("cat cats", targets=targets))
    token, contrast = caught.value.violations
    assert token.description.startswith(
        "'s and' is not exactly one token but 2: 's' (260), ' and' ("
    )
    assert token.description.endswith("ask for a continuation (continuation='s and')")
    # That is no way to ask for a contrast, and a continuation excludes one, and a position.
    assert contrast.description in token.description
    assert contrast.field == "targets[1].contrast"
    for target in (TargetRequest("s and", contrast="s"), TargetRequest("s and", position=0)):
        fault = only_fault(jobs, TraceRequest("cat cats", targets=(target,)))
        assert fault == ("targets[0].token", contrast.description)
    both = (TargetRequest(token="s and"), TargetRequest(continuation=" and"))
    assert only_fault(jobs, TraceRequest("cat cats", targets=both))[1] == contrast.description


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_character_that_the_tokenizer_does_not_have_is_no_target(
    checkpoints: Checkpoints, unknown: str | None
) -> None:
    """Whether it is read as an unknown token, or passed over."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.model.byte_fallback = False
    tokenizer.backend_tokenizer.model.unk_token = unknown
    jobs = preparer(replace(checkpoints.loaded("plain"), tokenizer=tokenizer))
    field, description = only_fault(jobs, TraceRequest("dog", targets=(TargetRequest(token="ß"),)))
    assert field == "targets[0].token"
    assert description in (
        "'ß' is not in the vocabulary; it is read as '<unk>' (0)",
        "'ß' is not exactly one token but 0",
    )
    job = jobs.prepare(TraceRequest("dog", targets=(TargetRequest(token="<unk>"),)))
    assert job.targets[0].terms[0].token_id == 0


def test_text_and_offsets_are_of_what_the_pass_reads(preparers: Any) -> None:
    jobs = preparers("appends EOS")
    job = jobs.prepare(TraceRequest("I have 5"))
    assert job.prompt.tokens[0] == "<s>"
    assert job.prompt.text == "<s>I have 5" == "".join(token_names(job))
    assert job.prompt.special_positions == (0,)
    assert jobs.prepare(TraceRequest("<s>I have 5")) == job
    assert jobs.prepare(TraceRequest(job.token_ids)) == job
    # A text is written behind the same.
    written = jobs.prepare(GenerateRequest("<s>I have 5", Sampling(4)))
    assert (written.token_ids, written.prompt.text) == (job.token_ids, job.prompt.text)
    bare = jobs.prepare(TraceRequest("I have 5", add_special_tokens=False))
    assert (bare.token_ids, bare.prompt.text) == (job.token_ids[1:], "I have 5")
    # Nobody reads the last token of a continuation.
    target = TargetRequest(continuation=" cats and dogs")
    longer = jobs.prepare(TraceRequest("I have 5", targets=(target, TargetRequest())))
    assert longer.prompt.text == "<s>I have 5 cats and"
    assert longer.token_ids[: len(job.token_ids)] == job.token_ids
    assert len(longer.prompt.offsets) == len(longer.token_ids)
    assert longer.targets[1].terms[0].position == len(job.token_ids) - 1


def test_a_continuation_in_the_middle_of_the_first_token_is_refused(preparers: Any) -> None:
    jobs = preparers("byte level")
    target = TargetRequest(continuation="ts")
    spec = TraceRequest(" ca", targets=(target,))
    job = jobs.prepare(spec)
    assert job.prompt.text == "<s>"
    assert job.targets[0].terms[0].position == 0
    assert only_fault(jobs, replace(spec, add_special_tokens=False)) == (
        "targets[0].continuation",
        "begins within the first token, and no token is in front of it",
    )


def test_a_continuation_is_the_same_as_text_and_as_ids(preparers: Any) -> None:
    jobs = preparers("sentencepiece")
    text = TargetRequest(continuation=" dogs and cats")
    (target,) = jobs.prepare(TraceRequest("dogs", targets=(text,))).targets
    ids = TargetRequest(continuation=target.continuation_ids)
    job = jobs.prepare(TraceRequest("dogs", targets=(text, ids)))
    assert job.targets == (target, target)
    assert jobs.prepare(TraceRequest("dogs", targets=(ids, text))) == job
    other = TargetRequest(continuation=" dogs and")
    field, _ = only_fault(jobs, TraceRequest("dogs", targets=(ids, other)))
    assert field == "targets[1].continuation"


def test_a_space_at_the_end_is_told(preparers: Any) -> None:
    for kind in ("byte level", "sentencepiece"):
        jobs = preparers(kind)
        job = jobs.prepare(TraceRequest("I have "))
        assert job.prompt.tokens[-1] == " "
        assert "ends in a space" in job.prompt.hints[0]
        assert jobs.prepare(TraceRequest("I have")).prompt.hints == ()
        target = TargetRequest(continuation="dogs")
        assert (
            "' dogs' holds ' '"
            in jobs.prepare(TraceRequest("I have ", targets=(target,))).prompt.hints[0]
        )


def test_a_chat_is_encoded_as_its_template_writes_it(preparers: Any) -> None:
    messages = (Message("user", "cats and dogs"), Message("assistant", " cats"))
    job = preparers("byte level", STRICT).prepare(TraceRequest(Chat(messages)))
    assert job.prompt.text == "<s>[user] cats and dogs [assistant] cats [assistant]"
    assert job.prompt.tokens.count("<s>") == 1
    assert "".join(token_names(job)) == job.prompt.text
    for turn, said in zip(job.prompt.turns, (" cats and dogs", " cats"), strict=True):
        first, stop = turn.tokens
        assert "".join(job.prompt.tokens[first:stop]) == said
    assert [turn.role for turn in job.prompt.turns] == ["user", "assistant"]
    # A template without a BOS is taken at its word.
    prompt = preparers("byte level", CHATML).prepare(TokenizeRequest(Chat(messages[:1])))
    assert prompt.tokens[0] == "<|im_start|>"
    assert [prompt.tokens[place] for place in prompt.special_positions] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]


def test_a_chat_has_targets_and_continuations(preparers: Any) -> None:
    jobs = preparers("byte level", CHATML)
    chat = Chat((Message("user", "cats"), Message("assistant", "")))
    targets = (TargetRequest(token=" dogs"), TargetRequest(continuation="I have cats"))
    job = jobs.prepare(TraceRequest(chat, targets=targets))
    assert job.prompt.text.endswith("assistant\nI have")
    assert job.prompt.turns[1] == Turn("assistant", (job.prompt.turns[1].tokens[0],) * 2)
    assert job.targets[0].terms[0].position == job.targets[1].terms[0].position


def test_a_chat_that_can_not_be_is_named(preparers: Any) -> None:
    chat = Chat((Message("user", "cats"),))
    field, description = only_fault(preparers("byte level"), TraceRequest(chat))
    assert (field, description) == (
        "messages",
        "need a chat template, and the model has none; give a prompt",
    )
    jobs = preparers("byte level", CHATML)
    for messages, said in (((), "are none"), ((Message("user", "x" * 200),), "context holds 128")):
        field, description = only_fault(jobs, TraceRequest(Chat(messages)))
        assert field == "messages"
        assert said in description
    field, description = only_fault(jobs, TraceRequest(Chat((Message("user", "\ud800"),))))
    assert field == "messages"
    assert "not valid Unicode" in description


def test_a_corpus_may_have_chats(preparers: Any) -> None:
    chat = Chat((Message("user", "cats and dogs"),))
    request = AtlasRequest(("I have", chat, "", Chat(())), k=3)
    jobs = preparers("byte level", CHATML)
    corpus = jobs.prepare(request)
    assert corpus.numbers == (0, 1)
    assert corpus.prompts[1].token_ids == jobs.prepare(TraceRequest(chat)).token_ids
    assert [number for number, _ in corpus.skipped] == [2, 3]
    assert "messages: are none" in corpus.skipped[1][1]
    # Each atlas has very many of them.
    assert {(job.prompt.text, job.prompt.offsets, job.candidates) for job in corpus.prompts} == {
        ("", (), False)
    }


def test_tokens_alone_need_no_target(preparers: Any) -> None:
    jobs = preparers("byte level")
    request = TokenizeRequest("I have")
    assert jobs.prepare(request).text == "<s>I have"
    field, _ = only_fault(jobs, replace(request, input="x" * 200))
    assert field == "prompt"
