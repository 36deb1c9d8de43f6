from __future__ import annotations

import pickle
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.responders import make_responder
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import ApiError


def test_json_round_trip() -> None:
    spec = SimulationSpec(
        nodes=3,
        speeds={1: 0.1},
        capacities={2: 8},
        output_tokens=(5, 9),
        api_key="k",
        faults=(FaultRule("429", nodes=(0, 2), window=(0.0, 1.5)), FaultRule("hang", nodes=0.5)),
    )
    assert SimulationSpec.from_json(spec.to_json()) == spec


def test_the_key_stays_out_of_the_repr() -> None:
    assert "secret-key" not in repr(SimulationSpec(api_key="secret-key"))


@pytest.mark.parametrize("make", [SimulationSpec.like_8b, SimulationSpec.like_70b])
def test_presets_take_changes(make: Any) -> None:
    assert make(nodes=2, time_scale=5.0).nodes == 2
    assert make().max_num_seqs == 256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodez": 3}, "nodez"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"nodes": "three"}, "nodes must be a whole number, not 'three'"),
        ({"nodes": 2.0}, "nodes"),
        ({"nodes": True}, "nodes"),
        ({"ttft_s": "fast"}, "ttft_s must be a number"),
        ({"api_key": 5}, "api_key"),
        ({"responder": None}, "responder must be text"),
        ({"model": ""}, "model"),
        ({"addressing": "dns"}, "addressing must be one of path, port, addr"),
        ({"usage": "some"}, "usage"),
        ({"prefill_rate": 0}, "prefill_rate"),
        ({"time_scale": -1}, "time_scale"),
        ({"accuracy": 2}, "accuracy"),
        ({"output_tokens": [9, 5]}, "output_tokens"),
        ({"output_tokens": 5}, "simulated fleet"),
        ({"speeds": {"0": 0}}, "speeds"),
        ({"speeds": {"first": 1}}, "first"),
        ({"faults": [{"kind": "fire"}]}, "fire"),
        ({"faults": [{"p": 1}]}, "kind"),
        ({"faults": [{"kind": "429", "often": 1}]}, "often"),
        ({"faults": [{"kind": "429", "p": 1.5}]}, "p must be in"),
        ({"faults": [{"kind": "429", "draw": "lot"}]}, "draw"),
        ({"faults": [{"kind": "429", "nodes": 1.5}]}, "fraction"),
        ({"faults": [{"kind": "cold"}]}, "needs a value"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        SimulationSpec.from_mapping(changes)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="specification"):
        SimulationSpec.from_json(text)


def test_unknown_responder() -> None:
    with pytest.raises(ConfigurationError, match="available: agent, esol, labels, schema"):
        make_responder(SimulationSpec(responder="oracle"))


def test_api_errors_survive_a_pickle() -> None:
    error = ApiError("m", 404, "NotFoundError", "model")
    again = pickle.loads(pickle.dumps(error))
    assert (again.body, again.status) == (error.body, 404)
