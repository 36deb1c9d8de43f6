"""Settings of batches: what they need and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.loader import load_config

GATEWAY = {"first": {"base_url": "http://127.0.0.1:9", "paths": ["sophia/vllm"], "token": "${T}"}}


def load(backend: dict[str, Any], **sections: Any) -> Any:
    data: dict[str, Any] = {
        "task": {"prompt": "{x}"},
        "endpoints": GATEWAY,
        "backend": {"kind": "batch", "dir": "/cluster"} | backend,
    }
    return load_config(data | sections, environment={"T": "t"}).config


def test_the_defaults() -> None:
    backend = load({}).backend
    assert (backend.service, backend.lines, backend.active) == ("first", 20_000, 1)
    assert (backend.leftovers, backend.poll_s, backend.poll_most_s) == ("interactive", 30, 300)
    assert (backend.is_batch, backend.is_remote, backend.concurrent_shards) == (True, False, 1)


@pytest.mark.parametrize(
    ("backend", "sections", "words"),
    [
        ({"dir": None}, {}, "needs the key 'dir'"),
        ({"dir": "cluster"}, {}, "is relative"),
        ({"dir": ""}, {}, "is empty"),
        ({"lines": 150_001}, {}, "lines"),
        ({"active": 0}, {}, "active"),
        ({"service": "other"}, {}, "service"),
        ({"leftovers": "drop"}, {}, "leftovers"),
        ({"poll_s": 301}, {}, "'poll_s' is above 'poll_most_s'"),
        ({"workers": 3}, {}, "the key 'workers' is for kind"),
        ({"kind": "local", "lines": 5}, {}, "the key 'dir' is for kind batch, not for local"),
        ({}, {"endpoints": {"urls": ["http://h/v1"]}}, "set endpoints.first"),
        ({}, {"task": {"prompt": "{x}", "graph": "a:b"}}, "task.graph"),
        ({}, {"limits": {"item_timeout_s": 5}}, "item_timeout_s"),
    ],
)
def test_what_does_not_fit(backend: dict[str, Any], sections: Any, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(backend, **sections)
    assert words in caught.value.message
