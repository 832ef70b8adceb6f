from hypothesis import given
from hypothesis import strategies as st
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.api.utf8 import undecodable_field

# Valid UTF-8 of one byte per letter, so that it can be overwritten in place.
MARK = "@@@@"
BROKEN = b"\xff\xfe\xfd\xfc"


def broken(message) -> bytes:
    return message.SerializeToString().replace(MARK.encode(), BROKEN)


def test_each_place_is_named() -> None:
    ref = types_pb2.TokenRef(text=MARK)
    target = types_pb2.Target(contrast=ref)
    places = {
        "idempotency_key": trace_pb2.SubmitJobsRequest(idempotency_key=MARK),
        "jobs[0].prompt": trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt=MARK)]),
        "jobs[1].sites[2]": trace_pb2.SubmitJobsRequest(
            jobs=[types_pb2.JobSpec(), types_pb2.JobSpec(sites=["a", "b", MARK])]
        ),
        "jobs[0].targets[0].contrast.text": trace_pb2.SubmitJobsRequest(
            jobs=[types_pb2.JobSpec(targets=[target])]
        ),
    }
    for path, message in places.items():
        assert undecodable_field(message.DESCRIPTOR, broken(message)) == path


def test_inside_a_worker_message() -> None:
    message = worker_pb2.WorkRequest(hello=worker_pb2.Hello(worker_id=MARK))
    assert undecodable_field(message.DESCRIPTOR, broken(message)) == "hello.worker_id"


def test_what_is_no_message_has_no_field() -> None:
    assert undecodable_field(trace_pb2.SubmitJobsRequest.DESCRIPTOR, b"\xff\xff\xff") is None


@given(st.text(), st.lists(st.text(), max_size=3))
def test_valid_text_is_never_named(prompt: str, sites: list[str]) -> None:
    message = trace_pb2.SubmitJobsRequest(
        jobs=[types_pb2.JobSpec(prompt=prompt, sites=sites)], idempotency_key=prompt
    )
    assert undecodable_field(message.DESCRIPTOR, message.SerializeToString()) is None


@given(st.binary(max_size=64))
def test_any_bytes_are_survived(data: bytes) -> None:
    undecodable_field(trace_pb2.SubmitJobsRequest.DESCRIPTOR, data)
