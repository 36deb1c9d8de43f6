"""Invalid settings and options: one message, exit code 2, nothing written, nothing called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from .conftest import SCHEMA, Served, Shell

pytestmark = pytest.mark.integration

DEAD = "http://127.0.0.1:9/v1"


def task(**changes: Any) -> dict[str, Any]:
    given = {"prompt": "Say {text}", "schema": SCHEMA} | changes
    return {"task": {k: v for k, v in given.items() if v != "LEFT OUT"}}


def source(**changes: Any) -> dict[str, Any]:
    return {"input": {"path": "in.csv", "id": "id"} | changes}


def simulated(**changes: Any) -> dict[str, Any]:
    return {"endpoints": {"simulated": {"nodes": 1} | changes}}


def reduced(**stage: Any) -> dict[str, Any]:
    return {"reduce": [stage]}


def answer(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@dataclass
class Broken:
    """What is wrong, and the words that say so."""

    title: str
    words: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    text: str | bytes | None = None

    def __str__(self) -> str:
        return self.title


SETTINGS = [
    Broken("unknown section", ["c.yaml", "'limts'", "did you mean 'limits'"], {"limts": {}}),
    Broken("unknown key", ["'limits.stream'", "'streams'"], {"limits": {"stream": 3}}),
    Broken("python name of a key", ["unknown key 'task.answer_schema'"], task(answer_schema={})),
    Broken("wrong type", ["limits.streams", "integer", "'many'"], {"limits": {"streams": "many"}}),
    Broken("out of range", ["limits.streams", "(found 0)"], {"limits": {"streams": 0}}),
    Broken("too hot", ["model.temperature", "(found 3)"], {"model": {"temperature": 3}}),
    Broken(
        "drawn answers reused",
        ["c.yaml: cache: answers drawn at model.temperature 0.5", "cache_sampled: true"],
        {"cache": "run", "model": {"temperature": 0.5}},
    ),
    Broken("cache is a file", ["cache: ", "in.csv is not a folder"], {"cache": "in.csv/a/b"}),
    Broken("cache on", ["c.yaml: cache: is no switch", "(found True)"], {"cache": True}),
    Broken("cache a number", ["c.yaml: cache: expected a text"], {"cache": 3}),
    Broken("section is a list", ["limits: expected keys"], {"limits": [1]}),
    Broken("section is a text", ["task: expected keys", "'x'"], {"task": "x"}),
    Broken("no task", ["c.yaml: the key 'task' is missing"], {"task": None}),
    Broken("no prompt", ["c.yaml: task: prompt is missing"], task(prompt="LEFT OUT")),
    Broken("empty prompt", ["c.yaml: task: prompt is missing"], task(prompt="")),
    Broken("prompt is a number", ["task.prompt: expected a text", "5"], task(prompt=5)),
    Broken(
        "lone brace", ["c.yaml: task.prompt: line 2", "unmatched brace"], task(prompt="a\nb { c")
    ),
    Broken("run's name", ["name: expected letters", "'../x'"], {"name": "../x"}),
    Broken("not finite", ["c.yaml: limits.drain_s", "finite"], {"limits": {"drain_s": 1e999}}),
    Broken("64 bits", ["c.yaml: model.seed", "64 bits"], {"model": {"seed": 10**30}}),
    Broken("seed's range", ["c.yaml: model.seed"], {"model": {"seed": 2**63}}),
    Broken(
        "reserved field",
        ["model.extra_body", "model.name"],
        {"model": {"extra_body": {"model": 1}}},
    ),
    Broken(
        "unset variable", ["c.yaml: task.prompt", "NOT_SET_X"], task(prompt="{text} ${NOT_SET_X}")
    ),
    Broken("unknown backend", ["c.yaml: backend.kind", "'slurm'"], {"backend": {"kind": "slurm"}}),
    Broken(
        "processes",
        ["c.yaml: backend.processes", "greater than or equal to 1"],
        {"backend": {"processes": 0}},
    ),
    Broken("graph's name", ["task.graph: expected package.module:"], task(graph="nope")),
    Broken("graph not there", ["task.graph", "No module named 'nope'"], task(graph="nope.x:f")),
    Broken("graph no function", ["task.graph", "no function"], task(graph="sys:path")),
]
SCHEMAS = [
    Broken("bad type", ["c.yaml: task.schema", "at type"], task(schema={"type": "objekt"})),
    Broken(
        "bad properties",
        ["task.schema", "at properties"],
        task(schema=answer() | {"properties": [1]}),
    ),
    Broken("bad pattern", ["task.schema", "regex"], task(schema=answer(a={"pattern": "("}))),
    Broken("no such $ref", ["task.schema", "/nope"], task(schema={"$ref": "#/nope"})),
    Broken("remote $ref", ["task.schema", "$defs"], task(schema={"$ref": f"{DEAD}/x.json"})),
    Broken("yes", ["task.schema: expected keys"], task(schema=True)),
    Broken(
        "a key that is no text",
        ["task.schema.properties", "True"],
        task(schema=answer() | {"properties": {True: {}}}),
    ),
    Broken(
        "file missing", ["c.yaml: task.schema", "s.json", "No such file"], task(schema="s.json")
    ),
    Broken(
        "file broken",
        ["s.json, line 2", "not valid JSON"],
        task(schema="s.json"),
        {"s.json": '{\n"a": }'},
    ),
    Broken("file is a list", ["s.json", "no JSON Schema"], task(schema="s.json"), {"s.json": "[]"}),
]
REDUCE = [
    Broken(
        "unknown op", ["reduce.0: unknown op 'topk'", "'top_k'?"], reduced(op="topk", field="score")
    ),
    Broken("no op", ["reduce.0: the key 'op' is missing"], reduced(field="score")),
    Broken("no list", ["c.yaml: reduce", "list"], {"reduce": {"op": "count"}}),
    Broken("no mapping", ["reduce.0: expected keys", "'count'"], {"reduce": ["count"]}),
    Broken(
        "unknown key", ["'reduce.0.fild'", "'field'?"], reduced(op="top_k", field="score", fild=1)
    ),
    Broken("k", ["reduce.0.k", "(found 0)"], reduced(op="top_k", field="score", k=0)),
    Broken(
        "no such field",
        ["reduce.0 (stats)", "'scor'", "'score'?"],
        reduced(op="stats", field="scor"),
    ),
    Broken("no such collected field", ["(collect)", "'zz'"], reduced(op="collect", field="zz")),
    Broken("not a number", ["(stats)", "'label' is string"], reduced(op="stats", field="label")),
    Broken(
        "free text", ["'x' needs task.schema"], task(schema=None) | reduced(op="stats", field="x")
    ),
    Broken("endless", ["(histogram)", "unlimited"], reduced(op="histogram", field="score")),
    Broken(
        "bins' type",
        ["reduce.0.bins: expected a whole"],
        reduced(op="histogram", field="score", bins="x"),
    ),
    Broken("edges", ["rising order"], reduced(op="histogram", field="score", bins=[3, 1])),
    Broken("shown column", ["in.csv", "'nope'"], reduced(op="top_k", field="score", show=["nope"])),
]
FILES = [
    Broken("not there", ["nope.csv", "does not exist"], source(path="nope.csv")),
    Broken("empty", ["in.csv is empty"], files={"in.csv": ""}),
    Broken("header only", ["in.csv has no rows"], files={"in.csv": "id,text\n"}),
    Broken("blank id", ["'id' is blank", "line 3"], files={"in.csv": "id,text\n1,a\n,b\n"}),
    Broken(
        "repeated id", ["repeated: '1'", "on_duplicate"], files={"in.csv": "id,text\n1,a\n1,b\n"}
    ),
    Broken("no id column", ["'ID'", "input.id", "'id'?"], source(id="ID")),
    Broken(
        "encoding", ["not encoded as UTF-8", "line 2"], files={"in.csv": b"id,text\n1,caf\xe9\n"}
    ),
    Broken("UTF-16", ["UTF-16"], files={"in.csv": "id,text\n1,a\n".encode("utf-16")}),
    Broken("binary", ["in.csv is a binary file"], files={"in.csv": b"\0\1\2" * 99}),
    Broken("ragged", ["in.csv, line 2: 3 cells"], files={"in.csv": "id,text\n1,a,b\n"}),
    Broken(
        "broken row",
        ["in.jsonl, line 2"],
        source(path="in.jsonl"),
        {"in.jsonl": '{"id":1,"text":"a"}\n{"id":\n'},
    ),
    Broken("no Parquet", ["in.parquet"], source(path="in.parquet"), {"in.parquet": "PAR1xx"}),
    Broken(
        "unknown format",
        ["input format: .xml", ".jsonl"],
        source(path="in.xml"),
        {"in.xml": "<a/>"},
    ),
    Broken("no texts", ["no file of a known format"], source(path="d", id=None), {"d/x.bin": "1"}),
    Broken("no data set", ["input.dataset", "'foo'", "molecules"], {"input": {"dataset": "foo"}}),
    Broken("two inputs", ["c.yaml: input", "not both"], source(dataset="records")),
    Broken("no input", ["c.yaml", "input.path", "missing"], {"input": None}),
    Broken("no path", ["c.yaml: input.path", "empty"], source(path="")),
    Broken("NUL", ["c.yaml: input.path", "NUL"], source(path="a\0.csv")),
    Broken("no column for the prompt", ["in.csv", "'tekst'", "'text'?"], task(prompt="{tekst}")),
    Broken("no SMILES column", ["'smi'", "input.smiles"], source(smiles="smi")),
]
ENDPOINTS = [
    Broken("none", ["c.yaml: the key 'endpoints' is missing"], {"endpoints": None}),
    Broken(
        "two",
        ["exactly one", "urls and simulated"],
        {"endpoints": {"urls": [DEAD], "simulated": {}}},
    ),
    Broken("empty urls", ["c.yaml: endpoints.urls is empty"], {"endpoints": {"urls": []}}),
    Broken("urls is a text", ["endpoints.urls", "list"], {"endpoints": {"urls": DEAD}}),
    Broken("scheme", ["c.yaml: endpoints.urls.0", "'htp:/x'"], {"endpoints": {"urls": ["htp:/x"]}}),
    Broken(
        "no scheme", ["endpoints.urls.1", "'host:80'"], {"endpoints": {"urls": [DEAD, "host:80"]}}
    ),
    Broken("port", ["65535"], {"endpoints": {"urls": ["http://h:99999/v1"]}}),
    Broken("IPv6", ["endpoints.urls.0"], {"endpoints": {"urls": ["http://[::1/v1"]}}),
    Broken("blank", ["blanks"], {"endpoints": {"urls": ["http://a b:80/v1"]}}),
    Broken("nobody there", ["no endpoint answers", "127.0.0.1:9"], {"endpoints": {"urls": [DEAD]}}),
    Broken("no file", ["e.txt", "No such file"], {"endpoints": {"file": "e.txt"}}),
    Broken("empty file", ["e.txt", "no endpoint"], {"endpoints": {"file": "e.txt"}}, {"e.txt": ""}),
    Broken(
        "binary file", ["e.txt", "UTF-8"], {"endpoints": {"file": "e.txt"}}, {"e.txt": b"\xff\xfe"}
    ),
    Broken(
        "broken file",
        ["e.txt, line 2", "TAB"],
        {"endpoints": {"file": "e.txt"}},
        {"e.txt": "h:80\na b\n"},
    ),
    Broken(
        "empty key", ["endpoints.api_key: is empty"], {"endpoints": {"urls": [DEAD], "api_key": ""}}
    ),
    Broken("no such word", ["endpoints: expected keys"], {"endpoints": "automatic"}),
    Broken(
        "hosts without a job",
        ["endpoints.hosts", "NOT_SET_X is not set"],
        {"endpoints": {"hosts": "$NOT_SET_X"}},
    ),
    Broken("hosts' brackets", ["endpoints.hosts", "'n[1-'"], {"endpoints": {"hosts": "n[1-"}}),
    Broken("hosts' file", ["nodes", "No such file"], {"endpoints": {"hosts": "./nodes"}}),
    Broken(
        "port without hosts",
        ["endpoints: port goes with hosts"],
        {"endpoints": {"urls": [DEAD], "port": 80}},
    ),
    Broken(
        "not an Aegis registry",
        ["endpoints.aegis_registry", "cannot query"],
        {"endpoints": {"aegis_registry": DEAD}},
    ),
    Broken(
        "registry's URL",
        ["endpoints.aegis_registry", "'head:80'"],
        {"endpoints": {"aegis_registry": "head:80"}},
    ),
    Broken(
        "two tokens",
        ["endpoints.first: give token", "not both"],
        {"endpoints": {"first": {"token": "t", "token_command": "x"}}},
    ),
    Broken(
        "path",
        ["endpoints.first.paths", "'sophia'"],
        {"endpoints": {"first": {"paths": ["sophia"], "token": "t"}}},
    ),
    Broken(
        "nobody at the gateway",
        ["no endpoint answers", "a/b: cannot connect"],
        {"endpoints": {"first": {"paths": ["a/b"], "token": "t", "base_url": DEAD}}},
    ),
    Broken("responder", ["responder 'foo'", "esol, labels, schema"], simulated(responder="foo")),
    Broken("fault", ["faults.0", "'zzz'"], simulated(faults=[{"kind": "zzz"}])),
    Broken("fault's nodes", ["faults.0.nodes"], simulated(faults=[{"kind": "500", "nodes": "x"}])),
    Broken("fault's number", ["faults.0", "type"], simulated(faults=[{"kind": "500", "p": "x"}])),
]
YAML = [
    Broken("empty", ["c.yaml", "an empty file"], text=""),
    Broken("list", ["c.yaml", "found list"], text="- 1"),
    Broken("no YAML", ["c.yaml, line 2"], text="a: [1\nb: 2"),
    Broken("key twice", ["c.yaml, line 2", "'name' is given twice"], text="name: a\nname: b"),
    Broken("list as key", ["c.yaml, line 1", "key must be a text"], text="a: {[1]: 2}"),
    Broken("code", ["c.yaml, line 1"], text="a: !!python/object/apply:os.system [ls]"),
    Broken("date", ["c.yaml: name", "quotes"], text="name: 2020-01-01"),
    Broken("no date", ["c.yaml", "month"], text="name: 2020-13-45"),
    Broken("endless alias", ["c.yaml: a.0", "alias"], text="a: &a [*a]"),
    Broken("deep", ["c.yaml", "too deeply"], text="a: " + "[" * 3000),
    Broken("number as key", ["c.yaml", "key 1", "quotes"], text="1: 2"),
    Broken("encoding", ["c.yaml", "UTF-8"], text=b"\xff\xfe\0\1"),
    Broken("NUL", ["c.yaml", "#x0000"], text=b"a: \0"),
]
OPTIONS = [
    Broken("set what", ["--set x", "KEY=VALUE"], options=["--set", "x"]),
    Broken("set no YAML", ["--set limits.streams", "'[1'"], options=["--set", "limits.streams=[1"]),
    Broken("set a typo", ["'limits.stream'"], options=["--set", "limits.stream=1"]),
    Broken("set below a text", ["--set name.x"], options=["--set", "name.x=1"]),
    Broken("set nothing", ["KEY=VALUE"], options=["--set", "a..b=1"]),
    Broken(
        "set beyond a list", ["--set reduce.7.k", "it has 1"], options=["--set", "reduce.7.k=1"]
    ),
    Broken("limit", ["--limit"], options=["--limit", "0"]),
    Broken("limit x", ["--limit"], options=["--limit", "x"]),
    Broken("unknown option", ["--nope"], options=["--nope"]),
    Broken("endpoints typo", ["'simulatd'", "http://"], options=["--endpoints", "simulatd"]),
    Broken("endpoints host", ["'host:80'", "http://"], options=["--endpoints", "host:80"]),
    Broken("endpoints empty", ["--endpoints ''"], options=["--endpoints", ""]),
    Broken("input", ["zz.csv"], options=["--input", "zz.csv"]),
    Broken("input empty", ["--input is empty"], options=["--input", ""]),
    Broken("saver", ["--checkpointer", "mysql"], options=["--checkpointer", "mysql://u:pw@h/x"]),
    Broken(
        "saver off",
        ["--checkpointer", "127.0.0.1"],
        options=["--checkpointer", "postgresql://u:pw@127.0.0.1:9/x"],
    ),
    Broken("out is a file", ["in.csv"], options=["--out", "in.csv"]),
    Broken("out in a file", ["in.csv/x"], options=["--out", "in.csv/x"]),
    Broken(
        "out is foreign",
        ["d: not a run folder", "name another"],
        files={"d/x": "1"},
        options=["--out", "d"],
    ),
    Broken("deep out", ["'zz'"], task(prompt="{zz}"), options=["--out", "a/b/c"]),
]


@pytest.mark.parametrize(
    "broken",
    [*SETTINGS, *SCHEMAS, *REDUCE, *FILES, *ENDPOINTS, *YAML, *OPTIONS],
    ids=str,
)
def test_one_message_and_nothing_written(broken: Broken, shell: Shell) -> None:
    shell.write(**broken.config)
    for name, content in broken.files.items():
        path = shell.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if broken.text is not None:
        text = broken.text if isinstance(broken.text, bytes) else broken.text.encode()
        (shell.folder / "c.yaml").write_bytes(text)
    before = shell.files()
    said = shell("run", "c.yaml", *broken.options)
    assert said.code == 2, said.err
    assert not [word for word in broken.words if word not in said.err], said.err
    assert "Traceback" not in said.err
    assert "pw" not in said.err
    assert not said.out
    assert shell.files() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nope.yaml"], ["nope.yaml", "no such file"]),
        (["run", "."], [".", "directory"]),
        (["run", "molecular_screning"], ["did you mean 'molecular_screening'"]),
        (["run"], ["CONFIG|PRESET"]),
        (["rum"], ["'rum'"]),
        (["run", "molecular_screening", "--input", "in.csv"], ["--endpoints"]),
        (["run", "molecular_screening", "--set", "input={path: in.csv}"], ["--endpoints"]),
        (["resume", "zz"], ["zz: no such run folder"]),
        (["resume", "."], ["not a run folder"]),
        (["status", "zz"], ["zz: no such run folder"]),
        (["status", "."], ["not a run folder"]),
        (["results", "in.csv"], ["in.csv: no such run folder"]),
        (["results", ".", "--format", "xml"], ["xml", "jsonl, csv, parquet"]),
        (["results", ".", "--format", "parquet"], ["-o FILE"]),
        (["results", ".", "-o", "x.csv", "--format", "jsonl"], ["suffix says csv", "says jsonl"]),
        (["results", ".", "-o", "x.parquet", "--format", "csv"], ["suffix says parquet"]),
        (["results", ".", "-o", "x.txt"], ["x.txt", "--format", ".csv"]),
        (["results", ".", "-o", "x"], ["suffix names no format"]),
        (["presets", "show", "data_anotation"], ["did you mean 'data_annotation'"]),
        (["presets", "copy", "nope"], ["nope", "data_annotation"]),
        (["presets", "copy", "data_annotation", "in.csv"], ["in.csv: exists already"]),
        (["presets", "copy", "data_annotation", "x/y"], ["x/y", "No such file"]),
        (["simulate", "--addressing", "foo"], ["addressing"]),
        (["simulate", "--responder", "foo"], ["responder 'foo'"]),
        (["simulate", "--nodes", "0"], ["--nodes"]),
        (["simulate", "--file", "x/y"], ["x/y: cannot be written"]),
        (["check", "nope.yaml"], ["no such file"]),
        # an empty name is not the working directory: so a variable that is not set looks
        (["run", "c.yaml", "--out", "\udcff"], ["--out", "\\udcff is not UTF-8"]),
        (["run", "\udcff"], ["\\udcff is not UTF-8"]),
        (["status", "\udcff"], ["\\udcff is not UTF-8"]),
        (["run", ""], ["CONFIG|PRESET", "is empty"]),
        (["run", "c.yaml", "--out="], ["--out", "is empty"]),
        (["resume", ""], ["DIR", "is empty"]),
        (["status", ""], ["DIR", "is empty"]),
        (["results", ".", "-o", ""], ["--output", "is empty"]),
        (["cancel", ""], ["DIR", "is empty"]),
        (["submit", "", "--site", "x", "--nodes", "1", "--walltime", "1h"], ["DIR", "is empty"]),
        (["serve", "", "--servers", "x"], ["CONFIG|DIR", "is empty"]),
        (["presets", "copy", "data_annotation", ""], ["is empty"]),
    ],
    ids=" ".join,
)
def test_other_commands(arguments: list[str], words: list[str], shell: Shell) -> None:
    before = shell.files()
    said = shell(*arguments)
    assert said.code == 2, said.err
    assert not [word for word in words if word not in said.err], said.err
    assert shell.files() == before


@pytest.mark.parametrize(
    "broken", [task(prompt="{zz}"), source(id="ID"), {"input": None}, {"cache": "in.csv"}], ids=str
)
def test_check_finds_what_run_finds(broken: dict[str, Any], shell: Shell) -> None:
    shell.write(**broken)
    assert shell("check", "c.yaml").err == shell("run", "c.yaml").err != ""


def test_nothing_is_called_when_the_input_is_wrong(shell: Shell, fleet: Served) -> None:
    shell.write(**task(prompt="{zz}"), endpoints={"urls": list(fleet.urls)})
    assert shell("run", "c.yaml").code == 2
    assert fleet.requests == 0


@pytest.mark.parametrize("where", ["config", "option", "file"])
def test_no_message_shows_a_secret(shell: Shell, where: str) -> None:
    secret = "s3cr3t"
    url = f"http://user:{secret}@127.0.0.1:9/v1"
    options = ["--endpoints", url] if where == "option" else []
    if where == "file":
        (shell.folder / "e.txt").write_text(url)
        options = ["--endpoints", "e.txt"]
    if where == "config":
        shell.write(endpoints={"urls": [url], "api_key": secret})
    said = shell("run", "c.yaml", *options)
    assert said.code == 2
    assert "api_key" in said.err
    assert secret not in said.err
    shell.write(endpoints={"urls": url})
    assert secret not in shell("run", "c.yaml").err
    assert secret not in shell("run", "c.yaml", "--set", f"endpoints.api_key=[{secret}").err


def test_a_masked_key_is_not_sent(shell: Shell, fleet: Served) -> None:
    shell.write(endpoints={"urls": list(fleet.urls), "api_key": "**********"})
    said = shell("run", "c.yaml")
    assert (said.code, fleet.requests) == (2, 0)
    assert "endpoints.api_key" in said.err


def test_the_copy_of_a_preset_wants_endpoints(shell: Shell) -> None:
    assert shell("presets", "copy", "data_annotation", "p.yaml").code == 0
    said = shell("run", "p.yaml")
    assert said.code == 2
    assert "p.yaml: endpoints.urls is empty" in said.err
    assert yaml.safe_load((shell.folder / "p.yaml").read_text())["endpoints"]["urls"] == []
