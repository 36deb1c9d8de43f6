"""An aiohttp application with its own loop and thread, closed without traces."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from aiohttp import web

START_S = 30.0


class HttpServer:
    """Serves one application on a free port of the loopback."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._port: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="globus-http", daemon=True)

    def start(self) -> str:
        """Serve, and return the URL."""
        self._thread.start()
        return f"http://127.0.0.1:{self._port.result(START_S)}"

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(START_S)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=1.0)
        try:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._loop = asyncio.get_running_loop()
            self._port.set_result(runner.addresses[0][1])
            await self._stop.wait()
        except OSError as error:
            self._port.set_exception(error)
        finally:
            await runner.cleanup()
