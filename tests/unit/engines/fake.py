"""A small OpenAI-compatible server in a thread, whose model continues a prompt by a rule; replies can be spoiled."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeModel:
    """Says `answer_of(prompt)` whatever it is asked; every token has log-prob `logprob`, and the next best -5."""

    def __init__(self, answer_of, decode=lambda ids: "", logprob=-0.25, name="fake", max_model_len=512):
        self.answer_of, self.decode, self.logprob = answer_of, decode, logprob
        self.name, self.max_model_len, self.fingerprint = name, max_model_len, "fake-1"
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.spoil = lambda reply, body: reply
        self.before = lambda path: None  # (status, headers, body) to send instead
        self.models = None
        self.under_way = self.most_at_once = 0
        self.lock = threading.Lock()

    def reply(self, body):
        tokens, stops = [], set(body["stop_token_ids"])
        for token in self.answer_of(body["prompt"]):
            tokens.append(token)
            if token in stops or len(tokens) == body["max_tokens"]:
                break
        stopped = tokens[-1] in stops
        logprob = self.logprob(body) if callable(self.logprob) else self.logprob
        choice = {
            "index": 0,
            "text": self.decode(tokens[:-1] if stopped else tokens),
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": tokens[-1] if stopped else None,
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in tokens],
                "token_logprobs": [logprob] * len(tokens),
                "top_logprobs": [{"token_id:0": logprob, "token_id:1": -5.0}] * len(tokens),
            },
        }
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
        return {"model": self.name, "system_fingerprint": self.fingerprint, "choices": [choice], "usage": usage}


@contextmanager
def serve(model: FakeModel) -> Iterator[str]:
    """Base URL of the model on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            cards = [{"id": model.name, "max_model_len": model.max_model_len}] if model.models is None else model.models
            self.answer({"data": cards})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                model.requests.append(body)
                model.headers.append(dict(self.headers))
            self.answer(lambda: self.counted(body))

        def counted(self, body):
            """Over before anything is sent, since a client that has its reply asks for the next one at once."""
            with model.lock:
                model.under_way += 1
                model.most_at_once = max(model.most_at_once, model.under_way)
            try:
                return model.spoil(model.reply(body), body)
            finally:
                with model.lock:
                    model.under_way -= 1

        def answer(self, content):
            status, headers, text = model.before(self.path) or (200, {}, None)
            if text is None:
                content = content() if callable(content) else content
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            with suppress(ConnectionError):  # a client that has given up
                self.wfile.write(text)

        def log_message(self, *arguments):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
