"""What labels tell of held-out text: against looking at every place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reltrace
from client.make_atlas import make_atlas
from proof.detection import Detection

TEXTS = ["a cat sat here", "my cat ran", "the dog ran home", "two old dogs sleep", "cat food now"]
FILLER = ["we eat the pie", "they went to town"] * 60
NEURONS = 150
PLACES = {
    # At "cat"; before "ran"; after "old"; at what every text has.
    (0, 0): [(0, 1, 0.9), (1, 1, 0.8), (4, 0, 0.7)],
    (0, 1): [(1, 1, 0.9), (2, 1, 0.8)],
    (1, 0): [(3, 2, 0.9), (3, 3, 0.8)],
}


def atlas(folder: Path, texts: list[str]) -> reltrace.Atlas:
    prompts = [(text, "") for text in texts]
    return make_atlas(folder, prompts, PLACES, next_tokens=True, neurons=NEURONS)


@pytest.fixture
def detection(tmp_path: Path) -> Detection:
    """Labels of some texts, and places of the same texts among others."""
    return Detection(
        atlas(tmp_path / "labels", [*TEXTS, *FILLER]),
        atlas(tmp_path / "held-out", [*TEXTS, *FILLER[:20]]),
    )


def test_the_area_is_that_of_holding_at_strong_places_against_all(detection: Detection) -> None:
    """
    Given labels "cat" and "→ ran"
    I expect the areas that counting gives; without a label a half.
    """
    texts = [*TEXTS, *FILLER[:20]]
    counted = sum(len(text.split()) - 1 for text in texts)
    areas = detection.areas(detection.own(), detection.places("relevance+"))
    assert detection._labels.label(0, 0) == "cat"
    assert detection._labels.label(0, 1) == "→ ran"
    # Of three places of the first, all are at the word; of the second, both are before it.
    assert areas[0, 0] == pytest.approx((1 + 1 - 2 / counted) / 2)
    assert areas[0, 1] == pytest.approx((1 + 1 - 2 / counted) / 2)
    assert areas[0, 2] == 0.5
    assert areas[1, 1] == 0.5


def test_the_label_of_another_neuron_is_measured_at_the_same_places(detection: Detection) -> None:
    texts = [*TEXTS, *FILLER[:20]]
    counted = sum(len(text.split()) - 1 for text in texts)
    swapped = np.tile(np.arange(NEURONS), (2, 1))
    swapped[0, :2] = 1, 0
    areas = detection.areas(swapped, detection.places("relevance+"))
    # "→ ran" at the places of the first neuron: one of three; "cat" at those of the second: one.
    assert areas[0, 0] == pytest.approx((1 + 1 / 3 - 2 / counted) / 2)
    assert areas[0, 1] == pytest.approx((1 + 1 / 2 - 2 / counted) / 2)


def test_neurons_are_counted_whose_labels_beat_those_of_others(detection: Detection) -> None:
    found = detection.measure("relevance+", 0)
    assert found.labelled.of == 2 * NEURONS
    assert found.labelled.mean == found.beats.mean == 2 / found.labelled.of
    assert found.beats_by_chance.mean == 0
    assert found.area > found.by_chance
    (first, *others) = detection.examples(5, 2)
    assert first.label in ("cat", "→ ran")
    assert all(one.label != first.label for one in others)
    assert "cat" in first.contexts[0]
