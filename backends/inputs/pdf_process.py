"""Process that reads the texts of PDF files; started as a file, it imports no fanfold.

It reads the path of a file in each line of standard input, as JSON, and writes one JSON object for
each to standard output. A file may be hostile: the process cannot write files, its memory is
bounded, and its parent ends it when a file takes too long.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from typing import Any

POLL_S = 0.5
MEMORY_BYTES = 2 << 30
MOST_CHARACTERS = 20_000_000
"""Characters of a file, above which it is refused."""
MOST_PAGES = 20_000


def main() -> None:
    """Answer until standard input ends."""
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    import pypdfium2  # noqa: PLC0415 - mypy and the limits below

    limit_process()
    for line in sys.stdin:
        try:
            answer = read_pages(pypdfium2, json.loads(line))
        except (pypdfium2.PdfiumError, OSError, ValueError, MemoryError) as error:
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def limit_process() -> None:
    """Forbid to write files, and bound the memory."""
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, MEMORY_BYTES))
    for kind, most in limits:
        _, hard = resource.getrlimit(kind)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))


def read_pages(pypdfium2: Any, path: str) -> dict[str, Any]:
    """Return the text of each page, or an error."""
    document = pypdfium2.PdfDocument(path)
    try:
        if len(document) > MOST_PAGES:
            return {"error": f"it has {len(document):,} pages, more than {MOST_PAGES:,}"}
        texts, size = list[str](), 0
        for page in document:
            content = page.get_textpage()
            text = content.get_text_bounded().replace("\r\n", "\n").replace("\x00", "")
            content.close()
            page.close()
            size += len(text)
            if size > MOST_CHARACTERS:
                return {"error": f"it has more than {MOST_CHARACTERS:,} characters of text"}
            texts.append(text)
        return {"pages": texts}
    finally:
        document.close()


if __name__ == "__main__":
    main()
