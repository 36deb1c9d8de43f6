"""A minimal model server: answers chat completions without the simulated fleet's mark.

``plain.py PORT [start-delay] [words…]``; with ``fail`` it says some lines and exits with 3. With
``asked:FILE`` it appends the question of each request to a file, with ``says:FOLDER`` it answers
with the file that has the question as its name, and with ``takes:SECONDS`` an answer takes so long.
``model:NAME`` is the model that it serves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODES = sys.argv[2:]


def word(name: str) -> str | None:
    """Return what follows ``name:`` in the command line."""
    return next((mode.partition(":")[2] for mode in MODES if mode.startswith(f"{name}:")), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def metrics(self) -> None:
        """Say what stands in the file of ``load:FILE``, in chunks as vLLM does."""
        file = next((Path(m[5:]) for m in MODES if m.startswith("load:")), None)
        if file is None or not file.exists():
            self.answer({}, 404 if file is None else 500)
            print("500" if file else "", flush=True)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = file.read_bytes()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    def answer(self, data: object, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/health":
            sick = next((m[5:] for m in MODES if m.startswith("sick:")), None)
            self.answer({}, 503 if sick and Path(sick).exists() else 200)
        elif self.path == "/metrics":
            self.metrics()
        elif self.path == "/v1/models":
            self.answer(
                {
                    "data": [
                        {"id": word("model") or "plain", "object": "model", "max_model_len": 4096}
                    ]
                }
            )
        else:
            self.answer({}, 404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = str(request["messages"][-1]["content"])
        if file := word("asked"):
            with Path(file).open("a") as asked:
                asked.write(question[:100] + "\n")
        time.sleep(float(word("takes") or 0.02))
        answers = word("says")
        text = Path(answers, question).read_text() if answers else f"from {sys.argv[1]}"
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        self.answer(
            {"id": "x", "model": word("model") or "plain", "choices": [choice], "usage": usage}
        )


def main() -> None:
    if "fail" in MODES:
        print("loading weights\n\x1b[31mtorch.OutOfMemoryError: no memory left\x1b[0m", flush=True)
        sys.exit(3)
    if "stubborn" in MODES:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
