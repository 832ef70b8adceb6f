"""Texts for those who read along: whole characters, from another thread, each token once."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.session.drafts import Drafts
from reltrace_worker.session.leases import LeaseKey
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

KEY = LeaseKey("s-0", 1)


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes: most characters need several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_level()
VOCABULARY = Vocabulary(TOKENIZER)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(text=st.text("aé ü€漢🐈", min_size=1, max_size=8), size=st.integers(1, 5))
def test_characters_come_whole(text: str, size: int) -> None:
    """
    Given a text whose characters are several tokens
    If it grows by some tokens at a time
    I expect the drafts' texts to be the text, and never half a character.
    """
    ids = TOKENIZER.encode(text)
    drafts = Drafts()

    async def grow() -> list:
        found = []
        for end in range(size, len(ids) + size, size):
            drafts.note(KEY, ids[:end], VOCABULARY)
            found += await drafts.next()
        return found

    found = asyncio.run(grow())
    assert "".join(draft.text for draft in found) == text
    assert [token for draft in found for token in draft.token_ids] == ids
    assert [draft.first for draft in found] == list(range(0, len(ids), size))
    assert all(text.startswith("".join(d.text for d in found[:n])) for n in range(len(found)))
    assert {(draft.job_id, draft.attempt) for draft in found} == {("s-0", 1)}


class Meanwhile(Vocabulary):
    """While one text is decoded, another one grows."""

    def __init__(self, grow: Callable[[], None]) -> None:
        super().__init__(TOKENIZER)
        self._grow = grow

    def decoded(self, token_ids: Sequence[int]) -> str:
        self._grow()
        return super().decoded(token_ids)


async def test_what_comes_while_drafts_are_made_is_in_the_next() -> None:
    """No draft is empty: a scheduler would refuse it, and the worker with it."""
    drafts = Drafts()
    first, second = LeaseKey("s-0", 1), LeaseKey("s-1", 1)
    drafts.note(first, [5], Meanwhile(lambda: drafts.note(second, [7, 8], VOCABULARY)))
    drafts.note(second, [7], VOCABULARY)
    found = [*await drafts.next(), *await drafts.next()]
    assert [(draft.job_id, draft.first, list(draft.token_ids)) for draft in found] == [
        ("s-0", 0, [5]),
        ("s-1", 0, [7]),
        ("s-1", 1, [8]),
    ]


async def test_what_is_noted_on_another_thread_wakes_who_waits() -> None:
    drafts = Drafts()
    waiting = asyncio.create_task(drafts.next())
    await asyncio.sleep(0)
    thread = threading.Thread(target=drafts.note, args=(KEY, [65], VOCABULARY))
    thread.start()
    async with asyncio.timeout(10):
        (draft,) = await waiting
    thread.join()
    assert list(draft.token_ids) == [65]


async def test_what_nobody_takes_is_put_together() -> None:
    drafts = Drafts()
    other = LeaseKey("s-1", 1)
    for end in range(1, 4):
        drafts.note(KEY, [65, 66, 67][:end], VOCABULARY)
    drafts.note(other, [68], VOCABULARY)
    found = await drafts.next()
    assert [(d.job_id, d.first, list(d.token_ids)) for d in found] == [
        ("s-0", 0, [65, 66, 67]), ("s-1", 0, [68]),
    ]  # fmt: skip
    # The same again is nothing new.
    drafts.note(other, [68], VOCABULARY)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await drafts.next()


async def test_texts_restart_on_another_connection() -> None:
    """
    Given texts of which something was taken, one that has gone on since, and one that is over
    When they begin again
    I expect all that is written of the texts that are not over, though nothing new was.
    """
    drafts = Drafts()
    other, over = LeaseKey("s-1", 1), LeaseKey("s-2", 1)
    for key in (KEY, other, over):
        drafts.note(key, [65, 66], VOCABULARY)
    assert len(await drafts.next()) == 3
    drafts.note(KEY, [65, 66, 67], VOCABULARY)
    drafts.forget([over])
    drafts.restart()
    found = await drafts.next()
    assert [(d.job_id, d.first, list(d.token_ids), d.text) for d in found] == [
        ("s-0", 0, [65, 66, 67], VOCABULARY.decoded([65, 66, 67])),
        ("s-1", 0, [65, 66], VOCABULARY.decoded([65, 66])),
    ]
    drafts.note(KEY, [65, 66, 67, 68], VOCABULARY)
    (last,) = await drafts.next()
    assert (last.first, list(last.token_ids)) == (3, [68])


async def test_beginning_again_wakes_who_waits() -> None:
    drafts = Drafts()
    drafts.restart()
    drafts.note(KEY, [65], VOCABULARY)
    await drafts.next()
    waiting = asyncio.create_task(drafts.next())
    await asyncio.sleep(0)
    drafts.restart()
    async with asyncio.timeout(10):
        (draft,) = await waiting
    assert draft.first == 0


async def test_what_is_forgotten_comes_no_more() -> None:
    drafts = Drafts()
    drafts.note(KEY, [65], VOCABULARY)
    drafts.forget([KEY, LeaseKey("unknown", 1)])
    drafts.note(LeaseKey("s-1", 1), [66], VOCABULARY)
    assert [draft.job_id for draft in await drafts.next()] == ["s-1"]
