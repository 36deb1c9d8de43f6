"""Start processes of the command line by a fork of a process that has imported all of it.

The imports are most of what a short command costs. Everything else is as with ``python -m
fanfold``: own process, signals, streams, environment, working folder and exit code. The command
line and the environment in ``/proc`` are those of the server. Tests of the start itself begin an
interpreter of their own.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from types import ModuleType
from typing import TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

DEADLINE_S = 300.0
"""How long a condition may take that no defect delays, on a machine that has more to do."""
_LARGEST = 1 << 17  # an order with its environment, in bytes
_STREAMS = 3
Found = TypeVar("Found")


@dataclass(frozen=True)
class Command:
    """Arguments of ``fanfold``, or of a program that is given as Python code."""

    arguments: tuple[str, ...]
    code: str | None = None
    cwd: str = field(default_factory=os.getcwd)
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    new_session: bool = False


class CommandProcess:
    """A process of the command line, with the methods of ``asyncio.subprocess.Process``."""

    def __init__(
        self,
        pid: int,
        report: asyncio.StreamReader,
        outputs: Sequence[asyncio.StreamReader | None],
        close: ExitStack,
    ) -> None:
        self.pid = pid
        self.stdout, self.stderr = outputs
        self.returncode: int | None = None
        self.cpu_s = 0.0  # of the process and those that it has waited for, once it has ended
        self._close = close
        self._end = asyncio.create_task(self._await_end(report))

    async def _await_end(self, report: asyncio.StreamReader) -> int:
        code, cpu_s = (await report.readline()).split()
        self.returncode, self.cpu_s = int(code), float(cpu_s)
        return self.returncode

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    async def communicate(self) -> tuple[bytes, bytes]:
        """Read both streams to their ends, and wait for the exit."""
        streams = (self.stdout, self.stderr)
        out, err = await asyncio.gather(*(_read_all(stream) for stream in streams))
        await self.wait()
        self._close.close()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


async def _read_all(stream: asyncio.StreamReader | None) -> bytes:
    return b"" if stream is None else await stream.read()


class CommandServer:
    """The process that the others are forked from; it starts with the first of them."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)  # not what a test has added to it
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _connect(self) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        return self._socket

    def close(self) -> None:
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()

    async def start(
        self, command: Command, *, stdin: int = DEVNULL, stdout: int = PIPE, stderr: int = PIPE
    ) -> CommandProcess:
        """Start a command; its output goes to pipes, descriptors, or nowhere."""
        close = ExitStack()
        with ExitStack() as sent:
            null = os.open(os.devnull, os.O_RDWR)
            sent.callback(os.close, null)
            fds, outputs = [{DEVNULL: null}.get(stdin, stdin)], list[asyncio.StreamReader | None]()
            for stream in (stdout, stderr):
                if stream == PIPE:
                    reader, fd = await _open_pipe(sent, close)
                else:
                    reader, fd = None, {DEVNULL: null, STDOUT: fds[-1]}.get(stream, stream)
                outputs.append(reader)
                fds.append(fd)
            report, fd = await _open_pipe(sent, close)
            order = json.dumps(asdict(command)).encode()
            socket.send_fds(self._connect(), [order], [*fds, fd])
        pid = int(await report.readline())
        return CommandProcess(pid, report, outputs, close)

    async def run(self, command: Command) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as ``subprocess.run`` does."""
        process = await self.start(command)
        try:
            out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        finally:
            process.kill()
        assert process.returncode is not None
        return subprocess.CompletedProcess(
            ["fanfold", *command.arguments], process.returncode, out.decode(), err.decode()
        )


class BlockingProcess:
    """A process of the command line, with the methods of ``subprocess.Popen`` for text."""

    def __init__(self, portal: BlockingPortal, process: CommandProcess) -> None:
        self._portal, self._process = portal, process
        self.pid = process.pid
        self.send_signal, self.kill = process.send_signal, process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.returncode

    def wait(self, timeout: float = DEADLINE_S) -> int:
        return self._portal.call(asyncio.wait_for, self._process.wait(), timeout)

    def wait_until(
        self, condition: Callable[[], Found | None], timeout: float = DEADLINE_S
    ) -> Found:
        """Wait for what a condition finds, while the process runs; return it."""
        end = time.monotonic() + timeout
        while not (found := condition()):
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < end, f"nothing was found in {timeout:g} s"
            time.sleep(0.02)
        return found

    def communicate(self, timeout: float = DEADLINE_S) -> tuple[str, str]:
        """Read both streams to their ends, and wait for the exit."""
        out, err = self._portal.call(asyncio.wait_for, self._process.communicate(), timeout)
        return out.decode(), err.decode()

    def read_error_line(self) -> str:
        """Return the next line of standard error; it is empty at the end."""
        assert self._process.stderr is not None
        return self._portal.call(self._process.stderr.readline).decode()


@contextmanager
def started(
    command: Command, *, stdin: int = DEVNULL, stdout: int = PIPE, stderr: int = PIPE
) -> Iterator[BlockingProcess]:
    """Run a command while the block of a test without a loop runs, and no longer."""
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    with start_blocking_portal() as portal:
        process = portal.call(partial(get_command_server().start, command, **streams))
        try:
            yield BlockingProcess(portal, process)
        finally:
            if command.new_session:
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            portal.call(process.communicate)


def run_command(command: Command) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a test without a loop."""
    with start_blocking_portal() as portal:
        return portal.call(get_command_server().run, command)


async def _open_pipe(sent: ExitStack, close: ExitStack) -> tuple[asyncio.StreamReader, int]:
    """Return the end to read of a new pipe, and the descriptor to write to."""
    ours, theirs = os.pipe()
    sent.callback(os.close, theirs)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
    )
    close.callback(transport.close)
    return reader, theirs


_servers = list[CommandServer]()


@contextmanager
def command_server_available() -> Iterator[None]:
    """Let ``get_command_server`` return a server until the block ends."""
    _servers.append(CommandServer())
    yield
    _servers.pop().close()


def get_command_server() -> CommandServer:
    """Return the server of this session of tests."""
    return _servers[-1]


def _import_all() -> None:
    """Import what commands import when they are called."""
    for package in ("graphs.cli", "graphs.run"):
        folder = importlib.import_module(f"fanfold.{package}")
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{folder.__name__}.{module.name}")
    importlib.import_module("pyarrow").array([0])  # imports pandas, where it is installed


def _serve(orders: socket.socket) -> Command | None:
    """Fork for each order; return the command in the new process, and None at the end."""
    reports = dict[int, tuple[int, int]]()  # by the descriptor of the process
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != orders.fileno():
                    selector.unregister(key.fd)
                    pid, report = reports.pop(key.fd)
                    _, status, used = os.wait4(pid, 0)
                    code = os.waitstatus_to_exitcode(status)
                    _tell(report, f"{code} {used.ru_utime + used.ru_stime:.3f}\n")
                    os.close(report)
                    os.close(key.fd)
                    continue
                message, fds, _, _ = socket.recv_fds(orders, _LARGEST, _STREAMS + 1)
                if not message:
                    return None
                if not (pid := os.fork()):
                    for fd, (_, report) in reports.items():
                        os.close(fd)
                        os.close(report)
                    command = Command(**json.loads(message))
                    if command.new_session:
                        os.setsid()
                    _tell(fds[_STREAMS], f"{os.getpid()}\n")  # now its group can be killed
                    os.close(fds[_STREAMS])
                    return _become(command, fds[:_STREAMS])
                for fd in set(fds[:_STREAMS]):
                    os.close(fd)
                process = os.pidfd_open(pid)
                reports[process] = pid, fds[_STREAMS]
                selector.register(process, selectors.EVENT_READ)


def _tell(report: int, line: str) -> None:
    with suppress(BrokenPipeError):  # the test has ended without it
        os.write(report, line.encode())


def _become(command: Command, streams: list[int]) -> Command:
    """Take the streams, the folder, the environment and the arguments of a command."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in set(streams):
        os.close(fd)
    os.chdir(command.cwd)
    os.environ.clear()
    os.environ.update(command.env)
    program = "fanfold" if command.code is None else "-c"
    sys.argv = [program, *command.arguments]
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # as an interpreter that starts does
    sys.path[0] = command.cwd
    return command


def main() -> None:
    """Serve the orders that come by the given descriptor."""
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        _import_all()
        gc.freeze()  # a collection in a forked process leaves the shared pages alone
        command = _serve(orders)
    if command is None:
        return
    if command.code is None:
        runpy.run_module("fanfold", run_name="__main__", alter_sys=True)
    else:
        program = ModuleType("__main__")  # processes that it spawns import nothing of this one
        sys.modules["__main__"] = program
        exec(compile(command.code, "<string>", "exec"), vars(program))


if __name__ == "__main__":
    main()
