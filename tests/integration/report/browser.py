"""A headless Chromium that tests look at pages with, over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_S = 120.0


def find_browser() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One tab.

    Attributes:
        events: Messages of the browser that are no answers: loads, requests, dialogs, log lines.
    """

    socket: aiohttp.ClientWebSocketResponse
    events: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self.socket.send_json(message)
        async with asyncio.timeout(WAIT_S):
            while True:
                answer = json.loads(await self.socket.receive_str())
                if answer.get("id") == self._number:
                    assert "error" not in answer, answer
                    found: dict[str, Any] = answer["result"]
                    return found
                self.events.append(answer)

    async def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, which may be a promise; errors of the page raise."""
        found = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """Return the value of an expression once it is true."""
        async with asyncio.timeout(WAIT_S):
            while True:
                if value := await self.evaluate(expression):
                    return value
                await asyncio.sleep(0.05)

    async def open(self, path: Path) -> None:
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=path.absolute().as_uri())
        await self.wait_for(f"location.href === {json.dumps(path.absolute().as_uri())}")
        await self.wait_for("document.readyState === 'complete'")

    async def press(self, key: str, text: str | None = None) -> None:
        codes = {"Enter": 13, "Escape": 27, "Home": 36, "End": 35, "Tab": 9, "PageDown": 34}
        codes |= {"ArrowUp": 38, "ArrowDown": 40}
        facts = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        more = {} if text is None else {"text": text}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **more)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    async def set_dark(self, dark: bool) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)

    async def set_size(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def screenshot(self, path: Path, whole: bool = False) -> None:
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    async def heap_bytes(self) -> int:
        await self.call("HeapProfiler.collectGarbage")
        return int((await self.call("Runtime.getHeapUsage"))["usedSize"])

    def requested(self) -> list[str]:
        """Return the addresses that the page requested from the network."""
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def violations(self) -> list[str]:
        """Return what the browser logged as an error, e.g. against the security policy."""
        lines = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        return [one["text"] for one in lines if one["level"] == "error"]

    def dialogs(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["method"] == "Page.javascriptDialogOpening"]


@asynccontextmanager
async def open_browser(folder: Path) -> AsyncIterator[Page]:
    """Start a browser with its data in a folder, and yield its first tab."""
    path = find_browser()
    assert path is not None
    options = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    options += ["--disable-background-networking", "--disable-component-update"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    browser = await asyncio.create_subprocess_exec(
        path,
        *options,
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _read_port(folder / "DevToolsActivePort", browser)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = await answer.json(content_type=None)
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                yield page
                with suppress(ConnectionError, TimeoutError, TypeError):
                    await page.call("Browser.close")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(browser.pid, 9)
        await browser.wait()


async def _read_port(path: Path, browser: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(WAIT_S):
        while True:
            assert browser.returncode is None, "the browser did not start"
            with suppress(FileNotFoundError, IndexError, ValueError):
                return int(path.read_text().splitlines()[0])
            await asyncio.sleep(0.05)
