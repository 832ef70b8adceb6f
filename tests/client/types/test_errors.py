"""What a failure looks like where it is printed or shown."""

from __future__ import annotations

import reltrace
from fake_server import FakeServer


def test_a_failure_is_printed_with_its_item_and_reason(
    server: FakeServer, client: reltrace.Client
) -> None:
    (failure,) = client.trace_many([{"id": "row 7", "prompt": ""}])
    assert isinstance(failure, reltrace.Failure)
    assert str(failure) == "InvalidArgument: item 'row 7': prompt: must not be empty"


def test_a_notebook_shows_a_failure_as_text() -> None:
    """An error may quote a prompt, and a prompt may be markup."""
    error = reltrace.JobFailed("<script>alert('a & b')</script>")
    shown = reltrace.Failure("x", error)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "JobFailed" in shown
