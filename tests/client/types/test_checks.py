"""What an argument may be, and what is said of one that is not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import reltrace
from reltrace.types.checks import check_id, check_text, number, whole_number


@pytest.mark.parametrize("given", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_whole_numbers_of_any_kind_are_ints(given: object) -> None:
    assert (found := whole_number(given, "k", 1, 3)) == 3
    assert type(found) is int


@pytest.mark.parametrize(
    ("given", "bounds", "message"),
    [
        (0, (1, 3), "k: must be a whole number from 1 to 3, not 0"),
        (4, (1, 3), "k: must be a whole number from 1 to 3, not 4"),
        (np.int64(4), (1, 3), "k: must be a whole number from 1 to 3, not 4"),
        (-1, (), "k: must be a whole number from 0 on, not -1"),
        (1.0, (), "k: must be a whole number from 0 on, not 1.0"),
        (True, (), "k: must be a whole number from 0 on, not True"),
        ("1", (), "k: must be a whole number from 0 on, not '1'"),
        (None, (), "k: must be a whole number from 0 on, not None"),
        (np.array([1, 2]), (), "k: must be a whole number from 0 on, not array([1, 2])"),
    ],
)
def test_what_is_no_such_whole_number(given: object, bounds: tuple[int], message: str) -> None:
    with pytest.raises(reltrace.InvalidArgument) as caught:
        whole_number(given, "k", *bounds)
    assert str(caught.value) == message
    assert [violation.field for violation in caught.value.violations] == ["k"]


@pytest.mark.parametrize("given", [0.5, np.float32(0.5), np.float16(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind_are_floats(given: object) -> None:
    assert (found := number(given, "x", 0, 1)) == 0.5
    assert type(found) is float


@pytest.mark.parametrize(
    "given",
    [-0.1, 1.1, 10**400, float("nan"), float("inf"), True, "0.5", None, 1j, np.array([0.5])],
)
def test_what_is_no_such_number(given: object) -> None:
    with pytest.raises(reltrace.InvalidArgument) as caught:
        number(given, "x", 0, 1)
    assert str(caught.value) == f"x: must be a number from 0 to 1, not {given!r}"


def test_ids_may_be_whole_numbers_of_numpy() -> None:
    found = check_id(np.int64(5), "id")
    assert (found, type(found)) == (5, int)
    assert check_id(np.str_("a"), "id") == "a"
    for wrong in (np.bool_(True), np.float32(5), True, 5.0, None):
        with pytest.raises(reltrace.InvalidArgument, match="id: must be text or a whole number"):
            check_id(wrong, "id")


def test_text_is_not_empty_and_has_bytes() -> None:
    check_text("\0 ☃", "t")
    with pytest.raises(reltrace.InvalidArgument, match=r"^t: must not be empty$"):
        check_text("", "t")
    with pytest.raises(reltrace.InvalidArgument, match=r"^t: character 1 is a lone surrogate"):
        check_text("a\ud800", "t")


@pytest.mark.parametrize("name", ["", "a", 0, -1])
def test_an_id_is_text_or_a_number(name: str | int) -> None:
    assert check_id(name, "id") == name


@pytest.mark.parametrize("name", [None, True, 1.5, b"x", ("a",)])
def test_what_is_no_id(name: object) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"^id: must be text or a whole number, "):
        check_id(name, "id")
