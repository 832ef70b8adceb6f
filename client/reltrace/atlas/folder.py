"""The folder of an atlas: its lock, and the file of its state."""

from __future__ import annotations

import json
import re
import secrets
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from reltrace.atlas.merged import MergedSite
from reltrace.atlas.state import State, TokenCounts
from reltrace.storage.atomic_files import check_no_other_files, lock_folder, replace_file
from reltrace.storage.damaged_files import check_kinds
from reltrace.storage.tensor_files import write_tensors
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import SITES
from reltrace.types.errors import InvalidArgument, TraceError, invalid

ATLAS = "atlas.safetensors"
CORPUS = "corpus"
_FORMAT = 3
_UNFINISHED = "unfinished"
_SITE_ARRAYS = tuple(field.name for field in fields(MergedSite))
# Fields of `TokenCounts`, by their names in the file.
_COUNTS = {"words/places": "positions", "words/prompts": "prompts", "words/targets": "targets"}


class AtlasFolder:
    """The folder of an atlas. Its state is one file, replaced in one step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / ATLAS).exists()

    def read(self) -> State:
        """Read the state; raise InvalidArgument if there is no atlas, or it is damaged."""
        from safetensors import safe_open

        path = self.path / ATLAS
        try:
            with safe_open(path, "np") as file:
                metadata = (file.metadata() or {}).get("atlas")
                if metadata is None:
                    raise invalid("atlas", f"{path} is a safetensors file, but holds no atlas")
                about = json.loads(metadata)
                if about["format"] != _FORMAT:
                    raise invalid(
                        "atlas",
                        f"{self.path} is of format {about['format']}, which another version wrote; "
                        f"this one reads format {_FORMAT}: build it again",
                    )
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = _state(about, arrays)
            state.check()
            return state
        except FileNotFoundError:
            raise invalid("atlas", f"{self.path} holds none") from None
        except TraceError:
            raise
        except Exception as error:
            # Reading a damaged file may raise any error.
            raise damaged(path, error) from error

    def write(self, state: State) -> None:
        """Replace the state, durably and in one step."""
        arrays = {
            f"{site}/{name}": getattr(merged, name)
            for site, merged in state.sites.items()
            for name in _SITE_ARRAYS
        }
        arrays |= {name: getattr(state.counts, field) for name, field in _COUNTS.items()}
        about = {
            "format": _FORMAT,
            "about": state.about,
            "digests": dict(sorted(state.digests.items())),
            "vocabulary": dict(sorted(state.vocabulary.items())),
            "special": sorted(state.special),
            "skipped": dict(sorted(state.skipped.items())),
            "prompts": state.prompts,
            "tokens": state.tokens,
        }
        with replace_file(self.path / ATLAS) as file:
            write_tensors(file, arrays, {"atlas": json.dumps(about)})

    def lock(self) -> AbstractContextManager[None]:
        """Let one process at a time build here.

        Raises TraceError if another one does, or the folder can not be used.
        """
        busy = f"another process builds the atlas in {self.path}; stop it, or choose another folder"
        return lock_folder(self.path, busy)

    def begin_build(self) -> str:
        """Note that the atlas is being built; return the identity of this build.

        It stays the same until `finish_build`, however often the build is interrupted. Raises
        InvalidArgument if the folder holds something else.
        """
        if not self.exists:
            check_no_other_files(self.path, "atlas", CORPUS, _UNFINISHED)
        path = self.path / _UNFINISHED
        identity = path.read_text("ascii", "replace") if path.exists() else ""
        if not re.fullmatch("[0-9a-f]{32}", identity):
            identity = secrets.token_hex(16)
            with replace_file(path) as file:
                file.write(identity.encode())
        return identity

    def finish_build(self) -> None:
        """Note that the atlas is complete."""
        (self.path / _UNFINISHED).unlink(missing_ok=True)


def damaged(path: Path, why: object) -> InvalidArgument:
    return invalid("atlas", f"{path} is damaged: {why}")


def _state(about: dict[str, Any], arrays: dict[str, Array]) -> State:
    check_kinds(about, {"about": dict, "special": list, "prompts": int, "tokens": int})
    for name in ("digests", "vocabulary", "skipped"):
        check_kinds(about[name], dict.fromkeys(about[name], str))
    return State(
        about=about["about"],
        sites={
            site: MergedSite(**{name: arrays[f"{site}/{name}"] for name in _SITE_ARRAYS})
            for site in SITES
            if f"{site}/values" in arrays
        },
        digests={int(number): digest for number, digest in about["digests"].items()},
        vocabulary={int(token): text for token, text in about["vocabulary"].items()},
        special=set(about["special"]),
        skipped={int(number): why for number, why in about["skipped"].items()},
        prompts=about["prompts"],
        tokens=about["tokens"],
        counts=TokenCounts(**{field: arrays[name] for name, field in _COUNTS.items()}),
    )
