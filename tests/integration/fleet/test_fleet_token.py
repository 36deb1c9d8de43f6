from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError, RunStoppedError
from fanfold.backends.discovery.login import CommandToken

pytestmark = pytest.mark.integration


def counting(folder: Path) -> str:
    """Return a command that prints another key each time."""
    script = folder / "count.py"
    script.write_text(
        f"f = open({str(folder / 'calls')!r}, 'a+'); f.write('x'); f.seek(0)\n"
        "print(f'secret-{len(f.read())}')\n"
    )
    return f"{sys.executable} {script}"


async def test_it_is_fetched_once_however_many_ask(tmp_path: Path) -> None:
    token = CommandToken(counting(tmp_path), "where")
    assert set(await asyncio.gather(*(token() for _ in range(20)))) == {"secret-1"}


async def test_it_is_renewed_once_however_many_were_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    now = 0.0
    token = CommandToken(counting(tmp_path), "where", clock=lambda: now)
    old = await token()
    await asyncio.gather(*(token.renew(old) for _ in range(20)))
    assert await token() == "secret-2"
    await token.renew("secret-2")
    assert await token() == "secret-2"  # it was renewed just now: another one would not help
    now = 100.0
    await token.renew("secret-2")
    assert await token() == "secret-3"
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('s3cr3t'); raise SystemExit('s3cr3t')", "exit status 1"),
        ("print('two words')", "did not print exactly one key"),
        ("print('a'); print('b')", "did not print exactly one key"),
        ("pass", "did not print exactly one key"),
    ],
)
async def test_a_command_that_fails_stops_the_run_and_is_not_quoted(
    tmp_path: Path, code: str, words: str
) -> None:
    script = tmp_path / "x.py"
    script.write_text(code)
    with pytest.raises(RunStoppedError, match=words) as error:
        await CommandToken(f"{sys.executable} {script}", "endpoints.first.token_command")()
    assert "endpoints.first.token_command" in error.value.message
    assert "s3cr3t" not in error.value.message


async def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(RunStoppedError, match=r"within 0\.01 s"):
        await CommandToken(f"{sys.executable} {script}", "where", timeout_s=0.01)()


async def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError, match="cannot be started"):
        await CommandToken(str(tmp_path / "nothing"), "where")()
    for line in ("", "'"):
        with pytest.raises(ConfigurationError, match="where"):
            CommandToken(line, "where")
