"""Counts of tokens, and which stand out: against the formula, written out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace.atlas.labels import log_odds
from reltrace.atlas.state import TokenCounts

PROMPTS = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=8)


def counted(prompts: list[list[int]], targets: list[int]) -> TokenCounts:
    words = TokenCounts()
    add(words, prompts, targets)
    return words


def add(words: TokenCounts, prompts: list[list[int]], targets: list[int]) -> None:
    ids = np.array([token for prompt in prompts for token in prompt], np.int32)
    explained = np.array([target for target in targets if target >= 0], np.int32)
    # Token 3 is not counted.
    words.add(ids, np.array([len(prompt) for prompt in prompts], np.int32), ids != 3, explained)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(prompts=PROMPTS, cut=st.integers(0, 8))
def test_every_token_is_counted_whatever_the_slices(prompts: list[list[int]], cut: int) -> None:
    """
    Given prompts in two slices, where one without tokens was left out
    I expect the places of every token that is counted, the prompts that have it, and those it is
    explained of.
    """
    targets = [(sum(prompt) % 12 if prompt else -1) for prompt in prompts]
    words = TokenCounts()
    add(words, prompts[:cut], targets[:cut])
    add(words, prompts[cut:], targets[cut:])
    for token in range(12):
        expected = (
            sum(prompt.count(token) for prompt in prompts) if token != 3 else 0,
            sum(token in prompt for prompt in prompts),
            targets.count(token),
        )
        found = [
            int(counts[token]) if token < len(counts) else 0
            for counts in (words.positions, words.prompts, words.targets)
        ]
        assert tuple(found) == expected


def by_hand(inside: int, of: int, everywhere: int, of_all: int) -> float:
    """Equations 16, 19 and 22 of Monroe et al., with the corpus' frequencies as the prior of 10."""
    prior = 10 * everywhere / of_all
    delta, variance = 0.0, 0.0
    for sign, seen, total in ((1, inside, of), (-1, everywhere, of_all)):
        yes, no = seen + prior, total + 10 - seen - prior
        delta += sign * math.log(yes / no)
        variance += 1 / yes + 1 / no
    return delta / math.sqrt(variance)


@pytest.mark.parametrize(
    ("inside", "of", "everywhere", "of_all"),
    [
        (16, 16, 40, 20_000),
        (16, 16, 16, 20_000),
        (1, 16, 1, 100),
        (0, 16, 50, 100),
        (8, 16, 50, 99),
    ],
)
def test_log_odds_are_those_of_the_formula(
    inside: int, of: int, everywhere: int, of_all: int
) -> None:
    found = log_odds(np.array([inside]), of, np.array([everywhere]), of_all)
    assert found[0] == pytest.approx(by_hand(inside, of, everywhere, of_all), rel=1e-9)


def test_what_is_everywhere_stands_out_nowhere() -> None:
    found = log_odds(np.array([16, 16, 16]), 16, np.array([1000, 800, 20]), 1000)
    assert abs(found[0]) < 1e-3
    assert found[1] < 3 < found[2]


def test_what_is_nowhere_else_stands_out_most() -> None:
    only, often = log_odds(np.array([16, 16]), 16, np.array([16, 200]), 20_000)
    assert only > often > 3
