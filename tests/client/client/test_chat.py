"""Conversations, tokens and what a reader is told of them, against a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reltrace
from fake_results import failed_chunk
from fake_server import FakeServer
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Cats or dogs?"},
]
TOKENS = ["<system>", "Be", "brief.", "<user>", "Cats", "or", "dogs?"]
TURNS = (reltrace.Turn("system", 1, 3), reltrace.Turn("user", 4, 7))


def check(trace: reltrace.Trace | reltrace.Tokens) -> None:
    assert trace.tokens == TOKENS
    assert trace.text == " ".join(TOKENS)
    assert [trace.text[first:stop] for first, stop in trace.offsets] == TOKENS
    assert trace.offsets.dtype == np.int64
    assert trace.turns == TURNS
    assert trace.special_positions == (0, 3)
    assert trace.hints == ("the conversation was read by a fake template",)


def test_a_conversation_is_traced(client: reltrace.Client) -> None:
    trace = client.trace(messages=MESSAGES)
    check(trace)
    likeliest, other = trace.target.candidates
    assert likeliest == ("dogs", 7, 3.5, 0.75)
    assert (other.token, other.probability) == ("cats", 0.125)


def test_conversations_among_many(client: reltrace.Client) -> None:
    items = [{"messages": MESSAGES, "id": "chat"}, "a b", {"messages": []}]
    chat, plain, wrong = client.trace_many(items, ordered=True, add_special_tokens=False)
    assert isinstance(chat, reltrace.Trace)
    check(chat)
    assert isinstance(plain, reltrace.Trace)
    assert (plain.tokens, plain.turns) == (["a", "b"], ())
    assert isinstance(wrong, reltrace.Failure)
    assert "messages: must have at least one message" in str(wrong)


def test_tokens_without_a_pass(server: FakeServer, client: reltrace.Client) -> None:
    check(client.tokenize(messages=MESSAGES, model="m"))
    with_bos = client.tokenize("a b")
    assert (with_bos.tokens, len(with_bos)) == (["<s>", "a", "b"], 3)
    assert client.tokenize("a b", add_special_tokens=False).tokens == ["a", "b"]
    asked = [request.jobs[0] for request in server.requests]
    assert all(spec.tokenize_only and not spec.targets and not spec.sites for spec in asked)
    server.wait_acknowledged()


async def test_tokens_for_asyncio(server: FakeServer) -> None:
    async with reltrace.AsyncClient(server.address) as client:
        check(await client.tokenize(messages=MESSAGES))


def test_a_fault_in_a_message_is_named_as_the_caller_named_it(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.faults = lambda spec: [("chat.messages[1].role", "must alternate")]
    with pytest.raises(reltrace.InvalidArgument, match=r"^messages\[1\]\.role: must alternate"):
        client.trace(messages=MESSAGES)
    server.faults = lambda spec: []
    server.run = lambda spec, job: [
        failed_chunk(
            job, types_pb2.JOB_STATE_FAILED, code_pb2.INVALID_ARGUMENT, "has no template", "chat"
        )
    ]
    for call in (client.trace, client.tokenize, client.generate):
        with pytest.raises(reltrace.InvalidArgument, match=r"^messages: has no template"):
            call(messages=MESSAGES)


def test_offsets_that_do_not_fit_are_refused(server: FakeServer, client: reltrace.Client) -> None:
    def run(spec: types_pb2.JobSpec, job: str) -> list[types_pb2.ResultChunk]:
        chunk = types_pb2.ResultChunk(job_id=job, number=1)
        chunk.header.tokens.extend(["a", "b"])
        chunk.header.offsets.extend([0, 1])
        chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
        return [chunk]

    server.run = run
    with pytest.raises(reltrace.ProtocolError, match="2 tokens came back with 2 offsets"):
        client.tokenize("a b")


def test_all_of_it_is_saved(client: reltrace.Client, tmp_path: Path) -> None:
    trace = client.trace(messages=MESSAGES)
    loaded = reltrace.Trace.load(trace.save(tmp_path / "trace.safetensors"))
    check(loaded)
    assert loaded.target == trace.target
    about = trace.to_dict()
    assert about["target"]["candidates"][0] == {
        "token": "dogs", "token_id": 7, "logit": 3.5, "probability": 0.75,
    }  # fmt: skip
    assert about["offsets"][1] == [9, 11]
    assert about["turns"][1] == {"role": "user", "first": 4, "stop": 7}
