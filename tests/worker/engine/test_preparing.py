"""Jobs are checked before a pass runs, and every fault is named."""

from __future__ import annotations

from typing import Any

import pytest
from reference.loaded import Checkpoints, preparer
from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.jobs import Target, TargetRequest, Term, TraceJob, TraceRequest


def prepare(checkpoints: Checkpoints, spec: TraceRequest) -> TraceJob:
    return preparer(checkpoints.loaded("plain")).prepare(spec)


def faults(checkpoints: Checkpoints, *args: Any, **kwargs: Any) -> tuple[Violation, ...]:
    with pytest.raises(InvalidJob) as caught:
        prepare(checkpoints, TraceRequest(*args, **kwargs))
    for fault in caught.value.violations:
        assert f"{fault.field}: {fault.description}" in str(caught.value)
    return caught.value.violations


def only_fault(checkpoints: Checkpoints, *args: Any, **kwargs: Any) -> tuple[str, str]:
    (fault,) = faults(checkpoints, *args, **kwargs)
    return fault.field, fault.description


def test_text_gets_special_tokens_and_readable_ones(checkpoints: Checkpoints) -> None:
    job = prepare(checkpoints, TraceRequest("My cats é"))
    assert job.prompt.tokens[0] == "<s>"
    assert job.token_ids[0] == 0
    assert "".join(job.prompt.tokens[1:4]) == "My cats "
    # Two bytes of one character: neither decodes, so that they are named by what they are.
    assert job.prompt.tokens[4:] == ("<0xC3>", "<0xA9>")
    assert (job.sites, job.reduction, job.rule) == (("resid",), "token", "attnlrp")
    last = len(job.token_ids) - 1
    assert job.targets == (Target((Term(last, None),)),)


def test_ids_are_used_as_they_are(checkpoints: Checkpoints) -> None:
    job = prepare(checkpoints, TraceRequest((5, 319, 0), targets=(TargetRequest(position=-3),)))
    assert job.token_ids == (5, 319, 0)
    assert len(job.prompt.tokens) == 3
    assert job.targets[0].terms[0].position == 0


def test_the_whole_context_can_be_used(checkpoints: Checkpoints) -> None:
    assert len(prepare(checkpoints, TraceRequest((7,) * 128)).token_ids) == 128
    field, description = only_fault(checkpoints, (7,) * 129)
    assert field == "input_ids"
    assert description == "has 129 tokens; the model's context holds 128"


@pytest.mark.parametrize(("prompt", "field"), [("", "prompt"), ((), "input_ids")])
def test_an_empty_prompt_is_a_fault_even_where_special_tokens_are_added(
    checkpoints: Checkpoints, prompt: Any, field: str
) -> None:
    assert only_fault(checkpoints, prompt) == (field, "is empty; a trace needs at least one token")


def test_a_text_that_is_too_long_says_how_long(checkpoints: Checkpoints) -> None:
    field, description = only_fault(checkpoints, "x" * 200)
    assert (field, description) == ("prompt", "has 201 tokens; the model's context holds 128")


def test_text_that_is_not_unicode_is_a_fault(checkpoints: Checkpoints) -> None:
    field, description = only_fault(checkpoints, "a\ud800")
    assert field == "prompt"
    assert "not valid Unicode" in description


def test_each_id_out_of_range_is_named(checkpoints: Checkpoints) -> None:
    found = faults(checkpoints, (1, 320, 2, -1))
    assert [fault.field for fault in found] == ["input_ids[1]", "input_ids[3]"]
    assert found[0].description == "token id 320 is out of range; allowed: 0 to 319"


def test_unknown_names_list_what_is_allowed(checkpoints: Checkpoints) -> None:
    found = faults(checkpoints, "a", sites=("resid", "nose"), reduction="mean", rule="magic")
    assert [(fault.field, fault.description) for fault in found] == [
        (
            "sites[1]",
            "site 'nose' is unknown; allowed: "
            "embed, resid, resid_mid, attn_out, mlp_out, head, neuron",
        ),
        ("reduction", "reduction 'mean' is unknown; allowed: token, feature, topk, full"),
        ("rule", "rule 'magic' is unknown; allowed: attnlrp, cp_lrp, gradient"),
    ]


def test_a_site_named_twice_is_a_fault(checkpoints: Checkpoints) -> None:
    assert only_fault(checkpoints, "a", sites=("embed", "embed")) == (
        "sites[1]",
        "site 'embed' is named twice",
    )


def test_a_job_needs_targets(checkpoints: Checkpoints) -> None:
    found = faults(checkpoints, "a", sites=(), targets=())
    assert [fault.field for fault in found] == ["targets"]


def test_text_that_is_several_tokens_shows_how_it_was_split(checkpoints: Checkpoints) -> None:
    field, description = only_fault(
        checkpoints, "a", targets=(TargetRequest(), TargetRequest(token=" dogs!"))
    )
    dogs = checkpoints.loaded("plain").tokenizer.convert_tokens_to_ids("Ġdogs")
    mark = checkpoints.loaded("plain").tokenizer.convert_tokens_to_ids("!")
    assert field == "targets[1].token"
    assert description == (
        f"' dogs!' is not exactly one token but 2: ' dogs' ({dogs}), '!' ({mark}); "
        "to trace them all, ask for a continuation (continuation=' dogs!')"
    )


@pytest.mark.parametrize(
    ("target", "field", "description"),
    [
        (TargetRequest(token=""), "token", "'' is not exactly one token but 0"),
        (TargetRequest(token=320), "token", "token id 320 is out of range; allowed: 0 to 319"),
        (TargetRequest(token=-1), "token", "token id -1 is out of range; allowed: 0 to 319"),
        (
            TargetRequest(contrast=320),
            "contrast",
            "token id 320 is out of range; allowed: 0 to 319",
        ),
        (
            TargetRequest(token=4, contrast=4),
            "contrast",
            "is the token itself: the difference is always zero",
        ),
        (
            TargetRequest(position=3),
            "position",
            "position 3 is outside the prompt of 3 tokens; allowed: -3 to 2",
        ),
        (
            TargetRequest(position=-4),
            "position",
            "position -4 is outside the prompt of 3 tokens; allowed: -3 to 2",
        ),
        (TargetRequest(each=True), "each", "is for a continuation, and there is none"),
        (
            TargetRequest(continuation=""),
            "continuation",
            "is empty; it needs at least one response token",
        ),
        (
            TargetRequest(continuation=()),
            "continuation",
            "is empty; it needs at least one response token",
        ),
        (
            TargetRequest(continuation=(3, 400)),
            "continuation[1]",
            "token id 400 is out of range; allowed: 0 to 319",
        ),
        (
            TargetRequest(continuation=(7,) * 127),
            "continuation",
            "prompt and continuation need 129 tokens (3 and 127, without the last); "
            "the model's context holds 128",
        ),
    ],
)
def test_a_target_that_can_not_be_is_named(
    checkpoints: Checkpoints, target: TargetRequest, field: str, description: str
) -> None:
    found = only_fault(checkpoints, (5, 6, 7), targets=(target,))
    assert found == (f"targets[0].{field}", description)


def test_a_continuation_excludes_token_position_and_contrast(checkpoints: Checkpoints) -> None:
    target = TargetRequest(token=3, position=0, contrast=4, continuation=(5, 6))
    found = faults(checkpoints, (5, 6, 7), targets=(target,))
    assert {fault.field for fault in found} == {
        "targets[0].token",
        "targets[0].position",
        "targets[0].contrast",
    }


def test_a_job_has_one_continuation(checkpoints: Checkpoints) -> None:
    targets = (TargetRequest(continuation=(5, 6)), TargetRequest(continuation=(5, 7)))
    field, description = only_fault(checkpoints, (5, 6, 7), targets=targets)
    assert field == "targets[1].continuation"
    assert description == "differs from the continuation of another target; one job has one"


def test_a_continuation_is_read_one_position_before_each_of_its_tokens(
    checkpoints: Checkpoints,
) -> None:
    targets = (
        TargetRequest(continuation=(8, 9, 10)),
        TargetRequest(continuation=(8, 9, 10), each=True, logprob=True),
        TargetRequest(),
    )
    job = prepare(checkpoints, TraceRequest((5, 6, 7), targets=targets))
    assert job.token_ids == (5, 6, 7, 8, 9)
    assert len(job.prompt.tokens) == 5
    terms = (Term(2, 8), Term(3, 9), Term(4, 10))
    assert job.targets == (
        Target(terms, continuation_ids=(8, 9, 10)),
        *(Target((t,), None, True, (i,)) for t, i in zip(terms, (8, 9, 10), strict=True)),
        Target((Term(2, None),)),
    )


def test_a_continuation_may_end_beyond_the_context(checkpoints: Checkpoints) -> None:
    """Its last token is only predicted, never read."""
    target = TargetRequest(continuation=(7, 8))
    assert len(prepare(checkpoints, TraceRequest((7,) * 127, targets=(target,))).token_ids) == 128


def test_all_faults_are_told_at_once(checkpoints: Checkpoints) -> None:
    targets = (TargetRequest(token=999), TargetRequest(position=50))
    found = faults(checkpoints, (1, 999), sites=("nose",), targets=targets)
    assert [fault.field for fault in found] == [
        "sites[0]",
        "input_ids[1]",
        "targets[0].token",
        "targets[1].position",
    ]
