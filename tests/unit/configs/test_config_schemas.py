"""A schema never makes fanfold fetch anything."""

from __future__ import annotations

import ast
import socket
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.schemas import open_validator
from fanfold.backends.fleet.cache import CachePolicy
from fanfold.backends.simulated.requests import AnswerSchema
from fanfold.backends.simulated.values import ApiError
from fanfold.configs.loader import load_config
from fanfold.nodes.item.answer import AnswerCheck

Open = Callable[[dict[str, Any]], object]


@pytest.fixture
def knocks() -> Iterator[tuple[str, list[object]]]:
    """A port, and who has come to it; nobody gets an answer."""
    server, seen = socket.create_server(("127.0.0.1", 0)), list[object]()

    def wait() -> None:
        while True:
            try:
                connection, who = server.accept()
            except OSError:
                return
            seen.append(who)
            connection.close()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def schemas(url: str) -> dict[str, dict[str, Any]]:
    return {
        "$schema": {"$schema": f"{url}/meta", "type": "object"},
        "$ref": {"$ref": f"{url}/ref"},
        "$id": {"$id": f"{url}/base.json", "properties": {"a": {"$ref": "other.json"}}},
        "$dynamicRef": {"$dynamicRef": f"{url}/other#a"},
        "deep": {"anyOf": [{"items": {"$ref": f"{url}/deep#/$defs/x"}}]},
        "file": {"$ref": "file:///etc/hostname"},
    }


def by_settings(schema: dict[str, Any]) -> None:
    load_config(
        {"task": {"prompt": "{a}", "schema": schema}, "endpoints": {"urls": ["http://n:1"]}}
    )


def by_answers(schema: dict[str, Any]) -> None:
    AnswerCheck(schema, 10).check_value("{}")


def by_reuse(schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    choice = {"message": {"content": "{}"}, "finish_reason": "stop"}
    if not CachePolicy(sampled=False).is_cacheable(
        {"response_format": wanted}, {"choices": [choice]}
    ):
        raise ValueError("not reused")


@pytest.mark.parametrize("kind", schemas(""))
@pytest.mark.parametrize("opens", [open_validator, by_settings, by_answers, by_reuse, AnswerSchema])
def test_nothing_is_fetched(kind: str, opens: Open, knocks: tuple[str, list[object]]) -> None:
    url, seen = knocks
    with pytest.raises((ValueError, ConfigurationError, ApiError)):
        opens(schemas(url)[kind])
    assert seen == []


def test_known_dialects_are_fine() -> None:
    for draft in (
        "http://json-schema.org/draft-07/schema#",
        "https://json-schema.org/draft/2020-12/schema",
    ):
        assert open_validator({"$schema": draft, "type": "object"}).is_valid({})


def test_validators_are_opened_in_one_place() -> None:
    root = Path(str(files("fanfold")))
    users = {
        str(path.relative_to(root))
        for room in ("backends", "configs", "graphs", "nodes")
        for path in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in {"jsonschema_rs", "jsonschema"}
        and node.attr not in {"ValidationError", "Validator"}
    }
    assert users == {"backends/core/schemas.py"}
