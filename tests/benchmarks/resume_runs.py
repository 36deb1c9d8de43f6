"""``fanfold resume`` of a long run, up to its first call and to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import orjson

from fanfold.backends.core.checksum import CRC_TAIL_BYTES, add_crc
from fanfold.backends.inputs.item_store import ItemStore
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.storage.journal_file import make_header

from .suite import STREAMS, Place, open_place

_OPEN: Final = 2_000
"""Items that the resumed run has to ask."""
_MOST_LARGE: Final = 2_000_000
_SMALL: Final = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}


def measure(items: int) -> None:
    """Print what ``fanfold resume`` takes until it sends its first request, and to its end.

    All items but 2,000 are in the journal, as another process wrote it, and no checkpoint has them.
    The second session finds the index that the first one saved. More than two million items have
    small answers, for the sake of the disk.
    """
    spec = SimulationSpec.fast(nodes=8, max_num_seqs=64)
    with open_place(spec, items) as place:
        if items > _MOST_LARGE:
            settings = orjson.loads((place.folder / "bench.yaml").read_bytes())
            settings["task"]["schema"] = _SMALL
            (place.folder / "bench.yaml").write_bytes(orjson.dumps(settings))
        size = _write_run(place, items)
        print(f"fanfold resume, {items:,} items, {_OPEN:,} open, journal {size / 1e6:,.0f} MB")
        print(f"{'':>28} {'CPU s':>8} {'wall s':>8} {'peak MB':>8}")
        _resume(place, "first call, whole journal", ends=False)
        _resume(place, "first call, saved index", ends=True)


def _write_run(place: Place, items: int) -> int:
    """Begin a run, and write the journal of another session; return its size in bytes."""
    command = place.fanfold("run", items, "--set", "limits.hedge=false")
    process = subprocess.Popen(command, cwd=place.folder, stdout=subprocess.DEVNULL)
    place.wait_for_requests(STREAMS)
    process.send_signal(signal.SIGTERM)
    process.wait()
    folder = place.folder / "run"
    first = folder / "journal" / "0001.jsonl"
    header, *lines = first.read_bytes().splitlines(keepends=True)
    records = [orjson.loads(line) for line in lines]
    ended = {record["index"] for record in records}
    stem, name = records[0]["index"], orjson.dumps(records[0]["id"])
    before, between, after = _split(
        lines[0][:-CRC_TAIL_BYTES] + b"}", b'"index":%d,' % stem, b'"id":%b,' % name
    )
    path = first.with_name("0002.jsonl")
    about = {"run": orjson.loads(header)["run"], "session": "benchmark"}
    with path.open("wb") as file, ItemStore(folder / "items.arrow") as store:
        line, crc = add_crc(make_header(path, "journal", about), 0)
        file.write(line)
        for number, text in enumerate(store.iter_ids()):
            if number in ended or number >= items - _OPEN:
                continue
            middle = b'"index":%d,%b"id":%b,' % (number, between, orjson.dumps(text))
            line, crc = add_crc(before + middle + after, crc)
            file.write(line)
    return first.stat().st_size + path.stat().st_size


def _split(data: bytes, *parts: bytes) -> list[bytes]:
    """Split a text at parts of it, in their order."""
    found = list[bytes]()
    for part in parts:
        before, _, data = data.partition(part)
        found.append(before)
    return [*found, data]


def _resume(place: Place, what: str, *, ends: bool) -> None:
    """Print what resuming the run takes up to its first request, and to its end or a kill."""
    asked = place.count_requests()["requests"]
    command = [sys.executable, "-P", "-m", "fanfold", "resume", "run", "--json"]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=place.folder, stdout=subprocess.DEVNULL)
    while place.count_requests()["requests"] == asked:
        if process.poll() is not None:
            raise SystemExit(f"fanfold resume ended with {process.returncode} before a request")
        time.sleep(0.05)
    peak = _read_peak(process.pid)
    _print(what, process.pid, began, peak)
    if not ends:
        process.kill()
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        peak = max(peak, _read_peak(process.pid))
        time.sleep(0.05)
    if ends:
        _print("end of the run", process.pid, began, peak)
    process.wait()


def _print(what: str, pid: int, began: float, peak: float) -> None:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    spent = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    print(f"{what:>28} {spent:>8.2f} {time.monotonic() - began:>8.2f} {peak:>8.0f}", flush=True)


def _read_peak(pid: int) -> float:
    """Return the peak memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["VmHWM"].split()[0]) / 1024 if "VmHWM" in found else 0.0
