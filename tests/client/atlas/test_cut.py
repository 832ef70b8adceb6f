"""Where a corpus is cut into slices."""

from itertools import accumulate, islice

import pytest
from reltrace._atlas.cut import firsts, sizes


@pytest.mark.parametrize("most", [1, 15, 16, 40, 1024])
def test_slices_grow_up_to_a_bound(most: int) -> None:
    """
    Given a bound
    I expect small slices first, none over the bound nor over half of what was before it (or 16),
    before long the bound itself; and the numbers of their first prompts to be their sums.
    """
    found = list(islice(sizes(most), 40))
    before = 0
    for size in found:
        assert size <= min(most, max(16, before // 2))
        assert size == most or size >= 16
        before += size
    assert found[20:] == [most] * 20
    assert firsts(40, most).tolist() == [0, *accumulate(found)]
    assert firsts(0, most).tolist() == [0]
