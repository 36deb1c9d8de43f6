"""Endpoints in a file that another user can write get no key."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.permissions import find_path_risk
from fanfold.backends.discovery.auto import choose_endpoints
from fanfold.backends.discovery.node_local import find_node_specs
from fanfold.backends.discovery.resolve import list_endpoint_specs
from fanfold.backends.discovery.sources import FileSource, HostsFolder
from fanfold.backends.fleet.endpoint import NO_KEY, EndpointSpec
from fanfold.configs.endpoints import EndpointsConfig
from fanfold.configs.loader import load_config

KEY = "sk-secret"
Read = Callable[[Path], list[EndpointSpec]]


def by_setting(file: Path) -> list[EndpointSpec]:
    section: dict[str, Any] = {"file": str(file)}
    return list_endpoint_specs(EndpointsConfig(**section, api_key=SecretStr(KEY)), section)


def by_source(file: Path) -> list[EndpointSpec]:
    return FileSource(file, KEY)._read()


def by_folder(file: Path) -> list[EndpointSpec]:
    return HostsFolder(file.parent, KEY).read()


def by_node_list(file: Path) -> list[EndpointSpec]:
    section: dict[str, Any] = {"hosts": [str(file)]}
    file.write_text("n1\n")
    return list_endpoint_specs(EndpointsConfig(**section, api_key=SecretStr(KEY)), section)


def by_registry(file: Path) -> list[EndpointSpec]:
    settings = {
        "task": {"prompt": "{q}"},
        "model": {"name": "m"},
        "endpoints": {"urls": ["http://elsewhere:1"], "api_key": KEY},
        "backend": {
            "kind": "launched",
            "node_endpoints": True,
            "registry": str(file.parent),
        },
    }
    loaded = load_config(settings)
    return find_node_specs(loaded.config, loaded.plain["endpoints"], {}, "n1")


READERS: list[Read] = [by_setting, by_source, by_folder, by_node_list, by_registry]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "servers"
    folder.mkdir(mode=0o755)
    made = folder / "n1"
    made.write_text("n1:8000\n")
    made.chmod(0o644)
    return made


def keys(specs: list[EndpointSpec]) -> set[object]:
    assert specs
    return {spec.api_key for spec in specs}


@pytest.mark.parametrize("read", READERS)
def test_files_that_nobody_else_can_write(
    read: Read, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode in (0o600, 0o644, 0o444):
        file.chmod(mode)
        assert keys(read(file)) == {KEY}
    file.parent.parent.chmod(0o1777)
    file.parent.chmod(0o700)
    assert keys(read(file)) == {KEY}
    assert not caplog.records


@pytest.mark.parametrize("read", READERS)
def test_files_that_everyone_can_write(
    read: Read, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.chmod(0o646)
    assert keys(read(file)) == {NO_KEY}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert f"get no API key: everyone can write {file} (chmod go-w {file})" in said
    assert KEY not in said


@pytest.mark.parametrize("read", READERS)
def test_folders_that_everyone_can_write(
    read: Read, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.chmod(0o757)
    assert keys(read(file)) == {NO_KEY}
    assert f"everyone can write {file.parent}" in caplog.text


@pytest.mark.parametrize("read", READERS)
def test_files_of_somebody_else(
    read: Read, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 12345)
    if uid == 0:  # root's own files are trusted by everybody
        os.chown(file, 23456, -1)
    assert keys(read(file)) == {NO_KEY}
    assert "belongs to" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to any group")
@pytest.mark.parametrize("read", READERS)
def test_a_group_counts_unless_it_is_this_users_own(read: Read, file: Path) -> None:
    file.chmod(0o664)
    assert keys(read(file)) == {KEY}
    os.chown(file, -1, 54321)
    assert keys(read(file)) == {NO_KEY}
    file.chmod(0o644)
    assert keys(read(file)) == {KEY}
    os.chown(file.parent, -1, 54321)
    file.parent.chmod(0o775)
    assert keys(read(file)) == {NO_KEY}


@pytest.mark.parametrize("read", [by_setting, by_source])
def test_links_and_what_they_name(read: Read, file: Path, tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    link = open_folder / "link"
    link.symlink_to(file)
    assert keys(read(link)) == {KEY}
    open_folder.chmod(0o777)
    assert keys(read(link)) == {NO_KEY}
    open_folder.chmod(0o755)
    file.parent.chmod(0o777)
    assert keys(read(link)) == {NO_KEY}


async def test_a_file_that_opens_during_a_run(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FileSource(file, KEY)
    assert keys(await source.list_endpoints()) == {KEY}
    file.chmod(0o666)
    assert keys(await source.list_endpoints()) == {NO_KEY}
    assert keys(await source.list_endpoints()) == {NO_KEY}
    assert len(caplog.records) == 1
    file.chmod(0o644)
    assert keys(await source.list_endpoints()) == {KEY}


async def test_a_folder_that_opens_during_a_run(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FileSource(file.parent, KEY)
    (file.parent / "n2").write_text("n2:8000\n")
    assert keys(await source.list_endpoints()) == {KEY}
    file.chmod(0o666)  # one host's file alone
    assert {s.url: s.api_key for s in await source.list_endpoints()} == {
        "http://n1:8000": NO_KEY,
        "http://n2:8000": KEY,
    }
    file.parent.chmod(0o777)
    assert keys(await source.list_endpoints()) == {NO_KEY}
    seen = len(caplog.records)
    await source.list_endpoints()
    assert len(caplog.records) == seen


def test_without_a_key_nothing_is_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.chmod(0o666)
    assert keys(FileSource(file)._read()) == {NO_KEY}
    section: dict[str, Any] = {"file": str(file)}
    assert keys(list_endpoint_specs(EndpointsConfig(**section), section)) == {NO_KEY}
    assert not caplog.records


async def test_what_auto_finds_in_the_working_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {
        "task": {"prompt": "{q}"},
        "endpoints": {"auto": True, "api_key": KEY},
    }
    for name in ("aegis_registry_url.txt", "endpoints.txt"):
        (tmp_path / name).write_text("http://127.0.0.1:1\n")
        (tmp_path / name).chmod(0o666)
    with pytest.raises(ConfigurationError):
        await choose_endpoints(load_config(settings).config, {}, tmp_path, ports=[1])
    assert sum("get no API key" in r.getMessage() for r in caplog.records) == 2


def test_every_folder_and_link_on_the_way_counts(tmp_path: Path) -> None:
    for name in ("pa", "pb", "w", "w/mine", "dir"):
        (tmp_path / name).mkdir(mode=0o755)
        (tmp_path / name).chmod(0o755)
    real, w = tmp_path / "pb" / "real.txt", tmp_path / "w"
    for file in (real, tmp_path / "dir" / "real.txt", w / "mine" / "ep.txt"):
        file.write_text("http://n:1")
        file.chmod(0o644)
    (w / "l").symlink_to(real)
    (w / "dirl").symlink_to("../dir")
    (tmp_path / "pa" / "ep.txt").symlink_to(w / "l")
    (tmp_path / "pa" / "up").symlink_to("../w/dirl/real.txt")
    ways = (tmp_path / "pa/ep.txt", tmp_path / "pa/up", w / "mine/ep.txt", w / "dirl/real.txt")
    for way in ways:
        assert find_path_risk(way) is None
    w.chmod(0o777)
    for way in (*ways, w / ".." / "w" / "mine" / "ep.txt"):
        assert f"everyone can write {w} (chmod" in str(find_path_risk(way))
    assert find_path_risk(real) is None
    w.chmod(0o1777)
    for way in ways:
        assert find_path_risk(way) is None
    w.chmod(0o775)  # a project's folder further up
    assert find_path_risk(w / "mine" / "ep.txt") is None
