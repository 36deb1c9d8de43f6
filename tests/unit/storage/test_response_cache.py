from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage import response_cache
from fanfold.backends.storage import response_cache as stores
from fanfold.backends.storage import response_files as files
from fanfold.backends.storage.response_cache import ResponseCache
from fanfold.backends.storage.response_files import format_line, parse_answer, parse_key


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8), digest_size=16).digest()


def answer(number: int, length: int = 20) -> bytes:
    return orjson.dumps({"n": number, "text": "ä" * length})


def opened(folder: Path, simulated: bool = False, writer: str = "w") -> ResponseCache:
    made = ResponseCache(folder, simulated=simulated, writer=writer)
    made.open()
    return made


def got(store: ResponseCache, number: int) -> bytes | None:
    place = store.find(key(number))
    return None if place is None else store.read(key(number), place)


def only_file(folder: Path) -> Path:
    (file,) = (folder / "real-v1").glob("*.jsonl")
    return file


def test_it_gives_back_what_it_keeps_now_and_later(tmp_path: Path) -> None:
    first = opened(tmp_path / "a" / "b")
    for number in range(50):
        first.put(key(number), answer(number, 1000 * number))
    assert all(got(first, n) == answer(n, 1000 * n) for n in range(50))
    assert got(first, 50) is None
    first.close()
    later = opened(tmp_path / "a" / "b")
    assert len(later) == 50
    assert all(got(later, n) == answer(n, 1000 * n) for n in range(50))
    later.close()


def test_a_file_is_lines_of_json_with_a_version(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(key(1), answer(1))
    header, line = map(orjson.loads, only_file(tmp_path).read_bytes().splitlines())
    assert header == {"v": 1, "simulated": False, "by": "w"}
    assert line["answer"] == orjson.loads(answer(1))
    assert line["key"] == key(1).hex()
    store.close()


def test_nothing_kept_makes_no_file(tmp_path: Path) -> None:
    opened(tmp_path).close()
    assert list((tmp_path / "real-v1").glob("*.jsonl")) == []


def test_others_find_it_when_they_look(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    one.put(key(1), answer(1))
    assert got(other, 1) is None
    other.refresh()
    assert got(other, 1) == answer(1)
    other.put(key(2), answer(2))
    one.put(key(3), answer(3))
    one.refresh()
    other.refresh()
    assert all(got(one, n) == got(other, n) == answer(n) for n in (1, 2, 3))
    assert len(one) == len(other) == 3
    one.close()
    other.close()


def test_simulated_and_real_answers_lie_apart(tmp_path: Path) -> None:
    real, simulated = opened(tmp_path), opened(tmp_path, simulated=True)
    real.put(key(1), answer(1))
    simulated.put(key(2), answer(2))
    for store in (real, simulated):
        store.refresh()
    assert (got(real, 2), got(simulated, 1)) == (None, None)
    real.close()
    simulated.close()


def test_a_file_moved_to_the_other_kind_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulated = opened(tmp_path, simulated=True)
    simulated.put(key(1), answer(1))
    simulated.close()
    real = opened(tmp_path)
    (file,) = (tmp_path / "simulated-v1").glob("*.jsonl")
    file.rename(tmp_path / "real-v1" / file.name)
    with caplog.at_level(logging.WARNING):
        real.refresh()
        real.refresh()
    assert got(real, 1) is None
    assert [
        r.message for r in caplog.records if "other kind or version of answers" in r.message
    ] != []
    assert len(caplog.records) == 1
    real.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_torn_end_costs_one_answer_at_most(tmp_path: Path, seed: int) -> None:
    """However many bytes of the last line the end of the process has cut off."""
    store = opened(tmp_path)
    for number in range(5):
        store.put(key(number), answer(number))
    store.close()
    file = only_file(tmp_path)
    whole = file.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    file.write_bytes(whole[: -random.Random(seed).randrange(1, last)])
    later = opened(tmp_path)
    assert [got(later, n) is not None for n in range(5)] == [True] * 4 + [False]
    later.put(key(4), answer(4))
    assert got(later, 4) == answer(4)
    later.close()
    last_of_all = opened(tmp_path)
    assert all(got(last_of_all, n) == answer(n) for n in range(5))
    last_of_all.close()


@pytest.mark.parametrize("seed", range(20))
def test_damage_costs_answers_and_never_makes_wrong_ones(tmp_path: Path, seed: int) -> None:
    """Bytes that the loss of power or a bad disk has changed, zeroed or cut out."""
    chance = random.Random(seed)
    store = opened(tmp_path)
    for number in range(30):
        store.put(key(number), answer(number, chance.randrange(200)))
    store.close()
    file = only_file(tmp_path)
    data = bytearray(file.read_bytes())
    head = data.index(b"\n") + 1
    for _ in range(4):
        at = chance.randrange(head, len(data) - 40)
        match chance.randrange(3):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + 40] = bytes(40)
            case _:
                del data[at : at + chance.randrange(1, 40)]
    file.write_bytes(data)
    later = opened(tmp_path)
    found = {n: got(later, n) for n in range(30)}
    intact = {n for n, text in found.items() if text is not None}
    assert all(orjson.loads(found[n] or b"null")["n"] == n for n in intact)
    assert 30 - len(intact) <= 12
    later.close()


def test_a_key_that_is_alike_in_8_bytes_gets_no_foreign_answer(tmp_path: Path) -> None:
    store = opened(tmp_path)
    one, other = bytes(16), bytes(8) + b"other" + bytes(3)
    store.put(one, answer(1))
    place = store.find(other)
    assert place is not None
    assert store.read(other, place) is None
    store.close()


def test_a_line_is_read_back_for_its_key_only() -> None:
    line = format_line(key(1), answer(1))
    assert orjson.loads(line)["answer"] == orjson.loads(answer(1))
    assert parse_key(line) == key(1)
    assert parse_answer(line, key(1)) == answer(1)
    assert parse_answer(line, key(2)) is None
    swapped = format_line(key(2), answer(2)).replace(key(2).hex().encode(), key(1).hex().encode())
    assert parse_answer(swapped, key(1)) is None
    for cut in range(len(line)):
        assert parse_answer(line[:cut], key(1)) is None


def test_a_folder_that_is_cleared_meanwhile_is_a_miss(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    one.put(key(1), answer(1))
    other.refresh()
    only_file(tmp_path).unlink()
    other.refresh()
    assert got(other, 1) is None
    other.close()
    one.close()


def test_files_that_vanish_while_they_are_looked_at(tmp_path: Path) -> None:
    one, other, gone = (opened(tmp_path, writer=name) for name in ("one", "other", "gone"))
    gone.put(key(1), answer(1))
    one.put(key(2), answer(2))
    other.refresh()
    (file,) = (tmp_path / "real-v1").glob("gone-*")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "nowhere")  # listed, and not there
    one.put(key(3), answer(3))
    other.refresh()
    assert got(other, 3) == answer(3)
    one.put(key(4), answer(4))
    assert other.update_claims([(key(4), True)]) == [True]
    assert got(other, 4) == answer(4)
    for store in (one, other, gone):
        store.close()


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_OPEN_FILES", 3)
    for number in range(8):
        store = opened(tmp_path)
        store.put(key(number), answer(number))
        store.close()
    later = opened(tmp_path)
    for _ in range(2):
        assert all(got(later, n) == answer(n) for n in range(8))
    later.close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cache: .*/real-v1: cannot be used: Not a d"):
        opened(tmp_path / "file")


def test_what_cannot_be_written_is_said_once_and_found_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.put(key(1), answer(1))
    torn, write = iter([10]), files.os.write  # type: ignore[attr-defined]

    def full(handle: int, data: bytes) -> int:
        for count in torn:
            return int(write(handle, data[:count]))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(files.os, "write", full)  # type: ignore[attr-defined]
        store.put(key(2), answer(2))
        store.put(key(3), answer(3))
    store.put(key(4), answer(4))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert [got(store, n) for n in (1, 2, 3, 4)] == [answer(1), None, None, None]
    store.close()
    later = opened(tmp_path)
    assert [got(later, n) for n in (1, 2, 3, 4)] == [answer(1), None, None, None]
    later.close()


def test_threads_put_and_look_at_the_same_time(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)

    def put(first: int) -> None:
        for number in range(first, 900, 3):
            one.put(key(number), answer(number))

    threads = [threading.Thread(target=put, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        other.refresh()
        one.refresh()
    other.refresh()
    for thread in threads:
        thread.join()
    assert all(got(store, n) == answer(n) for store in (one, other) for n in range(900))
    assert len(one) == len(other) == 900
    one.close()
    other.close()


WRITER = """
import os, sys
from pathlib import Path
from fanfold.backends.storage.response_cache import ResponseCache
sys.path.insert(0, sys.argv[3])
from test_response_cache import answer, key
store = ResponseCache(Path(sys.argv[1]), simulated=False, writer=f"w{os.getpid()}")
store.open()
for number in range(int(sys.argv[2]), 10**9, 2):
    store.put(key(number), answer(number, 300))
    if number // 2 == 200:
        print("going", flush=True)
"""


def test_processes_that_are_killed_leave_what_they_kept(tmp_path: Path) -> None:
    """Two writers are killed in the middle of writing; every line but the torn last is whole."""
    here = str(Path(__file__).parent)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(n), here], stdout=subprocess.PIPE
        )
        for n in (0, 1)
    ]
    reader = opened(tmp_path)
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"going\n"
        reader.refresh()
    for writer in writers:
        writer.kill()
        writer.communicate()
    reader.refresh()
    fresh = opened(tmp_path)
    assert len(reader) == len(fresh) >= 400
    for number in range(400):
        assert got(reader, number) == got(fresh, number) == answer(number, 300)
    files = list((tmp_path / "real-v1").glob("*.jsonl"))
    assert len(files) == 2
    whole = sum(len(file.read_bytes().split(b"\n")) - 2 for file in files)
    assert len(fresh) == whole
    reader.close()
    fresh.close()


CLAIMER = """
import sys
from pathlib import Path
from fanfold.backends.storage.response_cache import ResponseCache
sys.path.insert(0, sys.argv[2])
from test_response_cache import answer, key
store = ResponseCache(Path(sys.argv[1]), simulated=False, writer="other")
store.open()
for line in sys.stdin:
    what, number = line.split()
    if what == "put":
        store.put(key(int(number)), answer(int(number)))
    else:
        print(*store.update_claims([(key(int(number)), what == "take")]), flush=True)
"""


def test_one_process_at_a_time_asks_for_an_answer(tmp_path: Path) -> None:
    """Claims exclude other processes and end with them; a claim brings what was kept before."""
    ours = opened(tmp_path)
    here = str(Path(__file__).parent)
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(tmp_path), here],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def tell(what: str, number: int, *, waits: bool = True) -> str:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(f"{what} {number}\n")
        other.stdin.flush()
        return other.stdout.readline().strip() if waits else ""

    assert ours.update_claims([(key(1), True), (key(2), True)]) == [True, True]
    assert [tell("take", n) for n in (1, 2, 3)] == ["False", "False", "True"]
    assert ours.update_claims([(key(3), True), (key(4), True)]) == [False, True]
    assert ours.update_claims([(key(1), False), (key(3), False)]) == [True, True]
    assert ours.update_claims([(key(3), True)]) == [False]
    assert tell("take", 1) == "True"
    tell("put", 3, waits=False)
    assert tell("give", 3) == "True"
    assert ours.update_claims([(key(3), True)]) == [True]
    assert got(ours, 3) == answer(3)
    tell("put", 1, waits=False)
    assert tell("take", 5) == "True"
    other.kill()
    other.communicate()
    assert ours.update_claims([(key(5), True), (key(1), True)]) == [True, True]
    assert got(ours, 1) == answer(1)
    ours.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_it_goes_on_and_says_so(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def unlockable(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    store = opened(tmp_path)
    monkeypatch.setattr(response_cache.fcntl, "lockf", unlockable)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert store.update_claims([(key(1), True), (key(1), False)]) == [True, True]
    assert [os.strerror(number) in record.message for record in caplog.records] == [True]
    store.close()


def test_a_glance_sees_new_files_and_what_grows(tmp_path: Path) -> None:
    ours = opened(tmp_path)
    others = [opened(tmp_path) for _ in range(3)]
    for number in range(30):
        others[number % 3].put(key(number), answer(number))
        assert ours.update_claims([(key(number), True)]) == [True]
        assert got(ours, number) == answer(number)
    for store in (ours, *others):
        store.close()
