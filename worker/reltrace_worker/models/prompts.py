"""What a job's input is in tokens, with its continuation behind it; and tokens by their text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from reltrace_worker.models.chat import render
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.text import Encoded, Prompt, TextEncoder
from reltrace_worker.models.vocabulary import Vocabulary
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


@dataclass(frozen=True, slots=True)
class Reading:
    """A job's input as the model reads it.

    Parameters
    ----------
    prompt
        The tokens of the pass: the prompt and all but the last token of a continuation.
    length
        Tokens of the prompt.
    continuation
        The tokens behind it; empty without a continuation.
    source
        The prompt's text, or its ids and their text.
    special
        What the tokenizer puts in front of a text is in front of it.
    """

    prompt: TokenizedPrompt
    length: int
    continuation: tuple[int, ...]
    source: str | Encoded
    special: bool


class PromptReader:
    """Reads prompts, conversations and ids for one model.

    Parameters
    ----------
    loaded
        The model that they are for.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = loaded.tokenizer
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._encoder = TextEncoder(loaded.tokenizer)
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
            if self._checks_ids(given, field, faults):
                source = self._encoder.decode(given)
        if not given:
            faults.add(field, "is empty; a trace needs at least one token")
        elif isinstance(source, str) and not self._checks_text(source, field, faults):
            source = ""
        prompt, place = self._with_continuation(targets, source, special, faults)
        self._check_extent(field, prompt, place, faults)
        ids = prompt.encoded.token_ids
        read = prompt.encoded.up_to(len(ids) - bool(prompt.continuation))
        turns: tuple[Turn, ...] = ()
        if isinstance(given, Chat) and contents:
            turns = tuple(
                Turn(message.role, read.tokens_of(*content))
                for message, content in zip(given.messages, contents, strict=True)
            )
        tokenized = TokenizedPrompt(
            token_ids=read.token_ids,
            # Of ids that are out of range there is none.
            tokens=() if faults.found else self._vocabulary.texts(read.token_ids),
            text=read.text,
            offsets=read.offsets,
            turns=turns,
            special_positions=self._encoder.special_positions(read.token_ids),
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
        """Return the token that is meant.

        By text, that is the token of this name; else the one token that the tokenizer makes of the
        text, alone or behind the prompt. `continues`: a continuation may be asked for instead.
        """
        if token is None:
            return None
        if isinstance(token, int):
            self._checks_ids((token,), field, faults, index=False)
            return token
        if not self._checks_text(token, field, faults):
            return None
        found = self._vocabulary.find(token)
        if found is not None and found < self._vocab_size:
            return found
        ids = self._encoder.encode(token, special=False).token_ids
        if not self._is_one(token, ids) and isinstance(reading.source, str):
            behind = self._encoder.joined(reading.source, token, special=reading.special)
            # A token that begins in the prompt is not the text's.
            ids = ids if behind.hints else behind.continuation
        if self._is_one(token, ids):
            return ids[0] if self._checks_known(ids, field, faults) else None
        faults.add(field, self._split(token, ids, continues=continues))
        return None

    def _with_continuation(
        self,
        targets: Sequence[TargetRequest],
        source: str | Encoded,
        special: bool,
        faults: Faults,
    ) -> tuple[Prompt, str]:
        """Return the prompt and the continuation that targets share, and the latter's field."""
        first, field = None, ""
        for index, target in enumerate(targets):
            asked = target.continuation
            if asked is None:
                continue
            place = f"targets[{index}].continuation"
            if not asked:
                faults.add(place, "is empty; it needs at least one response token")
            elif isinstance(asked, str):
                if not self._checks_text(asked, place, faults):
                    continue
            elif not self._checks_ids(asked, place, faults):
                continue
            if not asked:
                continue
            found = self._joined(source, asked, special)
            if first is None:
                first, field = found, place
                if not found.continuation:
                    faults.add(place, "is empty; it needs at least one response token")
            elif (found.continuation, found.length) != (first.continuation, first.length):
                faults.add(
                    place, "differs from the continuation of another target; one job has one"
                )
        if first is None:
            encoded = source
            if isinstance(encoded, str):
                encoded = self._encoder.encode(encoded, special=special)
            first = Prompt(encoded, len(encoded.token_ids))
        return first, field

    def _joined(
        self, source: str | Encoded, continuation: str | tuple[int, ...], special: bool
    ) -> Prompt:
        if isinstance(source, str):
            if isinstance(continuation, str):
                return self._encoder.joined(source, continuation, special=special)
            source = self._encoder.encode(source, special=special)
        return self._encoder.appended(source, continuation)

    def _check_extent(self, field: str, prompt: Prompt, place: str, faults: Faults) -> None:
        """Check how many tokens there are, and that the model has them all."""
        if any(fault.field.startswith(field) for fault in faults.found):
            return
        ids, length = prompt.encoded.token_ids, prompt.length
        if not length:
            faults.add(
                place or field,
                "begins within the first token, and no token is in front of it"
                if prompt.continuation
                else "encodes to no tokens at all",
            )
        elif length > self._context_length:
            faults.add(
                field, f"has {length} tokens; the model's context holds {self._context_length}"
            )
        elif len(ids) - 1 > self._context_length:
            faults.add(
                place,
                f"prompt and continuation need {len(ids) - 1} tokens ({length} and "
                f"{len(ids) - length}, without the last); the model's context holds "
                f"{self._context_length}",
            )
        if self._checks_known(ids[:length], field, faults):
            self._checks_known(ids[length:], place, faults)

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

    def _is_one(self, text: str, ids: tuple[int, ...]) -> bool:
        """Tell whether ids are one token that says the text; a tokenizer may drop characters."""

        def alike(text: str) -> str:
            return unicodedata.normalize("NFKC", text).strip()

        return len(ids) == 1 and alike(self._vocabulary.text(ids[0])) == alike(text)

    def _split(self, text: str, ids: tuple[int, ...], *, continues: bool) -> str:
        tokens = zip(ids, self._vocabulary.texts(ids), strict=True)
        split = ", ".join(f"{name!r} ({token})" for token, name in tokens)
        found = f"{text!r} is not exactly one token but {len(ids)}" + (f": {split}" if ids else "")
        if len(ids) == 1:
            return f"{text!r} is not in the vocabulary; it is read as {split}"
        if len(ids) > 1 and continues:
            return f"{found}; to trace them all, ask for a continuation (continuation={text!r})"
        return found

    @staticmethod
    def _checks_text(text: str, field: str, faults: Faults) -> bool:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            faults.add(field, f"is not valid Unicode text: {error.reason} at {error.start}")
            return False
        return True

    def _checks_ids(
        self, ids: tuple[int, ...], field: str, faults: Faults, *, index: bool = True
    ) -> bool:
        """Check ids that a client gave."""
        good = True
        for place, token in enumerate(ids):
            if not 0 <= token < self._vocab_size:
                good = False
                faults.add(
                    f"{field}[{place}]" if index else field,
                    f"token id {token} is out of range; allowed: 0 to {self._vocab_size - 1}",
                )
        return good

    def _checks_known(self, ids: tuple[int, ...], field: str, faults: Faults) -> bool:
        """Check ids that the tokenizer gave."""
        beyond = next((i for i in ids if i >= self._vocab_size), None)
        if beyond is None:
            return True
        faults.add(
            field,
            f"token {self._vocabulary.text(beyond)!r} has id {beyond}, but the model's "
            f"vocabulary ends at {self._vocab_size - 1}",
        )
        return False
