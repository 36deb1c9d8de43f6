"""Settings that a request may set: access of each setting, and the result for a request."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from fanfold.backends.core.errors import ConfigurationError, InputError
from fanfold.backends.core.request_urls import REQUEST_KINDS, URL_FIELD
from fanfold.configs.aggregators import AGGREGATOR_CONFIGS
from fanfold.configs.base import Access
from fanfold.configs.describe import find_setting, iter_access, split_settings
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.configs.models import SAMPLING_FIELDS, RunConfig
from fanfold.graphs.bound_graph import BoundSettings
from fanfold.graphs.caller_policy import ALLOW_ENV, ROOT_ENV, CallerPolicy, CallerSettings
from fanfold.graphs.context import RunContext
from fanfold.graphs.context_schema import build_request_form
from fanfold.graphs.integrations.service import Service

OWN: dict[str, Any] = {
    "name": "own",
    "input": {"dataset": "molecules", "limit": 5},
    "task": {"prompt": "What is {smiles}?", "system": "Be brief."},
    "model": {"name": "small", "extra_body": {"priority": 3, "top_k": 5}},
    "endpoints": {"urls": ["http://127.0.0.1:9/v1"], "models": {"served-large": "large"}},
    "limits": {"streams": 9, "hedge": False, "walltime_s": 600},
    "budget": {"usd": 2, "requests": 100},
}
CLOSED = sorted(key for key, access in iter_access() if access is Access.CLOSED)
LOWERED = sorted(key for key, access in iter_access() if access is Access.LOWER)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    (tmp_path / "secret.csv").write_text("smiles\nTOP-SECRET\n")
    (folder / "mine.csv").write_text("smiles\nC\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    return folder


def loaded(context: dict[str, Any], policy: CallerPolicy | None = None, **own: Any) -> LoadedConfig:
    bound = BoundSettings(RunContext(config=OWN | own), policy or CallerPolicy())
    return bound.read_context(context).loaded


def refused(context: dict[str, Any], policy: CallerPolicy | None = None, **own: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        loaded(context, policy, **own)
    return caught.value.message


# -- declarations ---------------------------------------------------------------------------


def test_every_setting_declares_its_access() -> None:
    """A new setting is a decision: may a request set it, lower it, or not touch it at all?"""
    missing = [key for key, access in iter_access() if access is None]
    assert not missing, (
        f"{', '.join(missing)}: name the setting in `access` of its section (configs/base.py); "
        "what starts programs, names files or hosts, or writes anywhere is closed"
    )


def test_no_section_declares_what_it_does_not_have() -> None:
    def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
        found = {model}
        for about in model.model_fields.values():
            for kind in (about.annotation, *getattr(about.annotation, "__args__", ())):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    found |= sections(kind)
        return found

    for section in sections(RunConfig):
        keys = {about.alias or name for name, about in section.model_fields.items()}
        assert getattr(section, "access").keys() <= keys, section  # noqa: B009 - of any model


@pytest.mark.parametrize("stage", AGGREGATOR_CONFIGS.values())
def test_every_key_of_a_reduce_stage_declares_its_access(stage: Any) -> None:
    assert stage.access.keys() == stage.model_fields.keys()


def test_every_field_of_the_context_stands_for_settings_or_declares_its_access() -> None:
    for one in fields(RunContext):
        assert one.metadata.keys() & {"key", "section", "access"}, one.name


def test_what_starts_programs_or_chooses_hosts_and_files_is_closed() -> None:
    assert {
        "endpoints.first.token_command",
        "endpoints.urls",
        "endpoints.file",
        "endpoints.api_key",
        "node.serve",
        "node.env",
        "backend.kind",
        "backend.command",
        "backend.factory",
        "backend.client",
        "backend.executor",
        "backend.config",
        "task.graph",
        "cache",
        "metrics.port",
        "model.price.prompt",
    } <= set(CLOSED)


# -- closed settings ------------------------------------------------------------------------


@pytest.mark.parametrize("key", CLOSED)
@pytest.mark.parametrize("way", ["overrides", "config"])
def test_a_closed_setting_is_refused_by_name_whatever_way_it_comes(key: str, way: str) -> None:
    if way == "overrides":
        context: dict[str, Any] = {"overrides": [f"{key}=1"]}
    else:
        value: Any = 1
        for part in reversed(key.split(".")):
            value = {part: value}
        context = {"config": {"task": {"prompt": "{smiles}"}} | value}
    said = refused(context)
    assert f"may not set {key};" in said
    assert f"{ALLOW_ENV}={key} " in said


@pytest.mark.parametrize(
    ("context", "key"),
    [
        ({"backend": "launched"}, "backend.kind"),
        ({"backend_options": {"command": "touch /tmp/x"}}, "backend.command"),
        ({"endpoint_options": {"first": {"token_command": "id"}}}, "endpoints.first.token_command"),
        ({"endpoints": "http://evil:1/v1"}, "endpoints"),
        ({"api_key": "${HOME}"}, "endpoints.api_key"),
        ({"node": {"serve": "id"}}, "node.serve"),
        ({"graph": "os:system"}, "task.graph"),
        ({"out": "/tmp/elsewhere"}, "out"),
        ({"trace": True}, "trace"),
        ({"retry_failed": True}, "retry_failed"),
        ({"cache": "/tmp/answers"}, "cache"),
        ({"price": {"node_hour": 0}}, "model.price"),
        ({"dataset": "records"}, "input.dataset"),
        ({"run_name": "x"}, "name"),
        ({"metrics_port": 9}, "metrics.port"),
        ({"on_limit": "stop"}, "budget.on_limit"),
        ({"overrides": ["backend={kind: launched, command: id}"]}, "backend.kind"),
        ({"overrides": ["task={prompt: x, graph: 'os:system'}"]}, "task.graph"),
        ({"overrides": ["budget=null"]}, "budget"),
        ({"extra_body": {"api_base": "http://evil"}}, "model.extra_body.api_base"),
        ({"overrides": ["model.extra_body.chat_template=x"]}, "model.extra_body.chat_template"),
        ({"overrides": ["model.extra_body.evil.top_k=1"]}, "model.extra_body.evil"),
        ({"extra_body": {"evil.top_k": 1}}, "model.extra_body.evil.top_k"),
        ({"extra_body": {"evil": {"top_k": 1}}}, "model.extra_body.evil"),
        ({"overrides": ["model={extra_body: {priority: 9}}"]}, "model.extra_body.priority"),
        ({"config": {"task.graph": "os:abort"}}, "task.graph"),
        ({"config": {"task": {"graph.x": "os:abort"}}}, "task.graph.x"),
        ({"overrides": ["task.graph.x=1"]}, "task.graph.x"),
        ({"overrides": [" task.graph = os:abort"]}, "task.graph"),
    ],
)
def test_other_ways_to_a_closed_setting(context: dict[str, Any], key: str) -> None:
    assert key in refused(context)


def test_all_that_is_closed_is_named_at_once() -> None:
    said = refused({"graph": "os:system", "out": "/x", "streams": 2})
    assert "may not set" in said
    assert "task.graph" in said
    assert "out" in said
    assert f"{ALLOW_ENV}=task.graph,out" in said or f"{ALLOW_ENV}=out,task.graph" in said


def test_the_owner_opens_keys(tmp_path: Path) -> None:
    policy = CallerPolicy.from_environment(
        {ALLOW_ENV: " backend.processes , endpoints,out,limits.streams,model.extra_body.priority"}
    )
    config = loaded(
        {
            "processes": 3,
            "endpoints": "http://other:1/v1",
            "streams": 77,
            "extra_body": {"priority": 7},
            "overrides": ["endpoints.wait_s=5"],
        },
        policy,
    ).config
    assert config.backend.processes == 3
    assert config.model.extra_body == {"priority": 7, "top_k": 5}
    assert "model.extra_body.user" in refused({"extra_body": {"user": "me"}}, policy)
    assert config.endpoints.urls == ["http://other:1/v1"]
    assert (config.endpoints.wait_s, config.limits.streams) == (5, 77)
    bound = BoundSettings(RunContext(config=OWN), policy)
    assert bound.read_context({"out": str(tmp_path)}).out == str(tmp_path)
    assert "backend.kind" in refused({"backend": "parsl"}, policy)


def test_the_bound_key_is_for_the_bound_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWNERS_KEY", "sesame")
    own = {"endpoints": OWN["endpoints"] | {"api_key": "${OWNERS_KEY}"}}
    policy = CallerPolicy(frozenset({"endpoints"}))
    assert loaded({"streams": 2}, policy, **own).config.endpoints.api_key.get_secret_value() == (
        "sesame"
    )
    others: list[dict[str, Any]] = [
        {"endpoints": "http://other:1/v1"},
        {"endpoint_options": {"urls": ["http://o"]}},
    ]
    for context in others:
        key = loaded(context, policy, **own).config.endpoints.api_key
        assert key.get_secret_value() == "EMPTY"
    overrides = {"overrides": ["endpoints.api_key=${HOME}"]}
    assert "endpoints.api_key" in refused(overrides, policy, **own)
    assert "endpoints.api_key" in refused({"api_key": "${OWNERS_KEY}"}, policy, **own)
    opened = CallerPolicy(frozenset({"endpoints", "endpoints.api_key"}))
    both = {"endpoints": "http://other:1/v1", "api_key": "${OWNERS_KEY}"}
    got = loaded(both, opened, **own)
    assert got.config.endpoints.api_key.get_secret_value() == "sesame"
    assert got.plain["endpoints"]["api_key"] == "${OWNERS_KEY}"
    assert "name a variable" in refused({"api_key": "sk-typed"}, opened, **own)


def test_a_misspelt_key_of_the_owner_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"'backend.comand' \(did you mean"):
        CallerPolicy.from_environment({ALLOW_ENV: "backend.comand"})
    with pytest.raises(ConfigurationError, match=ROOT_ENV):
        CallerPolicy.from_environment({ROOT_ENV: "/nowhere/at/all"})


def test_an_unknown_key_is_refused() -> None:
    assert "'streamz' (did you mean 'streams'?)" in refused({"streamz": 1})
    assert "there is no setting 'limit'" in refused({"overrides": ["limit.streams=1"]})
    assert "there is no setting 'answer_schema'" in refused(
        {"config": {"task": {"answer_schema": {}}}}
    )


# -- what is open ---------------------------------------------------------------------------


def test_a_request_sets_what_is_asked_and_how_it_is_sampled() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number"}}}
    config = loaded(
        {
            "system": "Be kind.",
            "prompt": "Why {smiles}?",
            "answer_schema": schema,
            "repairs": 3,
            "reduce": [{"op": "stats", "field": "x"}],
            "temperature": 0.5,
            "max_tokens": 9,
            "seed": 4,
            "model": "large",
            "limit": 2,
            "extra_body": {"top_k": 50, "top_p": 0.5},
        }
    ).config
    assert (config.task.system, config.task.prompt) == ("Be kind.", "Why {smiles}?")
    assert (config.task.answer_schema, config.task.repairs) == (schema, 3)
    assert (config.model.temperature, config.model.max_tokens, config.model.seed) == (0.5, 9, 4)
    assert (config.model.name, config.input.limit) == ("large", 2)
    assert config.model.extra_body == {"priority": 3, "top_k": 50, "top_p": 0.5}
    assert config.endpoints.urls == OWN["endpoints"]["urls"]
    assert config.budget.usd == 2


@pytest.mark.parametrize(
    "entry",
    [{"op": "sql", "query": "SELECT 1"}, {"op": "python", "function": "os:getcwd"}],
    ids=str,
)
def test_code_in_reduce_is_never_taken_from_a_request(entry: dict[str, Any]) -> None:
    for policy in (None, CallerPolicy(allowed=frozenset({"reduce"}))):
        for context in (
            {"reduce": [{"op": "count"}, entry]},
            {"overrides": [f"reduce={json.dumps([entry])}"]},
            {"config": {"task": {"prompt": "Why {smiles}?"}, "reduce": [entry]}},
        ):
            said = refused(context, policy)
            assert f"({entry['op']})" in said or "reduce" in said
    bound = loaded({"temperature": 0.5}, reduce=[entry]).config.reduce
    assert [one.op for one in bound] == [entry["op"]]
    again = loaded({"reduce": [{"op": "count"}, entry]}, reduce=[entry]).config.reduce
    assert again[1] == bound[0]


@pytest.mark.parametrize("name", ["huge", "served-large", "''", "null"])
def test_a_model_is_one_of_those_bound(name: str) -> None:
    said = refused({"overrides": [f"model.name={name}"]})
    assert "model.name" in said


@pytest.mark.parametrize("key", LOWERED)
def test_limits_go_down_only(key: str) -> None:
    """Neither above the bound, nor away; where nothing is bound any limit is lower."""
    field = find_setting(key)
    kind = "integer" if "int" in str(field.annotation) else "number"
    section, name = key.split(".")
    if name == "hedge":
        assert "may only lower" in refused({"overrides": ["limits.hedge=true"]})
        return
    bound = {"walltime_s": 500, "body_bytes": 5000}.get(name, 50)
    low: Any = bound - (9 if kind == "integer" else 9.5)
    task = OWN["task"] if section == "task" else {}
    own: dict[str, Any] = {section: task | {name: bound}}
    unbound: dict[str, Any] = {section: {}}
    got = loaded({"overrides": [f"{key}={low}"]}, **own).config
    assert getattr(getattr(got, section), name) == low
    for more in (bound + 1, f"'{bound + 2}'", bound * 2):
        assert "may only lower" in refused({"overrides": [f"{key}={more}"]}, **own), key
    if "None" in str(field.annotation):
        assert "no limit" in refused({"overrides": [f"{key}=null"]}, **own)
        assert loaded({"overrides": [f"{key}=99"]}, **unbound).config


def test_a_preset_runs_on_the_owners_endpoints_within_the_owners_limits() -> None:
    got = loaded({"preset": "data_annotation"})
    config = got.config
    assert config.name == "data-annotation"
    assert "{text}" in config.task.prompt
    assert config.endpoints.urls == OWN["endpoints"]["urls"]
    assert (config.limits.streams, config.budget.usd, config.model.name) == (9, 2, "small")
    assert config.input.limit == 5
    assert [stage.op for stage in config.reduce] == ["histogram", "histogram", "top_k", "count"]
    as_config = loaded({"config": "data_annotation"}).config
    assert as_config == config


def test_a_preset_brings_its_own_fleet_where_the_owner_bound_none() -> None:
    bound = BoundSettings(RunContext(), CallerPolicy())
    config = bound.read_context({"preset": "literature_mining"}).loaded.config
    assert config.endpoints.simulated is not None
    assert config.endpoints.simulated.responder == "schema"
    assert config.stages == load_config("literature_mining").config.stages
    given = {"preset": "literature_mining", "overrides": ["stages=[{name: a, map: {prompt: x}}]"]}
    with pytest.raises(ConfigurationError, match="stages"):
        _ = bound.read_context(given).loaded
    again = BoundSettings(RunContext(config=OWN), CallerPolicy())
    assert again.read_context({"preset": "quickstart"}).loaded.config.name == "quickstart"
    with pytest.raises(ConfigurationError, match="simulated and real answers are not mixed"):
        _ = again.read_context({"preset": "molecular_screening"}).loaded
    assert bound.read_context({"preset": "quickstart"}) is bound.resolve(None)


def test_a_configuration_replaces_the_task_and_nothing_else() -> None:
    config = loaded(
        {"config": {"task": {"prompt": "{x}"}, "limits": {"streams": 3}, "budget": {"usd": 1}}}
    ).config
    assert (config.task.prompt, config.task.system) == ("{x}", "")
    assert config.input.dataset is None
    assert (config.limits.streams, config.limits.hedge, config.budget.usd) == (3, False, 1)
    assert config.endpoints.urls == OWN["endpoints"]["urls"]
    assert config.model.extra_body == OWN["model"]["extra_body"]
    assert "prompt" in refused({"config": {"task": {}}})


def test_an_owners_item_graph_stays() -> None:
    own = {"task": OWN["task"] | {"graph": "my.module:graph"}}
    assert loaded({"preset": "data_annotation"}, **own).config.task.graph == "my.module:graph"
    assert loaded({"config": {"task": {"prompt": "{x}"}}}, **own).config.task.graph


# -- variables and files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "context",
    [
        {"prompt": "{smiles} ${SESAME}"},
        {"system": "${SESAME}"},
        {"answer_schema": {"description": "${SESAME}"}},
        {
            "answer_schema": {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"title": "a ${SESAME} $${SESAME}"}},
            }
        },
        {"overrides": ["task.system='${SESAME}'"]},
        {"overrides": ["task={system: '$${SESAME}'}"]},
        {"config": {"task": {"prompt": "{x}", "system": "${SESAME}"}}},
        {"extra_body": {"stop": ["${SESAME}"]}},
    ],
)
def test_a_request_reads_no_variable(
    context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESAME", "open-sesame")
    got = loaded(context)
    assert "open-sesame" not in repr(got.config)
    assert "${SESAME}" in repr(got.config)
    again = load_config(got.plain, environment={"SESAME": "open-sesame"} | {"HOME": "/"})
    assert "open-sesame" not in repr(again.config)


@given(st.text(alphabet="${}ABCa _", max_size=30))
def test_texts_arrive_as_they_are(text: str) -> None:
    config = loaded({"config": {"task": {"prompt": "{x}", "system": text}}}).config
    assert config.task.system == text


OUTSIDE = ["../secret.csv", "/etc/passwd", "sub/../../secret.csv", "link.csv", "linked", "~/x.csv"]


def linked(root: Path) -> None:
    (root / "link.csv").symlink_to(root.parent / "secret.csv")
    (root / "linked").symlink_to(root.parent)


@pytest.mark.parametrize("path", [p for p in OUTSIDE if p != "~/x.csv"])
def test_paths_lie_below_the_root(root: Path, path: str) -> None:
    linked(root)
    policy = CallerPolicy(root=root)
    with pytest.raises(InputError, match="outside the folder"):
        policy.resolve_path(path)
    assert "outside the folder" in refused({"config": path}, policy)
    for key in ("task.schema", "task.examples"):
        assert "outside the folder" in refused({"overrides": [f"{key}={path}"]}, policy)
    assert "outside the folder" in refused({"config": {"input": {"path": path}}}, policy)


def test_a_folder_with_a_link_that_leads_out_is_refused(root: Path) -> None:
    policy = CallerPolicy(root=root)
    assert policy.resolve_path("sub") == str(root / "sub")
    (root / "sub" / "b.txt").symlink_to(root.parent / "secret.csv")
    with pytest.raises(InputError, match="outside"):
        policy.resolve_path("sub")


@pytest.mark.parametrize("key", ["config", "input.path", "task.schema", "task.examples"])
def test_without_a_root_no_file_is_read(root: Path, key: str) -> None:
    for text in (str(root / "mine.csv"), "mine.csv", "/etc/passwd"):
        context = {"config": text} if key == "config" else {"overrides": [f"{key}={text}"]}
        assert ROOT_ENV in refused(context)
    with pytest.raises(InputError, match=ROOT_ENV):
        CallerPolicy().resolve_path("mine.csv")


def test_a_file_below_the_root_is_a_request_as_well(root: Path) -> None:
    policy = CallerPolicy(root=root)
    (root / "schema.json").write_text('{"type": "object"}')
    (root / "good.yaml").write_text(
        "input: {path: mine.csv}\ntask: {prompt: 'a {smiles}', schema: schema.json}\n"
    )
    config = loaded({"config": "good.yaml"}, policy).config
    assert config.input.path == str(root / "mine.csv")
    assert config.task.answer_schema == {"type": "object"}
    (root / "few.jsonl").write_text('{"smiles": "${HOME}", "output": "x"}')
    (root / "few.yaml").write_text("task: {prompt: 'a {smiles}', examples: few.jsonl}\n")
    for context in ({"config": "few.yaml"}, {"overrides": [f"task.examples={root}/few.jsonl"]}):
        task = {"prompt": "a {smiles}", "answer_schema": None} if "overrides" in context else {}
        found = loaded(context | task, policy).config.task.examples
        assert found == [{"smiles": "${HOME}", "output": "x"}]
    (root / "bad.yaml").write_text("task: {prompt: x, graph: 'os:system'}\n")
    assert "task.graph" in refused({"config": "bad.yaml"}, policy)
    (root / "bomb.yaml").write_text("task: {prompt: x}\nreduce: [&a {op: count}, *a]\n")
    assert "alias" in refused({"config": "bomb.yaml"}, policy)
    (root / "out.yaml").write_text("task: {prompt: x, schema: ../secret.csv}\n")
    assert "outside" in refused({"config": "out.yaml"}, policy)


# -- items that are requests ------------------------------------------------------------------

BATCH: dict[str, Any] = {
    "input": {"path": "bound.jsonl", "format": "openai_batch"},
    "endpoints": OWN["endpoints"],
}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 9}


def line(**fields: Any) -> dict[str, Any]:
    url = fields.pop("url", "/v1/chat/completions")
    return {"custom_id": "a", "method": "POST", "url": url, "body": BODY | fields}


@pytest.mark.parametrize(
    "closed",
    [
        {"priority": -100},
        {"chat_template": "{{ 1 }}"},
        {"n": 50},
        {"tools": []},
        {"kv_transfer_params": {"remote_host": "evil"}},
        {"user": "somebody"},
        {"Temperature": 1},
        {"": 1},
        {URL_FIELD: "/v1/load_lora_adapter"},
    ],
    ids=lambda closed: next(iter(closed)),
)
def test_items_that_are_requests_set_no_closed_field(root: Path, closed: dict[str, Any]) -> None:
    """Their fields are sent as they are, so they must not do more than settings can."""
    policy, (name,) = CallerPolicy(root=root), closed
    config = load_config(BATCH).config.input
    with pytest.raises(ConfigurationError, match=rf"items\[1\]: .*model\.extra_body\.{name}"):
        policy.check_items(config, [line(), line(**closed)])
    file = root / "in.jsonl"
    file.write_bytes(orjson.dumps(line(**closed)))
    named = config.model_copy(update={"path": str(file)})
    with pytest.raises(ConfigurationError, match=f"in.jsonl, line 1: .*{ALLOW_ENV}"):
        policy.check_items(named, None)
    service = Service(load_config(BATCH), root, inputs=root)
    for request in ({"items": [line(**closed)]}, {"path": "in.jsonl"}):
        with pytest.raises(ConfigurationError, match="a request may not set"):
            service.load_settings(request)
    for keys in ({f"model.extra_body.{name}"}, {"model.extra_body"}, {"model"}):
        CallerPolicy(frozenset(keys)).check_items(config, [line(**closed)])
    for url, kind in REQUEST_KINDS.items():
        asked = line(url=url, **dict.fromkeys((*kind.inputs, *kind.required), "x"))
        policy.check_items(config, [asked])
        with pytest.raises(ConfigurationError, match=f"model.extra_body.{name}"):
            policy.check_items(config, [asked | {"body": asked["body"] | closed}])


def test_items_that_are_requests_ask_and_sample_as_they_like() -> None:
    config = load_config(BATCH).config.input
    open_fields = dict.fromkeys(SAMPLING_FIELDS, 1) | {
        "model": "small",
        "temperature": 1,
        "seed": 1,
        "response_format": {"type": "json_object"},
        "stream": True,
        "stream_options": {},
        "max_completion_tokens": 5,
    }
    CallerPolicy().check_items(config, [line(**open_fields)])
    CallerPolicy().check_items(load_config(OWN).config.input, [{"priority": 1}])


# -- malformed requests -----------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "context",
    [
        {"overrides": "limits.streams=1"},
        {"overrides": ["limits.streams"]},
        {"overrides": [3]},
        {"overrides": ["reduce=[&a [1], *a]"]},
        {"overrides": ["task.schema={a: &a [1], b: *a}"]},
        {"overrides": ["task.system=[" + "[" * 5000]},
        {"overrides": ["." * 100 + "=1"]},
        {"overrides": ["task.schema" + ".a" * 5000 + "=1"]},
        {"overrides": ["reduce.²=1"]},
        {"config": 5},
        {"config": ["quickstart"]},
        {"config": "\0"},
        {"preset": 5},
        {"preset": "../presets/quickstart"},
        {"answer_schema": nested(300)},
        {"answer_schema": {"title": "x" * 2_000_000}},
        {"seed": 2**70},
        {"system": "\ud800"},
        {"system": b"bytes"},
        {"prompt": object()},
        {"streams": float("nan")},
        {"extra_body": [1]},
        {"extra_body": {"model": "x"}},
        {"backend_options": 3},
        {"answer_schema": {"$ref": "file:///etc/passwd"}},
        {"answer_schema": {"$ref": "http://127.0.0.1:9/x.json"}},
    ],
)
def test_malformed_requests_are_refused(context: dict[str, Any]) -> None:
    assert refused(context)


# -- over the sessions of a run -----------------------------------------------------------------


def test_a_later_request_goes_on_top_of_an_earlier_one() -> None:
    first = CallerSettings(
        preset="data_annotation", settings={"limits.streams": 2, "input.limit": 3}
    )
    kept = CallerSettings.from_json(first.to_json())
    assert kept.preset == "data_annotation"
    assert kept.settings == {"limits.streams": 2}
    then = kept.merge(CallerSettings(settings={"limits.streams": 5}))
    assert (then.preset, then.settings) == ("data_annotation", {"limits.streams": 5})
    assert kept.merge(CallerSettings(config=True)) == CallerSettings(config=True)
    assert CallerSettings.from_json(None).is_empty


def test_an_answer_to_a_spent_budget_is_a_request() -> None:
    owner = RunContext(config=OWN).loaded
    policy = CallerPolicy()
    assert policy.check_answer(owner, {"requests": 100, "tokens": 10**6}) is None
    answers: list[dict[str, Any]] = [
        {"requests": 101},
        {"usd": 2.01},
        {"usd": 1, "requests": 10**9},
        {"usd": "1e6"},
        {"requests": "101"},
        {"requests": 101.0},
        {"usd": None},
    ]
    for answer in answers:
        said = policy.check_answer(owner, answer)
        assert said is not None
        assert ALLOW_ENV in said
    assert CallerPolicy(frozenset({"budget.usd"})).check_answer(owner, {"usd": 50}) is None
    assert CallerPolicy(frozenset({"budget"})).check_answer(owner, {"requests": 500}) is None


@pytest.mark.parametrize("own", [RunContext(), RunContext(config=OWN)])
def test_a_form_that_is_left_alone_asks_for_nothing(own: RunContext) -> None:
    """Studio sends every field that it shows, each at the default that the schema names."""
    bound = BoundSettings(own, CallerPolicy())
    assert bound.policy is not None
    shown: Any = TypeAdapter(build_request_form(bound.policy.is_shown, bound.preset)).json_schema()
    form = {name: about["default"] for name, about in shown["properties"].items()}
    assert bound.read_context(form) is bound.resolve(None)
    assert bound.read_context(form | {"config": "", "model": ""}) is bound.resolve(None)
    asked = bound.read_context(form | {"streams": 3})
    assert asked.loaded.config.limits.streams == 3
    assert asked.loaded.config.task == own.loaded.config.task


def test_a_form_hides_what_is_closed() -> None:
    closed, opened = (
        build_request_form(CallerPolicy(allowed).is_shown, None)
        for allowed in (frozenset[str](), frozenset({"backend.processes", "task.graph", "out"}))
    )
    hidden = {f.name for f in fields(RunContext)} - {f.name for f in fields(closed)}
    assert hidden >= {"endpoints", "api_key", "backend", "node", "graph", "out", "cache", "trace"}
    assert {f.name for f in fields(opened)} - {f.name for f in fields(closed)} == {
        "backend_options",
        "graph",
        "out",
        "processes",
    }


def test_a_context_of_loaded_settings_is_no_request() -> None:
    other = RunContext.from_loaded(RunContext(config=OWN | {"budget": {}}).loaded)
    with pytest.raises(ConfigurationError, match="trust_context=True"):
        BoundSettings(RunContext(config=OWN), CallerPolicy()).resolve(other)


def test_what_a_trusting_graph_is_given_counts() -> None:
    bound = BoundSettings(RunContext(config=OWN))
    config = bound.resolve(
        bound.read_context({"streams": 500, "endpoints": "http://a:1/v1"})
    ).loaded.config
    assert config.limits.streams == 500
    assert config.endpoints.urls == ["http://a:1/v1"]
    with pytest.raises(ConfigurationError, match="'streamz'"):
        bound.read_context({"streamz": 500})


def test_split_settings_names_single_settings() -> None:
    found = list(split_settings("budget", {"usd": 1, "warn_at": []}))
    assert found == [("budget.usd", 1, Access.LOWER), ("budget.warn_at", [], Access.CLOSED)]
    assert list(split_settings("task.schema.a.b", 1)) == [("task.schema.a.b", 1, Access.OPEN)]
    with pytest.raises(ConfigurationError, match="is a section"):
        list(split_settings("limits", 3))


# -- texts, secrets and commands of requests and owners -------------------------------------------


@pytest.mark.parametrize("form", ["override", "mapping", "file", "opened"])
def test_a_schemas_file_is_never_expanded(
    root: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("SECRETX", "hunter2")
    (root / "schema.json").write_text(
        '{"type": "object", "title": "${SECRETX} $${SECRETX}", "properties":'
        ' {"x": {"enum": ["${SECRETX}", "${UNSET_VARIABLE}"]}}}'
    )
    (root / "c.yaml").write_text("task: {prompt: '${SECRETX} {smiles}', schema: schema.json}\n")
    task = {"prompt": "{smiles}", "schema": "schema.json"}
    contexts: dict[str, dict[str, Any]] = {
        "override": {"overrides": ["task.schema=schema.json"]},
        "mapping": {"config": {"task": task}},
        "file": {"config": "c.yaml"},
        "opened": {"overrides": [f"task.schema={root / 'schema.json'}"]},
    }
    policy = CallerPolicy(frozenset({"task"} if form == "opened" else ()), root)
    got = loaded(contexts[form], policy)
    schema = got.config.task.answer_schema
    assert schema is not None
    assert schema["title"] == "${SECRETX} $${SECRETX}"
    assert schema["properties"]["x"]["enum"] == ["${SECRETX}", "${UNSET_VARIABLE}"]
    assert "hunter2" not in got.config.task.prompt
    assert load_config(got.plain).config.task.answer_schema == schema  # as workers read run.yaml


def test_a_request_does_not_take_hosts_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRETX", "hunter2")
    policy = CallerPolicy(frozenset({"endpoints"}))
    for hosts in ("$SECRETX", "[a, '${SECRETX}']"):
        said = refused({"overrides": [f"endpoints.hosts={hosts}", "endpoints.urls=null"]}, policy)
        assert "not variables" in said


@pytest.mark.parametrize("bound", [{"token": "${TOK}"}, {"token_command": "cat /my/token"}])
@pytest.mark.parametrize(
    "override",
    [
        "endpoints.first.base_url=http://evil:1",
        "endpoints.first.paths=[evil/vllm]",
        "endpoints.proxy=true",
        "endpoints={first: {base_url: 'http://evil:1'}}",
    ],
)
def test_a_bound_token_is_for_the_bound_gateway(
    monkeypatch: pytest.MonkeyPatch, bound: dict[str, str], override: str
) -> None:
    monkeypatch.setenv("TOK", "sesame")
    first = {"base_url": "http://gateway:1", "paths": ["a/b"]} | bound
    own: dict[str, Any] = {"endpoints": {"first": first}}
    policy = CallerPolicy(frozenset({"endpoints", "endpoints.first.token"}))
    said = refused({"overrides": [override]}, policy, **own)
    assert "for the bound gateway only" in said
    monkeypatch.setenv("MINE", "mine")
    got = loaded({"overrides": [override, "endpoints.first.token=${MINE}"]}, policy, **own).config
    assert got.endpoints.first is not None
    assert got.endpoints.first.token is not None
    assert got.endpoints.first.token.get_secret_value() == "mine"
    assert got.endpoints.first.token_command is None
    kept = loaded({"overrides": ["endpoints.wait_s=3"]}, policy, **own).config.endpoints.first
    assert kept is not None
    assert kept.token_command == bound.get("token_command")
    assert (kept.token is None) == ("token" not in bound)


@pytest.mark.parametrize(
    "override",
    [
        "endpoints={first: {base_url: 'http://evil:1'}}",
        "endpoints.first={base_url: 'http://evil:1', paths: [a/b]}",
        "endpoints.first.base_url=http://evil:1",
    ],
)
@pytest.mark.parametrize("bound", [{"first": {}}, {"urls": ["http://node:1"]}])
def test_the_owners_login_is_for_the_bound_gateway(bound: dict[str, Any], override: str) -> None:
    own: dict[str, Any] = {"endpoints": bound}
    policy = CallerPolicy(frozenset({"endpoints", "endpoints.first.token"}))
    more = [] if "first" in bound else ["endpoints.urls=null"]
    said = refused({"overrides": [*more, override]}, policy, **own)
    assert "the login is for the bound gateway only" in said


def test_a_bound_body_gives_no_secret_to_hosts_of_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOK", "sesame")
    body = {"api_key": "sk-1", "user": "${TOK}", "meta": {"token": "t"}, "priority": 3}
    own: dict[str, Any] = {"model": {"name": "small", "extra_body": body}}
    policy = CallerPolicy(frozenset({"endpoints.urls"}))
    got = loaded({"overrides": ["endpoints.urls=['http://evil:1/v1']"]}, policy, **own).config
    assert got.model.extra_body == {"priority": 3}
    same = loaded({"streams": 2}, policy, **own).config
    assert same.model.extra_body == body | {"user": "sesame"}


def test_a_request_is_kept_without_its_secrets() -> None:
    policy = CallerPolicy(frozenset({"endpoints", "model.extra_body", "node.serve"}))
    bound = BoundSettings(RunContext(config=OWN), policy)
    context: dict[str, Any] = {
        "extra_body": {"api_key": "hunter2", "meta": {"auth_token": "hunter2"}},
        "endpoints": "http://me:hunter2@other:1/v1",
        "overrides": ["node.serve=vllm serve m --api-key hunter2"],
        "prompt": "Which token is {smiles}?",
    }
    kept = bound.read_context(context)._resolve_request()[1].to_json()
    assert "hunter2" not in str(kept)
    again = CallerSettings.from_json(kept)
    assert again.settings["task.prompt"] == "Which token is {smiles}?"
    owner = load_config(OWN)
    with pytest.raises(ConfigurationError, match="give it again") as caught:
        policy.apply_request(owner, again)
    assert "model.extra_body.api_key" in caught.value.message
    asked = policy.apply_request(owner, again.merge(policy.read_request(context))).config
    assert asked.model.extra_body["api_key"] == "hunter2"
