"""A folder with an endpoints file per host."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError, NoEndpointError
from fanfold.backends.discovery.sources import FileSource, HostsFolder


def urls(folder: HostsFolder) -> list[str]:
    return [spec.url.removeprefix("http://") for spec in folder.read()]


def test_hosts_come_and_go(tmp_path: Path) -> None:
    folder = HostsFolder(tmp_path)
    with pytest.raises(NoEndpointError, match="no host has written its file yet"):
        folder.read()
    (tmp_path / "b").write_text("b:8000\nb:8001\n")
    (tmp_path / "a.cluster.example").write_text("# a\na:8000\n")
    assert urls(folder) == ["a:8000", "b:8000", "b:8001"]
    (tmp_path / "b").write_text("b:8001\n")
    assert urls(folder) == ["a:8000", "b:8001"]
    (tmp_path / "a.cluster.example").unlink()
    assert urls(folder) == ["b:8001"]
    (tmp_path / "b").write_text("# restarting\n")
    with pytest.raises(NoEndpointError):
        folder.read()


def test_what_is_no_host(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("nothing of ours")
    (tmp_path / ".a.partial").write_text("a:80")
    (tmp_path / "a").write_text("a:8000\na:8000\n")
    (tmp_path / "same").write_text("A:8000\n")
    assert len(urls(HostsFolder(tmp_path))) == 1


def test_a_broken_file_leaves_its_host_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = HostsFolder(tmp_path)
    (tmp_path / "a").write_text("a:8000\n")
    (tmp_path / "b").write_text("b 8000\n")
    with caplog.at_level(logging.WARNING):
        assert urls(folder) == ["a:8000"]
        (tmp_path / "a").write_text("a:80x\n")
        assert urls(folder) == ["a:8000"] == urls(folder)
    assert len(caplog.records) == 2
    assert "a, line 1" in caplog.text


async def test_a_source_of_files_may_become_one_of_folders(tmp_path: Path) -> None:
    path = tmp_path / "servers"
    source = FileSource(path)
    with pytest.raises(NoEndpointError, match="No such file"):
        await source.list_endpoints()
    path.write_text("a:8000\n")
    assert len(await source.list_endpoints()) == 1
    path.unlink()
    path.mkdir()
    (path / "a").write_text("a:8000\na:8001\n")
    assert len(await source.list_endpoints()) == 2


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"endpoints\.file: .*gone: cannot be read"):
        HostsFolder(tmp_path / "gone").read()
