"""A server of a model in a thread, whose answers a function gives: a run with it is no simulation.

It has the routes that a run needs: the list of models and chat completions.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from aiohttp import web

AnswerFunction: TypeAlias = Callable[[str], str | None]
"""Returns the text of the answer to a prompt; None refuses it."""

MODEL = "stand-in"


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    about = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL}
    return about | {"choices": [choice], "usage": usage}


@contextmanager
def serve_answers(
    answer: AnswerFunction, status: int = 400, context: int | None = None
) -> Iterator[str]:
    """Serve answers while the block runs; yield the base URL.

    Args:
        answer: Returns the answer to a prompt.
        status: HTTP status of a refusal.
        context: Context of the model in tokens, which the server lists; it counts no tokens.
    """
    started, found = threading.Event(), dict[str, Any]()

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        text = answer(body["messages"][-1]["content"])
        if text is None:
            error = {"message": "this item is refused", "type": "BadRequestError"}
            return web.json_response({"error": error}, status=status)
        return web.json_response(_completion(text))

    async def list_models(_: web.Request) -> web.Response:
        model: dict[str, Any] = {"id": MODEL, "object": "model", "created": 1, "owned_by": "tests"}
        if context is not None:
            model["max_model_len"] = context
        return web.json_response({"object": "list", "data": [model]})

    async def serve() -> None:
        application = web.Application()
        application.router.add_get("/v1/models", list_models)
        application.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            stop = asyncio.Event()
            found["loop"], found["stop"] = asyncio.get_running_loop(), stop
            found["port"] = runner.addresses[0][1]
            started.set()
            await stop.wait()
        finally:
            started.set()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(60), "the server does not start"
        yield f"http://127.0.0.1:{found['port']}/v1"
    finally:
        if "loop" in found:
            found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join()
