"""Texts as a server sends them: a word per token, the word being its id."""

from reltrace_proto.v1 import types_pb2


def words(ids: list[int]) -> list[str]:
    return [f" {token}" for token in ids]


def draft(job_id: str, ids: list[int], first: int = 0, attempt: int = 1) -> types_pb2.Draft:
    return types_pb2.Draft(
        job_id=job_id, attempt=attempt, first=first, token_ids=ids, tokens=words(ids),
        text="".join(words(ids)),
    )  # fmt: skip


def written(job_id: str, ids: list[int]) -> list[types_pb2.ResultChunk]:
    """The result of a job that wrote these tokens."""
    chunk = types_pb2.ResultChunk(job_id=job_id, number=1)
    chunk.header.provenance.model = "fake"
    chunk.generated.CopyFrom(
        types_pb2.Generated(
            text="".join(words(ids)), token_ids=ids, tokens=words(ids), logprobs=[-1.0] * len(ids)
        )
    )
    chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
    chunk.end.attempt = 1
    return [chunk]
