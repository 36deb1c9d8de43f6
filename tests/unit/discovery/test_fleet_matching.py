from __future__ import annotations

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.probe import ProbeResult, select_model
from fanfold.backends.fleet.endpoint import EndpointSpec


def found(host: str, *models: str, tag: str | None = None, error: str | None = None) -> ProbeResult:
    spec = EndpointSpec(f"http://{host}:1", model=tag)
    lengths = tuple((model, 100 * len(model)) for model in models)
    return ProbeResult(spec, host, models, lengths, error=error)


def test_each_endpoint_is_asked_by_its_own_id() -> None:
    there = [found("a", "m"), found("b", "org/m", "z"), found("c", "other")]
    matched = select_model(there, "m", {"org/m": "m"})
    assert matched.model == "m"
    assert [(s.url, s.model, s.max_model_len) for s in matched.specs] == [
        ("http://a:1", None, 100),
        ("http://b:1", "org/m", 500),
    ]
    assert matched.absent == ("c excluded: it serves other, not m",)


def test_names_settle_the_only_model() -> None:
    assert select_model([found("a", "x"), found("b", "y")], None, {"x": "m", "y": "m"}).model == "m"
    with pytest.raises(ConfigurationError, match=r"model\.name"):
        select_model([found("a", "x"), found("b", "y")], None, {})


def test_the_models_own_name_counts_more_than_a_mapped_id() -> None:
    (spec,) = select_model([found("a", "old", "m")], "m", {"old": "m"}).specs
    assert spec.model is None


def test_a_tag_is_held_to() -> None:
    there = [found("a", "m", "n", tag="m"), found("b", "m", "n", tag="n")]
    matched = select_model(there, "m", {})
    assert [s.url for s in matched.specs] == ["http://a:1"]
    assert matched.absent == ("b excluded: it serves m, n (tagged n), not m",)
    with pytest.raises(ConfigurationError, match="no endpoint serves"):
        select_model([found("a", "m", tag="gone")], "m", {})


def test_who_does_not_answer_is_kept_unless_its_tag_says_otherwise() -> None:
    there = [
        found("a", "m"),
        found("b", error="refused"),
        found("c", tag="org/m", error="refused"),
        found("d", tag="n", error="refused"),
    ]
    matched = select_model(there, "m", {"org/m": "m"})
    assert [(s.url, s.model) for s in matched.specs] == [
        ("http://a:1", None),
        ("http://b:1", None),
        ("http://c:1", "org/m"),
    ]
    assert matched.absent[-1] == "d excluded: it serves n (tagged n), not m"
