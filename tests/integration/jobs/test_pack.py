"""An archive of the environment runs where it is unpacked, without the original."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from fanfold.backends.cluster.environment import pack_environment
from fanfold.backends.core.errors import ConfigurationError

NEEDED = {  # of what is run below; all packages would take a minute
    *("fanfold", "click", "rich", "pygments", "markdown-it-py", "mdurl"),
    *("orjson", "pydantic", "pydantic-core", "annotated-types", "pyyaml"),
    *("typing-extensions", "typing-inspection", "jsonschema-rs", "colorama"),
}


def test_it_runs_elsewhere_from_itself_alone(tmp_path: Path) -> None:
    names = {str(d.metadata["Name"]) for d in distributions()}
    others = sorted(n for n in names if n.lower().replace("_", "-").replace(".", "-") not in NEEDED)
    packed = pack_environment(tmp_path / "env.tar", others)
    assert "fanfold" in packed.packages
    assert packed.size == packed.path.stat().st_size
    there = tmp_path / "some where"
    with tarfile.open(packed.path) as archive:
        archive.extractall(there, filter="tar")
    packed.path.unlink()
    (there / "elsewhere").mkdir()
    moved = there.rename(tmp_path / "moved again")
    shown = (
        "import fanfold, rich, sys; print(fanfold.__file__, rich.__file__, sys.prefix, *sys.path)"
    )
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(moved / "lib")}
    asked = [str(moved / "bin" / version), "-I", "-c", shown]
    done = subprocess.run(
        asked, env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sys.prefix not in done.stdout
    assert sys.base_prefix not in done.stdout.replace(str(moved), "")
    assert done.stdout.count(str(moved)) >= 4
    for program, words, code, says in (
        ("fanfold", ["--version"], 0, "fanfold "),
        ("fanfold", ["chain", "begin", "/none", "--job", "1"], 2, "/none: no such run folder"),
        ("python", ["-P", "-c", shown], 0, str(moved)),
    ):
        said = subprocess.run(
            [moved / "bin" / program, *words],
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == code, said.stderr
        assert says in said.stdout + said.stderr


def test_a_package_that_is_not_there_cannot_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--without no-such: no such package"):
        pack_environment(tmp_path / "env.tar", ["no-such"])
    assert not list(tmp_path.iterdir())
