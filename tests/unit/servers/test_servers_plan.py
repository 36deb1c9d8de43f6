"""The plan of a node: commands, ports, accelerators; and how it is sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import BackendError, ConfigurationError
from fanfold.backends.core.templates import fill_names, find_names, split_command
from fanfold.backends.servers.plan import (
    NodePlan,
    ServerPlan,
    list_accelerators,
    plan_servers,
    split_accelerators,
)

NAMES = ("port", "model", "instance", "gpus")


def test_a_value_with_blanks_stays_one_word() -> None:
    words = split_command("serve '{model}' --port={port} --name 'a b'", NAMES)
    filled = fill_names(words, {"model": "my model; rm -rf /", "port": "8000"})
    assert filled == ("serve", "my model; rm -rf /", "--port=8000", "--name", "a b")


def test_other_braces_stay() -> None:
    text = """vllm --config '{"a": {"b": 1}}' --x '${HOME}' --y '{}' --port {port}"""
    words = split_command(text, NAMES)
    assert find_names(words) == {"port"}
    assert fill_names(words, {"port": "1"})[2:7:2] == ('{"a": {"b": 1}}', "${HOME}", "{}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("serve 'x", "no closing quotation"),
        (
            "serve --port {prt}",
            r"unknown name \{prt\}; known names: \{gpus\}, \{instance\}, \{model\}",
        ),
    ],
)
def test_commands_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        split_command(text, NAMES)


def test_attributes_and_formats_are_no_names() -> None:
    words = split_command("a {port.__class__} {port!r} {port:9} {0}", NAMES)
    assert fill_names(words, {"port": "1"}) == words


@given(st.integers(1, 40), st.integers(1, 12))
def test_accelerators_are_divided_without_rest(each: int, instances: int) -> None:
    ids = [f"{n}.0" for n in range(each * instances)]
    parts = split_accelerators(ids, instances)
    assert [len(part) for part in parts] == [each] * instances
    assert [name for part in parts for name in part] == ids


def test_a_rest_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="12 cannot be divided among 5"):
        split_accelerators([str(n) for n in range(12)], 5)
    assert split_accelerators([], 3) == [(), (), ()]


@pytest.mark.parametrize(
    ("ids", "count", "environment", "found"),
    [
        (["0.0", "0.1"], None, {"ZE_AFFINITY_MASK": "7"}, ["0.0", "0.1"]),
        (None, 2, {}, ["0", "1"]),
        (None, 2, {"ZE_AFFINITY_MASK": "4, 5,6"}, ["4", "5"]),
        (None, None, {"ZE_AFFINITY_MASK": "GPU-a,GPU-b"}, ["GPU-a", "GPU-b"]),
    ],
)
def test_whose_accelerators_count(
    ids: list[str] | None, count: int | None, environment: dict[str, str], found: list[str]
) -> None:
    assert list_accelerators("ZE_AFFINITY_MASK", ids, count, environment) == found


@pytest.mark.parametrize(
    ("count", "environment", "words"),
    [
        (4, {"CUDA_VISIBLE_DEVICES": "0,1"}, "gives this job 2"),
        (None, {}, "set count or ids"),
    ],
)
def test_too_few_accelerators(count: int | None, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        list_accelerators("CUDA_VISIBLE_DEVICES", None, count, environment)


def test_each_server_has_its_own() -> None:
    first, second = plan_servers(
        ("serve", "{model}", "{port}", "{instance}/{gpus}"),
        ports=8000,
        instances=2,
        variable="ZE_AFFINITY_MASK",
        ids=["0.0", "0.1", "1.0", "1.1"],
        env={"A": "b"},
        model="m",
    )
    assert first.command == ("serve", "m", "8000", "0/2")
    assert second.command == ("serve", "m", "8001", "1/2")
    assert first.env == {"ZE_AFFINITY_MASK": "0.0,0.1", "A": "b"}
    assert second.env == {"ZE_AFFINITY_MASK": "1.0,1.1", "A": "b"}


def test_a_plan_travels_and_does_not_show_its_secrets() -> None:
    server = ServerPlan(0, 8000, ("serve", "--api-key", "s3cr3t"), {"HF_TOKEN": "s3cr3t"})
    plan = NodePlan("n", "n.example", "/f", (server,), "/health", 1.0, 2, 3.0, "s3cr3t")
    assert NodePlan.from_json(plan.to_json()) == plan
    assert "s3cr3t" not in repr(plan)
    assert plan.server_address(server) == "n.example:8000"
    for broken in (b"", b"[]", b'{"v": 2}', b'{"v": 1}'):
        with pytest.raises(BackendError, match="plan"):
            NodePlan.from_json(broken)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("0,1,", ["0", "1"]),
        (" 0 , 1 ", ["0", "1"]),
        ("0,0,1", ["0", "1"]),
        ("0,1,-1,2", ["0", "1"]),
        ("GPU-8932f937,MIG-1b2c", ["GPU-8932f937", "MIG-1b2c"]),
        ("NoDevFiles", None),
        ("-1", None),
        (",", None),
        ("-1,0", None),
    ],
)
def test_a_variable_is_read_as_the_driver_reads_it(given: str, found: list[str] | None) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": given}
    if found is None:
        with pytest.raises(
            ConfigurationError, match=r"CUDA_VISIBLE_DEVICES is .* gives this job n"
        ):
            list_accelerators("CUDA_VISIBLE_DEVICES", None, None, environment)
        return
    assert list_accelerators("CUDA_VISIBLE_DEVICES", None, None, environment) == found
    with pytest.raises(ConfigurationError, match=f"gives this job {len(found)}"):
        list_accelerators("CUDA_VISIBLE_DEVICES", None, len(found) + 1, environment)
