"""Where a corpus is cut into slices."""

from itertools import accumulate, islice

import pytest
import reltrace
from reltrace.atlas.slices import Slice, first_prompts, sizes, slices
from reltrace.types.prompt import chat_to_wire
from reltrace_proto.v1 import types_pb2


@pytest.mark.parametrize("most", [1, 15, 16, 40, 1024])
def test_slices_grow_up_to_a_bound(most: int) -> None:
    """
    Given a bound
    I expect small slices first, none over the bound nor over a quarter of what was before it (or
    16), before long the bound itself; and the numbers of their first prompts to be their sums.
    """
    found = list(islice(sizes(most), 60))
    before = 0
    for size in found:
        assert size <= min(most, max(16, before // 4))
        assert size == most or size >= 16
        before += size
    assert found[40:] == [most] * 20
    assert first_prompts(60, most).tolist() == [0, *accumulate(found)]
    assert first_prompts(0, most).tolist() == [0]


def chat(*messages: tuple[str, str]) -> types_pb2.Chat:
    return chat_to_wire([{"role": role, "content": content} for role, content in messages])


def test_a_prompt_is_named_by_its_number_in_the_corpus() -> None:
    given = ["a", {"prompt": ""}, {"messages": [{"role": "user", "content": "b"}]}, "c", "\udfff"]
    found = slices(iter(given), 2)
    assert next(found) == Slice(0, 0, ["a", ""])
    assert next(found) == Slice(1, 2, [chat(("user", "b")), "c"])
    with pytest.raises(reltrace.InvalidArgument, match=r"prompts\[4\]: character 0"):
        next(found)


def test_slices_differ_by_what_is_a_prompt_and_a_message() -> None:
    several: list[list[str | types_pb2.Chat]] = [
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
        ["", "abc"],
        ["abc", ""],
        [chat(("abc", ""))],
        [chat(("ab", "c"))],
        [chat(("a", "b"), ("c", ""))],
        [chat(("a", "b")), chat(("c", ""))],
        ['[["abc", ""]]'],
    ]
    assert len({Slice(0, 0, prompts).digest for prompts in several}) == len(several)
    # As earlier versions wrote it: an atlas of texts goes on.
    assert Slice(0, 0, ["ab", "c"]).digest == (
        "43ee655579de01ca739b3f95c1c2d3f46d353b2c0df818064ea594506cdb2617"
    )
