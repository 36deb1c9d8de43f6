"""Find the folder of a stage in the folder of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.errors import ConfigurationError, JournalError
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import RunFolder, open_folder
from .next_steps import FINISHED

OPERATOR_FILE: Final = "operator.json"
"""File in the folder of a stage that is an operator."""

_LEVEL: Final = re.compile(r"([a-z][a-z0-9_]{0,31})(?:/([1-9][0-9]{0,8}))?")


def find_run(path: Path, stage: str | None) -> Path:
    """Return the folder of the run that a command shows; blocks.

    Args:
        path: A run folder, or the folder of a pipeline.
        stage: Of a pipeline, ``NAME`` or ``NAME/LEVEL``; None is the last stage with results.

    Raises:
        ConfigurationError: There is no such folder, stage or level, or the folder is a single run.
    """
    folder = open_folder(path)
    if not folder.is_pipeline:
        if stage is not None:
            raise ConfigurationError(f"--stage {stage}: {path} is a single run without stages")
        return path
    names = folder.read_provenance()["stages"]
    if stage is None:
        begun = [name for name in names if RunFolder(folder.stages / name).provenance.exists()]
        if not begun:
            raise ConfigurationError(f"{path}: no stage has results yet")
        return folder.stages / str(begun[-1])
    found = _LEVEL.fullmatch(stage)
    if found is None or found[1] not in names:
        msg = f"--stage {stage}: the stages of {path} are {', '.join(names)}; add /2 for a level"
        raise ConfigurationError(msg)
    run = folder.stages / found[1]
    if found[2] is not None:
        run = run / "levels" / found[2]
    if not RunFolder(run).provenance.exists():
        levels = sum(1 for _ in list_levels(folder.stages / found[1]))
        more = (
            f"; it has {count_nouns(levels, 'level')}, e.g. --stage {found[1]}/1" if levels else ""
        )
        raise ConfigurationError(f"--stage {stage}: it has no results yet{more}")
    return run


def is_operator(path: Path) -> bool:
    """Return True if a folder is that of an operator in its pipeline; blocks."""
    return (path / OPERATOR_FILE).exists() and RunFolder(path).read_place() is not None


def read_operator(path: Path) -> dict[str, Any] | None:
    """Return the settings of the operator of a stage; None if the folder is that of another run.

    Raises:
        JournalError: The file is damaged.
    """
    if not is_operator(path):
        return None
    file = path / OPERATOR_FILE
    try:
        return dict(orjson.loads(file.read_bytes())["reduce"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{file}: cannot be read: {error}") from None


def list_levels(stage: Path) -> Iterator[RunFolder]:
    """Yield the levels of a stage that were begun, in order; blocks."""
    numbers = (int(one.name) for one in (stage / "levels").glob("[1-9]*") if one.name.isdigit())
    for number in sorted(numbers):
        yield RunFolder(stage / "levels" / str(number))


def describe_stage(run: RunFolder) -> str | None:
    """Return the stage of a run of a pipeline as ``--stage`` takes it, and the level; blocks.

    Returns:
        None if the run is no part of a pipeline.
    """
    place = run.read_place()
    if place is None:
        return None
    level = run.read_provenance().get("level")
    return place.stage if level is None else f"{place.stage}/{run.path.name} ({level})"


def list_stage_runs(folder: RunFolder) -> list[RunFolder]:
    """Return the runs of a pipeline that ask the model, in order; blocks.

    Raises:
        JournalError: Its provenance is damaged.
    """
    found = list[RunFolder]()
    for name in folder.read_provenance()["stages"]:
        stage = RunFolder(folder.stages / name)
        runs = list_levels(stage.path) if is_operator(stage.path) else [stage]
        found += [run for run in runs if run.provenance.exists()]
    return found


def find_models(folder: RunFolder, about: Mapping[str, Any]) -> str:
    """Return the models of a run, or those that the stages of a pipeline have used; blocks.

    Args:
        folder: The folder.
        about: Its provenance.
    """
    runs = list_stage_runs(folder) if folder.is_pipeline else ()
    found = sorted({str(run.read_provenance()["model"]) for run in runs})
    return ", ".join(filter(None, found)) or str(about["model"])


def is_finished(folder: RunFolder) -> bool:
    """Return True if a run has ended and its results, if it is no level, are written; blocks.

    Raises:
        JournalError: Its provenance is damaged.
    """
    if not folder.provenance.exists():
        return False
    about = folder.read_provenance()
    has_results = about.get("level") is not None or folder.aggregate.exists()
    last = about["sessions"][-1] if about["sessions"] else {}
    return has_results and last.get("outcome") == FINISHED


def is_pipeline_finished(folder: RunFolder) -> bool:
    """Return True if all stages of a pipeline have ended; blocks.

    Raises:
        JournalError: A provenance is damaged.
    """
    names = folder.read_provenance()["stages"]
    return all(is_finished(RunFolder(folder.stages / name)) for name in names)


def check_single_run(folder: RunFolder) -> None:
    """Check that a run is not a part of a pipeline, which alone can continue it; blocks.

    Raises:
        ConfigurationError: It is.
    """
    place = folder.read_place()
    if place is not None:
        msg = (
            f"{folder.path}: is stage {place.stage!r} of a pipeline; continue the pipeline: "
            f"fanfold resume {place.root}"
        )
        raise ConfigurationError(msg)
