"""What the command line says of models."""

from pathlib import Path

import pytest
from reltrace_worker.demo import DEMO_MODEL
from reltrace_worker.demo import path as demo_path
from reltrace_worker.errors import ModelError
from reltrace_worker.serving import ModelSource, sources


def test_hub_ids_folders_and_the_demo_model(tmp_path: Path) -> None:
    folder = tmp_path / "model@home"
    folder.mkdir()
    assert sources(["demo", "org/model@v2", "org/other", str(folder)], [], None) == [
        ModelSource(str(demo_path()), None, DEMO_MODEL),
        ModelSource("org/model", "v2", None),
        ModelSource("org/other", None, None),
        # A folder may have an @ in its name.
        ModelSource(str(folder), None, None),
    ]


def test_names_and_the_revision_of_a_single_model() -> None:
    assert sources(["org/model"], ["mine"], "v2") == [ModelSource("org/model", "v2", "mine")]
    assert sources(["demo", "org/b"], ["x", "y"], None)[1].name == "y"


@pytest.mark.parametrize(
    ("models", "names", "revision", "message"),
    [
        (["a", "b"], ["one"], None, "--name is given 1 times for 2 models; give all or none"),
        (["a", "b"], [], "v1", "--revision is for a single model; of several, write --model ID@"),
        (["a@v1"], [], "v2", "--model a@v1 and --revision v2 both name a revision"),
    ],
)
def test_what_does_not_go_together_is_refused(
    models: list[str], names: list[str], revision: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        sources(models, names, revision)
