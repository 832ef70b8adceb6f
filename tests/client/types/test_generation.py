"""What `generate` takes, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import reltrace
from reltrace import Steer
from reltrace.cli.generate import steer_of
from reltrace.types.generation import generation_jobs
from reltrace.types.request import Job


def jobs_of(**given: object) -> list[Job]:
    defaults: dict[str, object] = {
        "prompt": "a", "input_ids": None, "messages": None, "add_special_tokens": True, "steer": (),
        "max_new_tokens": 5, "temperature": 0.0, "top_p": 0.0, "seed": 0, "model": None,
    }  # fmt: skip
    return generation_jobs(**{**defaults, **given})  # type: ignore[arg-type]


def test_without_steering_there_is_one_job() -> None:
    (job,) = jobs_of(temperature=0.5, top_p=0.9, seed=7, model="m")
    asked = job.spec.generation
    assert (asked.max_new_tokens, asked.seed, job.spec.model) == (5, 7, "m")
    assert (asked.temperature, asked.top_p) == pytest.approx((0.5, 0.9))
    assert not job.spec.edits


def test_what_is_steered_is_written_unsteered_as_well() -> None:
    steered, plain = jobs_of(steer=Steer(1, 2, value=3))
    assert len(steered.spec.edits) == 1
    assert not plain.spec.edits
    assert steered.spec.generation == plain.spec.generation


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be a whole number from 1 to 1024, not 0"),
        ({"max_new_tokens": 5.0}, "max_new_tokens: must be a whole number from 1 to 1024, not 5.0"),
        ({"temperature": -1}, "temperature: must be a number from 0 to 100, not -1"),
        ({"temperature": float("nan")}, "temperature: must be a number from 0 to 100, not nan"),
        ({"top_p": 1.5}, "top_p: must be a number from 0 to 1, not 1.5"),
        ({"top_p": "all"}, "top_p: must be a number from 0 to 1, not 'all'"),
        ({"seed": -1}, "seed: must be a whole number from 0 to"),
        ({"steer": 3}, "steer: must be a sequence of Edit or Steer"),
        ({"steer": [3]}, r"steer\[0\]: must be an Edit or a Steer"),
        ({"prompt": None}, "prompt: is missing"),
        ({"input_ids": [1]}, "prompt: excludes input_ids"),
        ({"model": 3}, "model: must be str"),
    ],
)
def test_what_can_not_be_is_named(given: dict[str, object], said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        jobs_of(**given)


def test_the_server_s_fields_are_named_as_the_arguments_are() -> None:
    steered, plain = jobs_of(steer=Steer(9, 1, value=4))
    assert steered.rename("edits[0].layer") == "steer[0].layer"
    assert plain.rename("generation.max_new_tokens") == "max_new_tokens"
    assert plain.rename("input") == "prompt"


def test_steering_as_an_option() -> None:
    setting, scaling = steer_of("3:17=-2.5"), steer_of("0:4*0")
    assert (setting.layer, setting.neuron, setting.value, setting.scale) == (3, 17, -2.5, None)
    assert (scaling.layer, scaling.neuron, scaling.value, scaling.scale) == (0, 4, None, 0)


def test_a_direction_comes_from_a_file(tmp_path: Path) -> None:
    vector = np.array([0.5, -1.0, 2.0])
    file = tmp_path / "dogs*cats+1.npy"
    np.save(file, vector)
    plain, scaled = steer_of(f"2+{file}"), steer_of(f"2+{file}*-3")
    for steer, factor in ((plain, 1.0), (scaled, -3.0)):
        assert (steer.layer, steer.neuron) == (2, None)
        added = np.frombuffer(steer.edit().to_wire().direction, "<f4")
        assert added.tolist() == (factor * vector).tolist()


def test_a_file_without_a_direction_is_named(tmp_path: Path) -> None:
    table, several, pickled = (tmp_path / name for name in ("a.npy", "b.npz", "c.npy"))
    np.save(table, np.zeros((2, 2)))
    np.savez(several, a=np.zeros(2), b=np.zeros(2))
    np.save(pickled, np.array([{}]), allow_pickle=True)
    for path, said in (
        (table, "must be a vector"),
        (several, "holds several arrays"),
        (pickled, "was not written by numpy.save"),
        (tmp_path / "none.npy", "can not be read: No such file"),
        (tmp_path, "can not be read: Is a directory"),
    ):
        with pytest.raises(reltrace.InvalidArgument, match=said):
            steer_of(f"0+{path}")


@pytest.mark.parametrize(
    "text", ["", "3", "3:4", "3:4=x", "a:4=1", "3:4+1", "3:4=nan", "3+", "+a.npy", "3+none.npy*x"]
)
def test_steering_that_can_not_be_read(text: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"steer|value"):
        steer_of(text)
