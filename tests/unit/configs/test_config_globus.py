"""Values for the template of a Globus endpoint, some of which are secret."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.secrets import MASKED
from fanfold.backends.discovery.connect import ReadyEndpoints
from fanfold.backends.workers.registry import make_backends
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.configs.serialize import iter_secret_texts
from fanfold.configs.yaml_text import to_yaml
from fanfold.graphs.remote.task_template import worker_settings
from fanfold.graphs.worker import work_shard

WRITTEN = {
    "account": "${PROJECT}",
    "hf_token": "s3cr3t",
    "deep": [{"api_key": "s3cr3t", "PASSWORD": "${P}", "token": 1234, "secret": None}],
}


def loaded(values: dict[str, Any]) -> LoadedConfig:
    data = {
        "task": {"prompt": "x"},
        "endpoints": {"urls": ["http://127.0.0.1:1/v1"]},
        "backend": {
            "kind": "globus_compute",
            "endpoints": ["11111111-2222-4333-8444-555555555555"],
            "user_endpoint_config": values,
        },
    }
    return load_config(data, environment={"PROJECT": "CHEM", "P": "s3cr3t"})


def test_secrets_are_not_kept() -> None:
    settings = loaded(WRITTEN)
    assert settings.plain["backend"]["user_endpoint_config"] == {
        "account": "${PROJECT}",
        "hf_token": MASKED,
        "deep": [{"api_key": MASKED, "PASSWORD": "${P}", "token": MASKED, "secret": None}],
    }
    assert "s3cr3t" not in to_yaml(settings.plain)


def test_a_run_folder_wants_them_again() -> None:
    again = load_config(loaded(WRITTEN).plain, environment={"PROJECT": "CHEM", "P": "s3cr3t"})
    words = r"backend\.user_endpoint_config\.hf_token: a run folder does not keep"
    with pytest.raises(ConfigurationError, match=words):
        make_backends(again.config.backend, work_shard)


def test_workers_are_not_told() -> None:
    """Their machine has neither the variables nor a use for them."""
    settings = worker_settings(loaded(WRITTEN), ReadyEndpoints((), "m", simulated=False))
    assert settings["backend"]["user_endpoint_config"] is None
    assert load_config(settings, environment={}).config.backend.kind == "globus_compute"


def test_which_texts_nobody_may_see() -> None:
    values = loaded(WRITTEN).config.backend.user_endpoint_config
    assert list(iter_secret_texts(values)) == ["s3cr3t"] * 3
