"""Images: sent by this process and by workers, part of the question, and kept nowhere."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.run_folder import open_folder
from fanfold.configs.loader import load_config
from fanfold.graphs.run.extend import Extension, ExtensionPlan
from fanfold.graphs.run.prepare import prepare_run
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.unit.inputs.test_images import make_png

pytestmark = pytest.mark.integration

COUNT = 12


def with_images(lab: Lab, **settings: Any) -> Lab:
    """Ask the same about a figure of each item; the last item's is missing."""
    for n in range(COUNT - 1):
        (lab.home / f"{n}.png").write_bytes(make_png(280, 280, b"%d" % n * 2000))
    with lab.input.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "figure"])
        writer.writerows([f"i{n}", f"{n}.png"] for n in range(COUNT))
    kinds = {"kind": {"enum": ["a", "b", "c"]}}
    schema: dict[str, Any] = {"type": "object", "properties": kinds, "required": ["kind"]}
    schema["additionalProperties"] = False
    lab.config["task"] = {"prompt": "What is this?", "images": ["figure"], "schema": schema}
    lab.config["limits"]["hedge"] = False
    lab.config |= {"reduce": [{"op": "histogram", "field": "kind"}], **settings}
    return lab


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "journal").glob("*.jsonl"))
    found = [orjson.loads(line) for f in files for line in f.read_bytes().splitlines()[1:]]
    return sorted(found, key=lambda record: int(record["index"]))


def contents(folder: Path) -> Iterator[bytes]:
    return (file.read_bytes() for file in folder.rglob("*") if file.is_file())


async def test_everywhere_the_same(lab_of: LabMaker) -> None:
    """Here, on workers that read the files, and on workers to which the images travel."""
    async with lab_of(items=COUNT, ttft_s=0.0, tpot_s=0.0) as lab:
        with_images(lab)
        seen = list[list[dict[str, Any]]]()
        backends: list[dict[str, Any]] = [
            {},
            {"backend": {"kind": "local", "processes": 2}},
            {"backend": {"kind": "local", "processes": 2, "shared_folder": False}},
        ]
        for n, settings in enumerate(backends):
            lab.config |= settings
            folder = await lab.begin(lab.home / f"run{n}")
            result = await lab.live(folder)
            assert (result.exit_code, result.progress["failed"]) == (3, 1)
            found = records(folder.path)
            assert "no such file" in found[-1]["error"]
            assert all(record["prompt_tokens"] > 256 for record in found[:-1])
            image = found[3]["images"][0]
            assert (image["column"], image["name"]) == ("figure", "3.png")
            assert image["bytes"] == (lab.home / "3.png").stat().st_size
            assert not any(b"base64" in data or b"3" * 99 in data for data in contents(folder.path))
            kept = ("id", "question", "output", "images", "error")
            seen.append([{name: record.get(name) for name in kept} for record in found])
        assert seen[0] == seen[1] == seen[2]
        assert len({record["question"] for record in seen[0]}) == COUNT
        assert len({record["output"]["kind"] for record in seen[0][:-1]}) > 1


async def test_a_payload_that_is_too_small(lab_of: LabMaker) -> None:
    async with lab_of(items=COUNT, ttft_s=0.0, tpot_s=0.0) as lab:
        with_images(lab)
        (lab.home / "5.png").write_bytes(make_png(9, 9, b"5" * 8_000_000))
        lab.config["backend"] = {"kind": "local", "processes": 2, "shared_folder": False}
        result = await lab.live(await lab.begin())
        assert (result.exit_code, result.progress["failed"]) == (3, 2)
        assert "set backend.shared_folder: true" in records(lab.out)[5]["error"]


async def test_the_content_counts(lab_of: LabMaker) -> None:
    """For the cache, and for what an extended run takes over."""
    async with lab_of(items=COUNT, ttft_s=0.0, tpot_s=0.0) as lab:
        with_images(lab, cache=str(lab.home / "answers"))
        (lab.home / "1.png").write_bytes((lab.home / "0.png").read_bytes())
        first = await lab.live(await lab.begin())
        assert (first.progress["requests"], first.progress["reused"]) == (COUNT - 2, 1)
        (lab.home / "2.png").write_bytes(make_png(280, 280, b"another"))
        plans = list[ExtensionPlan]()

        async def confirm(plan: ExtensionPlan) -> None:
            plans.append(plan)

        loaded = load_config(lab.config)
        extension = Extension.open(open_folder(lab.out).path, loaded, None, confirm)
        await prepare_run(loaded, lab.home / "new", extend=extension.take_over)
        (plan,) = plans
        assert (plan.done, plan.changed, plan.invalid) == (COUNT - 2, 1, 1)
        assert plan.forecast is not None


async def test_items_in_memory_have_no_folder(lab_of: LabMaker) -> None:
    """Callers of a graph must not read files beside the owner's input."""
    async with lab_of(items=COUNT, ttft_s=0.0, tpot_s=0.0) as lab:
        items = [{"id": "x", "figure": "0.png"}]
        with_images(lab)
        with pytest.raises(ConfigurationError, match=r"set task\.images\.folder"):
            await prepare_run(load_config(lab.config), lab.home / "refused", items)
        assert not (lab.home / "refused").exists()
        lab.config["task"]["images"] = {"columns": ["figure"], "folder": str(lab.home)}
        lab.config["input"] = {"id": "id"}
        folder = (await prepare_run(load_config(lab.config), lab.home / "run", items)).folder
        assert (await lab.live(folder)).exit_code == 0
        (lab.home / "moved").mkdir()
        (lab.home / "0.png").rename(lab.home / "moved" / "0.png")
        settings = (f"task.images.folder={lab.home / 'moved'}",)
        assert (await lab.live(folder, overrides=settings)).exit_code == 0  # it may change
        with pytest.raises(ConfigurationError, match=r"task\.images"):
            await lab.live(folder, overrides=("task.images.columns=[other]",))


async def test_refused_settings(lab_of: LabMaker) -> None:
    async with lab_of(items=COUNT) as lab:
        with_images(lab)
        lab.config["task"]["images"] = ["picture"]
        with pytest.raises(ConfigurationError, match="picture"):
            await prepare_run(load_config(lab.config), lab.home / "refused")
        lab.config["task"]["images"] = []
        with pytest.raises(ConfigurationError, match=r"task\.images"):
            load_config(lab.config)
