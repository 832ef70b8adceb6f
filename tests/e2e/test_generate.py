"""Text through the whole service: batched, steered, and as transformers writes it."""

import asyncio
import json
import re
from collections.abc import Callable

import pytest
import reltrace
import torch
from e2e.conftest import Process
from reltrace_worker.demo import path as demo_path
from reltrace_worker.model import load_model

PROMPTS = [
    "I have 5 cats and 3 dogs. My cats love to play with my",
    "Here is an indigo table. The colour of the table is",
    "She has 40 lizards and 2 turkeys. Her lizards love to play with her",
]


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
        ({"max_new_tokens": 1024}, "generation.max_new_tokens: "),
        ({"steer": reltrace.Steer(99, 0, value=1)}, r"edits\[0\]\.layer: 99 is not in"),
        ({"steer": reltrace.Steer(0, 10**6, value=1)}, r"edits\[0\]\.features\[0\]: "),
        ({"model": "nobody"}, "'nobody' is not served; served: reltrace-demo"),
    ],
)
def test_what_can_not_be_is_named(demo_address: str, given: dict, said: str) -> None:
    with reltrace.Client(demo_address) as client, pytest.raises(reltrace.TraceError, match=said):
        client.generate(PROMPTS[0], **given)


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
