"""What a vLLM server in development mode does for rollouts, by transformers in a thread: weights that are reloaded from a
directory, draws by seeds, log-probs of prompts. It can be stopped and started again, and be stale on purpose."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class PolicyServer:
    """Serves a Hugging Face directory at `url` while it is entered."""

    def __init__(self, directory: str | Path) -> None:
        self.directory, self.port = Path(directory), 0
        self.lock = threading.Lock()
        self.requests: list[tuple[str, dict]] = []
        self.loads: list[str] = []
        self.stale = False  # says that it has loaded weights, and has not
        self.before = lambda path: None  # called before each reply; (status, dict) is sent instead

    def __enter__(self) -> PolicyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """At the same port as before, with the weights that it had at first."""
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.version = "default"
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler(self))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def get(self, path: str) -> dict:
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": 512}]}
        assert path == "/weight_info", path
        return {"weight_version": self.version}

    def post(self, path: str, body: dict) -> dict:
        self.requests.append((path, body))
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.load(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        return self.completions(body)

    def load(self, directory: Path) -> None:
        self.loads.append(directory.name)
        weights = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
        if not self.stale:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            assert not unexpected, unexpected
            assert set(missing) <= {"lm_head.weight"}, missing
            self.model.tie_weights()

    @torch.no_grad()
    def completions(self, body: dict) -> dict:
        prompt = body["prompt"]
        with self.lock:
            choices = [self.choice(body, prompt, i) for i in range(body["n"])]
        usage = {"prompt_tokens": len(prompt)}
        return {"model": "policy", "system_fingerprint": "fake", "choices": choices, "usage": usage}

    def choice(self, body: dict, prompt: list[int], index: int) -> dict:
        generator = torch.Generator().manual_seed(body.get("seed", 0) + index)
        logprobs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        known = [None] + [
            {str(token): {"logprob": float(row[token])}} for row, token in zip(logprobs, prompt[1:], strict=False)
        ]
        tokens, scores, stops = [], [], set(body.get("stop_token_ids", []))
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in stops):
            last = self.model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(torch.multinomial(last.exp(), 1, generator=generator)))
            scores.append(float(last[tokens[-1]]))
        stopped = tokens[-1] in stops
        return {
            "index": index,
            "text": "",
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": tokens[-1] if stopped else None,
            "token_ids": tokens,
            "prompt_token_ids": prompt,
            "prompt_logprobs": known if "prompt_logprobs" in body else None,
            "logprobs": {"token_logprobs": scores, "top_logprobs": [{}] * len(scores)},
        }


def handler(policy: PolicyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(lambda: policy.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(lambda: policy.post(self.path, body))

        def answer(self, content) -> None:
            status, found = policy.before(self.path) or (200, None)
            text = json.dumps(content() if found is None else found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_) -> None:
            """Quiet."""

    return Handler
