"""What the runs of a pipeline share: which probes of endpoints count for the next run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.discovery.connect import ReadyEndpoints
from fanfold.backends.discovery.resolve import EndpointSet
from fanfold.backends.discovery.sources import FileSource
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.graphs.run import pipeline_resources
from fanfold.graphs.run.pipeline_resources import PipelineResources

URL = "http://127.0.0.1:9/v1"
SPECS = (EndpointSpec(URL),)
READY = ReadyEndpoints(SPECS, "m", simulated=False, endpoint_set=EndpointSet(SPECS), ready=1)


def load(prompt: str = "{x}?", key: str = "EMPTY", **endpoints: Any) -> LoadedConfig:
    task = {"prompt": prompt}
    return load_config({"task": task, "endpoints": {"urls": [URL], "api_key": key, **endpoints}})


def test_runs_with_the_same_endpoints_share_a_probe(tmp_path: Path) -> None:
    resources = PipelineResources(tmp_path)
    assert resources.find_probed(load()) is None
    resources.keep_probed(load(), READY)
    assert resources.find_probed(load("{x} again?")) is READY
    assert resources.find_probed(load(key="one")) is None
    assert resources.find_probed(load(wait_s=5)) is None
    resources.keep_probed(load(key="one"), READY)
    assert resources.find_probed(load(key="other")) is None


def test_a_probe_becomes_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = PipelineResources(tmp_path)
    resources.keep_probed(load(), READY)
    monkeypatch.setattr(pipeline_resources, "_PROBED_S", 0.0)
    assert resources.find_probed(load()) is None


@pytest.mark.parametrize(
    "ready",
    [
        replace(READY, absent=("http://127.0.0.1:8/v1: no answer",)),
        replace(READY, endpoint_set=EndpointSet(SPECS, FileSource(Path("endpoints"), "EMPTY"))),
        replace(READY, endpoint_set=EndpointSet(SPECS, reason="auto: the only server here")),
        replace(READY, endpoint_set=None),
    ],
)
def test_endpoints_that_may_change_are_probed_by_each_run(
    tmp_path: Path, ready: ReadyEndpoints
) -> None:
    resources = PipelineResources(tmp_path)
    resources.keep_probed(load(), ready)
    assert resources.find_probed(load()) is None
