"""`reltrace tokenize`."""

from __future__ import annotations

import json
import re

from cli.conftest import Run
from fake_server import FakeServer


def test_tokens_are_shown(command: Run, server: FakeServer) -> None:
    code, out, _ = command("tokenize", "My cats", "--no-add-special-tokens", "--model", "fake")
    assert code == 0
    assert re.search(r"^ *1 +1 +' cats' +3:7 *$", out, re.MULTILINE)
    spec = server.requests[0].jobs[0]
    assert (spec.tokenize_only, spec.add_special_tokens, spec.model) == (True, False, "fake")
    found = json.loads(command("tokenize", "My cats", "--json")[1])
    assert found["tokens"] == ["<s>", "My", "cats"]
    assert found["offsets"] == [[0, 3], [4, 6], [7, 11]]
