"""Tokens by tiktoken, where it knows the model and can load the model's vocabulary."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

import tiktoken
from tiktoken.model import encoding_name_for_model

logger = logging.getLogger(__name__)

Load = Callable[[str], tiktoken.Encoding]


def encoding_name(model: str) -> str | None:
    """Return the name of a model's vocabulary, or None when tiktoken does not know the model.

    What stands before a slash (``openai/gpt-oss-120b``) is left away.
    """
    try:
        return encoding_name_for_model(model.rpartition("/")[2])
    except KeyError:
        return None


async def load_encoding(
    name: str, timeout_s: float, load: Load = tiktoken.get_encoding
) -> tiktoken.Encoding | None:
    """Load a vocabulary, which tiktoken downloads once and keeps; log why it cannot be had.

    tiktoken itself waits for a network that swallows packets as long as the system does, hence in
    a thread that nobody waits for at the end.

    Args:
        name: The vocabulary.
        timeout_s: Longest wait in seconds.
        load: Loads it; blocks.
    """
    loaded = Future[tiktoken.Encoding]()

    def run() -> None:
        loaded.set_running_or_notify_cancel()
        try:
            loaded.set_result(load(name))
        except Exception as error:  # noqa: BLE001 - handed over to whoever waits
            loaded.set_exception(error)

    threading.Thread(target=run, name=f"tiktoken {name}", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(loaded)
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except (
        OSError,
        ValueError,
    ) as error:  # network and disk; a vocabulary that is not the real one
        reason = f"{type(error).__name__}: {error}"
    logger.warning(
        "tiktoken cannot load the vocabulary %s, which it downloads once; tokens are counted by "
        "length, too high rather than too low. Without a network, set TIKTOKEN_CACHE_DIR to a "
        "folder that holds it. (%s)",
        name,
        reason[:200],
    )
    return None
