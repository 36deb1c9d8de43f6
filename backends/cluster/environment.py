"""Pack the running Python into one archive: interpreter, standard library and packages.

Unpacked on any machine, even without Python, it runs as ``bin/fanfold`` or, for workers,
``bin/python``: CPython finds its library beside its own program. So a node opens only files on its
own storage.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import sysconfig
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.resources import files
from pathlib import Path
from typing import Final

from ..core.errors import ConfigurationError

_OWN: Final = ("__init__.py", "__main__.py", "py.typed", "graphs", "nodes", "backends", "configs")
"""Parts of fanfold in its wheel; from a checkout only these are packed."""

_NO_LIBRARY: Final = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "tkinter",
        "turtledemo",
        "ensurepip",
        "lib2to3",
        "sitecustomize.py",
    }
)
"""Parts of the standard library that no run needs; the last one is specific to the machine."""

_SYSTEM: Final = ("/usr", "/usr/local")

_CUSTOM: Final = """\
\"\"\"Add the packages beside the standard library to the search path.\"\"\"

import os
import site
import sys

here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site-packages")
if here not in sys.path:
    site.addsitedir(here)
"""

_PROGRAM: Final = """\
#!/bin/sh
# {what} from an archive made by 'fanfold pack'; it runs wherever it was unpacked.
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd -P)
{library}exec "$here/bin/{python}" -I {module}"$@"
"""

_LIBRARY: Final = 'export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"\n'


@dataclass(frozen=True, slots=True)
class EnvironmentArchive:
    """A packed archive.

    Attributes:
        path: The archive.
        files: Number of files in it.
        size: Its size in bytes.
        packages: Names of the distributions in it.
    """

    path: Path
    files: int
    size: int
    packages: tuple[str, ...]


def pack_environment(target: Path, without: Collection[str] = ()) -> EnvironmentArchive:
    """Write an archive of this process' Python, standard library and packages.

    Args:
        target: The archive, ``….tar.gz``, or ``….tar`` without compression.
        without: Distributions to leave out, such as a model server that is installed on the nodes.

    Raises:
        ConfigurationError: A package cannot be copied, or the archive cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    kept = _list_packages(without)
    count = 0
    try:
        partial.unlink(missing_ok=True)
        with _open_archive(partial, target.name.endswith((".tar.gz", ".tgz"))) as archive:
            for path, inside in _entries(without):
                archive.add(path, inside, recursive=False)
                count += 1
            for inside, text, mode in _generated_files():
                _add_text(archive, inside, text, mode)
                count += 1
        partial.replace(target)
    except OSError as error:
        raise ConfigurationError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return EnvironmentArchive(target, count, target.stat().st_size, tuple(kept))


def _open_archive(path: Path, compressed: bool) -> tarfile.TarFile:
    if compressed:
        return tarfile.open(path, "x:gz", compresslevel=4)
    return tarfile.open(path, "x")


def _list_packages(without: Collection[str]) -> list[str]:
    """Return the names of the distributions to pack.

    Raises:
        ConfigurationError: One is installed as a checkout, or one to leave out is not installed.
    """
    here = {str(Path(folder).resolve()) for folder in _folders()}
    names, missing = [], {_normalize_name(name) for name in without}
    for found in distributions():
        name = found.metadata["Name"]
        missing.discard(_normalize_name(name))
        if (
            _normalize_name(name) in map(_normalize_name, without)
            or str(_location(found)) not in here
        ):
            continue
        if _normalize_name(name) != "fanfold" and _is_editable(found):
            msg = f"{name} is installed as a checkout (pip install -e); install it without -e"
            raise ConfigurationError(msg)
        names.append(name)
    if missing:
        raise ConfigurationError(f"--without {min(missing)}: no such package is installed")
    return sorted(set(names))


def _normalize_name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _location(found: Distribution) -> Path:
    return Path(str(found.locate_file(""))).resolve()


def _is_editable(found: Distribution) -> bool:
    text = found.read_text("direct_url.json")
    return bool(text and json.loads(text).get("dir_info", {}).get("editable"))


def _folders() -> list[str]:
    """Return the folders of this environment's packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys((paths["purelib"], paths["platlib"])))


def _entries(without: Collection[str]) -> Iterator[tuple[Path, str]]:
    """Yield files and their paths in the archive."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield Path(getattr(sys, "_base_executable", sys.executable)).resolve(), f"bin/{version}"
    yield from _shared_libraries(version)
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    library = {sysconfig.get_path(key, vars=base | _base_paths()) for key in _LIBRARIES}
    for folder in sorted(library):
        yield from _tree(Path(folder), f"lib/{version}", _NO_LIBRARY)
    packages = f"lib/{version}/site-packages"
    left_out = _distribution_files(without)
    for folder in _folders():
        for path, inside in _tree(Path(folder), packages, frozenset()):
            if path not in left_out and not _is_own(path, Path(folder)):
                yield path, inside
    yield from _fanfold(f"{packages}/fanfold")


_LIBRARIES: Final = ("stdlib", "platstdlib")


def _base_paths() -> dict[str, str]:
    return {"installed_base": sys.base_prefix, "installed_platbase": sys.base_exec_prefix}


def _shared_libraries(version: str) -> Iterator[tuple[Path, str]]:
    """Yield the interpreter's shared libraries; a system's own exist on every node."""
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    pattern = f"lib{version}*.so*" if sys.base_prefix in _SYSTEM else "*.so*"
    for path in sorted(folder.glob(pattern)):
        if path.is_file():
            yield path, f"lib/{path.name}"


def _tree(folder: Path, inside: str, skipped: Collection[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder; each link is followed once."""
    for root, folders, names in os.walk(folder):
        here = Path(root)
        top = here == folder
        folders[:] = sorted(
            f for f in folders if not (top and (f in skipped or f.startswith("config-")))
        )
        for name in sorted(names):
            path = here / name
            if not (top and name in skipped) and path.is_file():
                yield path, f"{inside}/{path.relative_to(folder).as_posix()}"


def _is_own(path: Path, folder: Path) -> bool:
    """Return True if a file belongs to an installed fanfold or names its checkout."""
    top = path.relative_to(folder).parts[0]
    return top == "fanfold" or (top.endswith(".pth") and "fanfold" in top)


def _fanfold(inside: str) -> Iterator[tuple[Path, str]]:
    package = Path(str(files("fanfold"))).resolve()
    for name in _OWN:
        path = package / name
        if path.is_dir():
            yield from _tree(path, f"{inside}/{name}", frozenset())
        else:
            yield path, f"{inside}/{name}"


def _distribution_files(names: Collection[str]) -> set[Path]:
    wanted = set(map(_normalize_name, names))
    return {
        Path(str(found.locate_file(file)))
        for found in distributions()
        if _normalize_name(found.metadata["Name"]) in wanted
        for file in found.files or ()
    }


def _generated_files() -> Iterator[tuple[str, str, int]]:
    """Yield the files that are generated for the archive: name, text, mode."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = bool(sysconfig.get_config_var("Py_ENABLE_SHARED"))
    library = _LIBRARY if shared or sys.base_prefix not in _SYSTEM else ""
    for what, module in (("fanfold", "-m fanfold "), ("python", "")):
        text = _PROGRAM.format(what=what, module=module, library=library, python=version)
        yield f"bin/{what}", text, 0o755
    yield f"lib/{version}/sitecustomize.py", _CUSTOM, 0o644
    about = {"python": platform.python_version(), "platform": platform.platform()}
    yield "packed.json", json.dumps({"v": 1, **about}) + "\n", 0o644


def _add_text(archive: tarfile.TarFile, inside: str, text: str, mode: int) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(inside)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))
