"""The tokens of a job's input and of the continuation behind it, and of targets given by text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from reltrace_worker.models.chat import render
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.text import Encoded, Prompt, TextEncoder
from reltrace_worker.types.errors import Faults, InvalidJob
from reltrace_worker.types.jobs import (
    Chat,
    PromptInput,
    Span,
    TargetRequest,
    TokenizedPrompt,
    TokenRef,
    Turn,
)

_EMPTY_CONTINUATION = "is empty; it needs at least one response token"


@dataclass(frozen=True, slots=True)
class Reading:
    """A job's input as the model reads it."""

    # The tokens of the pass: the prompt and all but the last token of a continuation.
    prompt: TokenizedPrompt
    # Tokens of the prompt alone.
    length: int
    # The tokens behind it; empty without a continuation.
    continuation: tuple[int, ...]
    # The prompt's text, or its ids and their text.
    source: str | Encoded
    # Whether special tokens were added in front of the text.
    special: bool


class PromptReader:
    """Reads prompts, conversations and ids for one model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = loaded.tokenizer
        self._encoder = TextEncoder(loaded.tokenizer)
        self._vocabulary = self._encoder.vocabulary
        self._vocab_size = loaded.shape.vocab_size
        self._context_length = loaded.context_length

    def read(
        self,
        given: PromptInput,
        add_special_tokens: bool,
        targets: Sequence[TargetRequest],
        faults: Faults,
    ) -> Reading:
        """Return the tokens of a job; `faults` says where they can not be used."""
        source: str | Encoded
        contents: tuple[Span, ...] = ()
        special = False
        if isinstance(given, Chat):
            field, source = "messages", ""
            try:
                rendered = render(self._tokenizer, given)
                source, contents = rendered.text, rendered.contents
            except InvalidJob as error:
                faults.found += error.violations
        elif isinstance(given, str):
            field, source, special = "prompt", given, add_special_tokens
        else:
            field, source = "input_ids", Encoded("", given, ())
            if self._are_ids(given, field, faults):
                source = self._encoder.decode(given)
        if not given:
            faults.add(field, "is empty; a trace needs at least one token")
        elif isinstance(source, str) and not _is_unicode(source, field, faults):
            source = ""
        prompt, continuation_field = self._with_continuation(targets, source, special, faults)
        self._check_length(prompt, field, continuation_field, faults)
        ids = prompt.encoded.token_ids
        read = prompt.encoded.up_to(len(ids) - bool(prompt.continuation))
        turns: tuple[Turn, ...] = ()
        if isinstance(given, Chat) and contents:
            turns = tuple(
                Turn(message.role, read.tokens_of(*content))
                for message, content in zip(given.messages, contents, strict=True)
            )
        special_ids = self._vocabulary.special_ids
        tokenized = TokenizedPrompt(
            token_ids=read.token_ids,
            # Ids that are out of range have no names.
            tokens=() if faults.found else self._vocabulary.texts(read.token_ids),
            text=read.text,
            offsets=read.offsets,
            turns=turns,
            special_positions=tuple(
                i for i, token in enumerate(read.token_ids) if token in special_ids
            ),
            hints=prompt.hints + self._hints(given, prompt),
        )
        return Reading(tokenized, prompt.length, prompt.continuation, source, special)

    def token(
        self,
        token: TokenRef | None,
        field: str,
        reading: Reading,
        faults: Faults,
        *,
        continues: bool,
    ) -> int | None:
        """Return the id of a token.

        Text means the token of this name, or else the one token that the tokenizer makes of the
        text, alone or behind the prompt. Of a text of several tokens the fault proposes a
        continuation if `continues`.
        """
        if token is None:
            return None
        if isinstance(token, int):
            self._are_ids((token,), field, faults, index=False)
            return token
        if not _is_unicode(token, field, faults):
            return None
        named = self._vocabulary.find(token)
        if named is not None and named < self._vocab_size:
            return named
        ids = self._encoder.encode(token, special=False).token_ids
        if not self._is_one_token(token, ids) and isinstance(reading.source, str):
            behind = self._encoder.joined(reading.source, token, special=reading.special)
            # A token that begins in the prompt is not the text's.
            ids = ids if behind.hints else behind.continuation
        if self._is_one_token(token, ids):
            return ids[0] if self._has_embeddings(ids, field, faults) else None
        faults.add(field, self._describe_split(token, ids, continues=continues))
        return None

    def _with_continuation(
        self,
        targets: Sequence[TargetRequest],
        source: str | Encoded,
        special: bool,
        faults: Faults,
    ) -> tuple[Prompt, str]:
        """Return the prompt with the continuation that targets share, and the latter's field."""
        shared, shared_field = None, ""
        for index, target in enumerate(targets):
            continuation, field = target.continuation, f"targets[{index}].continuation"
            if continuation is None:
                continue
            if not continuation:
                faults.add(field, _EMPTY_CONTINUATION)
                continue
            if isinstance(continuation, str):
                valid = _is_unicode(continuation, field, faults)
            else:
                valid = self._are_ids(continuation, field, faults)
            if not valid:
                continue
            prompt = self._joined(source, continuation, special)
            if shared is None:
                shared, shared_field = prompt, field
                if not prompt.continuation:
                    faults.add(field, _EMPTY_CONTINUATION)
            elif (prompt.continuation, prompt.length) != (shared.continuation, shared.length):
                faults.add(
                    field, "differs from the continuation of another target; one job has one"
                )
        if shared is None:
            if isinstance(source, str):
                source = self._encoder.encode(source, special=special)
            shared = Prompt(source, len(source.token_ids))
        return shared, shared_field

    def _joined(
        self, source: str | Encoded, continuation: str | tuple[int, ...], special: bool
    ) -> Prompt:
        if isinstance(source, str):
            if isinstance(continuation, str):
                return self._encoder.joined(source, continuation, special=special)
            source = self._encoder.encode(source, special=special)
        return self._encoder.appended(source, continuation)

    def _check_length(
        self, prompt: Prompt, field: str, continuation_field: str, faults: Faults
    ) -> None:
        """Check the number of tokens, and that the model has embeddings of them all."""
        if any(fault.field.startswith(field) for fault in faults.found):
            return
        ids, length, most = prompt.encoded.token_ids, prompt.length, self._context_length
        if not length and prompt.continuation:
            faults.add(
                continuation_field,
                "begins within the first token, and no token is in front of it",
            )
        elif not length:
            faults.add(continuation_field or field, "encodes to no tokens at all")
        elif length > most:
            faults.add(field, f"has {length} tokens; the model's context holds {most}")
        elif len(ids) - 1 > most:
            faults.add(
                continuation_field,
                f"prompt and continuation need {len(ids) - 1} tokens ({length} and "
                f"{len(ids) - length}, without the last); the model's context holds {most}",
            )
        if self._has_embeddings(ids[:length], field, faults):
            self._has_embeddings(ids[length:], continuation_field, faults)

    def _hints(self, given: PromptInput, prompt: Prompt) -> tuple[str, ...]:
        ends_in_space = isinstance(given, str) and given.endswith(" ")
        if not ends_in_space or prompt.continuation or not prompt.length:
            return ()
        if self._vocabulary.text(prompt.encoded.token_ids[-1]).strip():
            return ()
        return (
            "The prompt ends in a space, which is a token of its own here. Models mostly read a "
            "space as the beginning of the next word's token, and go on in another way without it.",
        )

    def _is_one_token(self, text: str, ids: tuple[int, ...]) -> bool:
        """Return whether ids are one token that says the text; a tokenizer may drop characters."""

        def normalized(text: str) -> str:
            return unicodedata.normalize("NFKC", text).strip()

        return len(ids) == 1 and normalized(self._vocabulary.text(ids[0])) == normalized(text)

    def _describe_split(self, text: str, ids: tuple[int, ...], *, continues: bool) -> str:
        tokens = zip(ids, self._vocabulary.texts(ids), strict=True)
        split = ", ".join(f"{name!r} ({token})" for token, name in tokens)
        if len(ids) == 1:
            return f"{text!r} is not in the vocabulary; it is read as {split}"
        fault = f"{text!r} is not exactly one token but {len(ids)}" + (f": {split}" if ids else "")
        if ids and continues:
            fault += f"; to trace them all, ask for a continuation (continuation={text!r})"
        return fault

    def _are_ids(
        self, ids: tuple[int, ...], field: str, faults: Faults, *, index: bool = True
    ) -> bool:
        """Check ids that a client gave."""
        outside = [i for i, token in enumerate(ids) if not 0 <= token < self._vocab_size]
        for i in outside:
            faults.add(
                f"{field}[{i}]" if index else field,
                f"token id {ids[i]} is out of range; allowed: 0 to {self._vocab_size - 1}",
            )
        return not outside

    def _has_embeddings(self, ids: tuple[int, ...], field: str, faults: Faults) -> bool:
        """Check ids that the tokenizer gave; it may know more tokens than the model."""
        unknown = next((token for token in ids if token >= self._vocab_size), None)
        if unknown is not None:
            faults.add(
                field,
                f"token {self._vocabulary.text(unknown)!r} has id {unknown}, but the model's "
                f"vocabulary ends at {self._vocab_size - 1}",
            )
        return unknown is None


def _is_unicode(text: str, field: str, faults: Faults) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        faults.add(field, f"is not valid Unicode text: {error.reason} at {error.start}")
        return False
    return True
