"""A judge behind an OpenAI-compatible address, in a thread: it says what a rule makes of the prompt."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeJudge:
    """`says(prompt)` is its reply; `before(prompt)` may give (status, body) to send instead."""

    def __init__(self, says: Callable[[str], str] = lambda prompt: "right") -> None:
        self.says = says
        self.before: Callable[[str], tuple[int, bytes] | None] = lambda prompt: None
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.lock = threading.Lock()

    @property
    def asked(self) -> list[str]:
        """Prompts that were to be graded."""
        prompts = [one["messages"][0]["content"] for one in self.requests]
        return [one for one in prompts if one != "Say: ready"]


def answer_in(prompt: str) -> str:
    """The text between the marks."""
    found = re.search(r"<answer (\w+)>\n(.*?)\n</answer \1>", prompt, re.DOTALL)
    return found[2] if found else ""


@contextmanager
def serve_judge(judge: FakeJudge) -> Iterator[str]:
    """Base URL of the judge on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            with judge.lock:
                judge.requests.append(body)
                judge.headers.append(dict(self.headers))
            reply = judge.before(prompt) if self.path == "/v1/chat/completions" else (404, b"{}")
            if reply is None:
                message = {"role": "assistant", "content": judge.says(prompt)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply = 200, json.dumps({"choices": [choice]}).encode()
            self.send_response(reply[0])
            self.send_header("Content-Length", str(len(reply[1])))
            self.end_headers()
            with suppress(ConnectionError):  # a client that has given up
                self.wfile.write(reply[1])

        def log_message(self, *arguments):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
