"""The proofs on SmolLM2, smaller than `make proof` has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import reltrace
from bench.service import serving
from proof import names
from proof.one_neuron import scale_one
from proof.real import trials
from proof.sentences import SENTENCES
from reference.real_models import RealModels
from reltrace.evaluation.scores import Mean

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def client(real_models: RealModels) -> Iterator[reltrace.Client]:
    """A service with SmolLM2."""
    real_models.gguf("smollm2")
    with serving("smollm2", RELTRACE_THREADS="1") as address, reltrace.Client(address) as client:
        yield client


def above_0(mean: Mean) -> bool:
    return mean.mean - mean.margin > 0


def test_rules_are_told_from_chance_on_a_real_model(client: reltrace.Client) -> None:
    """
    Given countries whose capital is asked for, sentences with two names, and plain English
    If tokens and neurons are taken out as each rule orders them
    I expect AttnLRP's order to tell what the prediction rests on, and the known answer to be its
    most relevant token more often than by chance.
    """
    found = {(t.prompts, t.off): t for t in trials(client, 6, names.sentences(6, 0), 0, False)}
    assert list(found) == [
        ("capitals", "embed"),
        ("names", "embed"),
        ("sentences", "embed"),
        ("sentences", "neuron"),
    ]
    for (prompts, off), trial in found.items():
        rules = {judged.rule: judged for judged in trial.rules}
        assert list(rules) == ["attnlrp", "cp_lrp", "gradient", "random"]
        assert trial.count == 6
        assert above_0(rules["attnlrp"].area), (prompts, off)
        assert rules["attnlrp"].area.mean > rules["random"].area.mean, (prompts, off)
        if prompts == "sentences":
            assert rules["attnlrp"].hit is None
        else:
            assert rules["attnlrp"].hit.mean > rules["random"].hit.mean + 0.3
            assert rules["attnlrp"].mass.mean > rules["random"].mass.mean


def test_the_indirect_object_is_what_its_name_rests_on(client: reltrace.Client) -> None:
    """
    Given sentences of two names, of which the indirect object's follows, in both orders
    If the difference of the names' logits is traced by both LRP rules
    I expect relevance for the indirect object, against the subject where it is named first, and for
    it where it is named again, which excludes it.
    """
    for shares in names.shares(client, names.sentences(8, 0)):
        assert shares.solved.mean == 1
        if shares.rule != "gradient":
            assert above_0(shares.parts["indirect object"]), shares
            assert shares.parts["subject"].mean + shares.parts["subject"].margin < 0, shares
            assert above_0(shares.parts["subject again"]), shares


def test_one_neuron_decides_a_word(client: reltrace.Client) -> None:
    """
    Given the neuron that is most relevant to a predicted word, among 46,080
    If it is reversed
    I expect another word more often than with a neuron of chance, and to read it in the text.
    """
    found = scale_one(client, SENTENCES[:16], -1.0, 4, 0)
    assert above_0(found.more["by chance"])
    assert found.changed["relevant here"].mean > found.changed["relevant elsewhere"].mean
    assert any(text.before.split()[0] != text.after.split()[0] for text in found.texts)
