"""Text through the whole service: batched, steered, and as transformers writes it."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import reltrace
import torch
from e2e.conftest import Process, wait_until
from reltrace_worker.demo import path as demo_path
from reltrace_worker.models import load_model

PROMPTS = [
    "I have 5 cats and 3 dogs. My cats love to play with my",
    "Here is an indigo table. The colour of the table is",
    "She has 40 lizards and 2 turkeys. Her lizards love to play with her",
]

STEER = reltrace.Steer(2, 50, value=-5)


def test_it_writes_what_transformers_writes(demo_address: str) -> None:
    loaded = load_model(str(demo_path()), device="cpu")
    with reltrace.Client(demo_address) as client:
        for prompt in PROMPTS:
            found = client.generate(prompt, max_new_tokens=8)
            ids = torch.tensor([found.prompt_token_ids])
            expected = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )[0, ids.shape[1] :]
            assert found.token_ids == expected.tolist()
            assert found.unsteered is None
            assert found.provenance.model == "reltrace-demo"
            assert len(found.logprobs) == len(found.tokens)
            assert all(found.logprobs <= 0)
    assert found.text.strip().startswith("turkeys")


def test_a_neuron_that_a_trace_names_steers(demo_address: str) -> None:
    """
    Given the neuron that speaks most for the answer at the last token
    If it is turned against it
    I expect the model to find its answer less likely, and both texts to come side by side.
    """
    with reltrace.Client(demo_address) as client:
        trace = client.trace(PROMPTS[0], sites="neuron", reduce="full")
        last = trace["neuron"][:, -1]
        layer, neuron = divmod(int(last.argmax()), last.shape[1])
        steer = reltrace.Steer(layer, neuron, scale=-3.0)
        found = client.generate(PROMPTS[0], steer=steer, max_new_tokens=6)
        plain = client.generate(PROMPTS[0], max_new_tokens=6)
        assert found.unsteered is not None
        assert found.unsteered.token_ids == plain.token_ids
        assert plain.text.strip().startswith("dogs")
        # Its first token's logit, with the neuron turned.
        turned = client.trace(PROMPTS[0], target="dogs", sites=(), edits=steer)
        assert turned.target.logit < trace.target.logit - 0.1
        assert found.token_ids != plain.token_ids or found.logprobs[0] < plain.logprobs[0] - 0.01


def test_a_direction_in_the_residual_stream_steers(demo_address: str) -> None:
    """The difference of two words' embeddings moves the answer from the one to the other."""
    loaded = load_model(str(demo_path()), device="cpu")
    with reltrace.Client(demo_address) as client:
        dogs, cats = (
            client.trace("a", target=word, sites=()).target.token_id for word in ("dogs", "cats")
        )
        rows = loaded.model.get_output_embeddings().weight.detach()
        direction = (rows[cats] - rows[dogs]).numpy()
        last = loaded.shape.layers - 1
        found = client.generate(
            PROMPTS[0],
            steer=reltrace.Steer(last, direction=direction, scale=50.0, positions=-1),
            max_new_tokens=1,
        )
    assert found.unsteered is not None
    assert (found.unsteered.token_ids, found.token_ids) == ([dogs], [cats])


def test_texts_and_traces_of_many_callers_share_the_worker(demo_address: str) -> None:
    async def all_at_once() -> list[object]:
        async with reltrace.AsyncClient(demo_address) as client:
            return await asyncio.gather(
                *(
                    client.generate(prompt, max_new_tokens=6, temperature=1.0, seed=seed)
                    for prompt in PROMPTS
                    for seed in (1, 2)
                ),
                *(client.trace(prompt) for prompt in PROMPTS),
            )

    first, second = asyncio.run(all_at_once()), asyncio.run(all_at_once())
    texts = [found.text for found in first[:6]]  # type: ignore[attr-defined]
    assert texts == [found.text for found in second[:6]]  # type: ignore[attr-defined]
    assert all(isinstance(trace, reltrace.Trace) for trace in first[6:])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_tokens": 1024}, "^max_new_tokens: "),
        ({"steer": reltrace.Steer(99, 0, value=1)}, r"^steer\[0\]\.layer: 99 is not in"),
        ({"steer": reltrace.Steer(0, 10**6, value=1)}, r"^steer\[0\]\.features\[0\]: "),
        ({"model": "nobody"}, "'nobody' is not served; served: reltrace-demo"),
    ],
)
def test_what_can_not_be_is_named(demo_address: str, given: dict, said: str) -> None:
    with reltrace.Client(demo_address) as client:
        with pytest.raises(reltrace.TraceError, match=said) as whole:
            client.generate(PROMPTS[0], **given)
        with pytest.raises(reltrace.TraceError, match=said) as along:
            next(client.generate_stream(PROMPTS[0], **given))
        assert along.type is whole.type


def test_the_command_shows_both_texts(demo_address: str, start: Callable[..., Process]) -> None:
    plain = start(
        "reltrace", "generate", PROMPTS[0], "--server", demo_address, "--max-new-tokens", "3"
    )
    output, _ = plain.popen.communicate(timeout=60)
    assert plain.popen.returncode == 0, plain.errors.read_text()
    assert output.strip().startswith("dogs")
    both = start(
        "reltrace", "generate", PROMPTS[0], "--server", demo_address, "--max-new-tokens", "3",
        "--steer", "0:1=4", "--steer", "1:2*0",
    )  # fmt: skip
    output, _ = both.popen.communicate(timeout=60)
    assert re.search(r"as it is .* steered", output)
    plainly = start(
        "reltrace", "generate", PROMPTS[0], "--server", demo_address, "--steer", "0:1*0", "--json"
    )
    (line,) = plainly.popen.communicate(timeout=60)[0].splitlines()
    assert json.loads(line)["unsteered"]["text"].strip().startswith("dogs")
    bad = start("reltrace", "generate", "a", "--server", demo_address, "--steer", "x")
    bad.popen.communicate(timeout=60)
    assert bad.popen.returncode == 1
    assert "steer: must be LAYER:NEURON=VALUE" in bad.errors.read_text()


# -- read along ---------------------------------------------------------------------------


def put_together(pieces: list[reltrace.TextPiece]) -> dict[bool, str]:
    """The texts that somebody has who believes the pieces, steered or not."""
    texts: dict[bool, str] = {}
    for piece in pieces:
        before = "" if piece.again else texts.get(piece.steered, "")
        texts[piece.steered] = before + piece.text
    return texts


def test_pieces_are_what_generate_returns(demo_address: str) -> None:
    with reltrace.Client(demo_address) as client:
        stream = client.generate_stream(PROMPTS[0], max_new_tokens=50, steer=STEER)
        assert stream.result is None
        pieces = list(stream)
        found = stream.result
        plain = client.generate(PROMPTS[0], max_new_tokens=50, steer=STEER)
        assert found is not None
        assert found.unsteered is not None
        assert plain.unsteered is not None
        assert (found.text, found.unsteered.text) == (plain.text, plain.unsteered.text)
        assert put_together(pieces) == {True: found.text, False: found.unsteered.text}
        for steered, whole in ((True, found), (False, found.unsteered)):
            ids = [
                token for piece in pieces if piece.steered is steered for token in piece.token_ids
            ]
            assert ids == whole.token_ids
        assert next(stream, None) is None


async def test_the_first_piece_comes_before_the_text_has_ended(demo_address: str) -> None:
    """
    Given a long text
    When its first piece is there
    I expect its job to be running still, whose id nobody but the server knows.
    """
    async with reltrace.AsyncClient(demo_address) as client:
        stream = client.generate_stream(PROMPTS[0], max_new_tokens=400)
        first = await anext(stream)
        assert first.token_ids
        assert len(first.token_ids) < 400
        assert sum(queue.leased for queue in (await client.status()).queues) == 1
        rest = [piece async for piece in stream]
        assert stream.result is not None
        assert put_together([first, *rest]) == {False: stream.result.text}


def test_who_leaves_early_cancels_the_rest(demo_address: str) -> None:
    with reltrace.Client(demo_address) as client:
        ended = dict(client.status().ended)
        stream = client.generate_stream(PROMPTS[0], max_new_tokens=400)
        next(stream)
        stream.close()
        assert stream.result is None

        def cancelled() -> int:
            return client.status().ended.get("CANCELLED", 0) - ended.get("CANCELLED", 0)

        wait_until(lambda: cancelled() == 1, "the job is cancelled", 20)
        wait_until(
            lambda: not any(queue.leased for queue in client.status().queues), "nothing runs", 20
        )


def test_another_scheduler_and_another_worker_go_on_with_a_text(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """
    Given two schedulers on one Redis, with a worker at each
    If a text is read along with at the scheduler where its worker is not, and that worker is
    killed in mid-text
    I expect the other worker to write it from the beginning, and the reader to notice nothing: no
    piece is said again.
    """
    common = ("--listen", "127.0.0.1:0", "--lease", "2")
    first = start("reltrace_scheduler", "--data", str(tmp_path / "data"), *common)
    one = first.first_line().split()[-1]
    (socket,) = (tmp_path / "data").rglob("redis.sock")
    second = start("reltrace_scheduler", "--redis", f"unix://{socket}", *common)
    two = second.first_line().split()[-1]
    model = ("--model", "demo", "--threads", "1")
    worker = start("reltrace_worker", "--scheduler", one, *model)
    with reltrace.Client(two, retry_timeout=100) as client:
        wait_until(lambda: len(client.status().workers) == 1, "the worker is there", 100)
        stream = client.generate_stream(PROMPTS[0], max_new_tokens=450)
        pieces = [next(stream)]
        worker.kill()
        start("reltrace_worker", "--scheduler", two, *model)
        pieces += list(stream)
        assert stream.result is not None
        assert len(stream.result.token_ids) == 450
        assert not any(piece.again for piece in pieces)
        assert put_together(pieces) == {False: stream.result.text}
