"""Asks a judge, several prompts at a time, and keeps what it said: a run that is cut off asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calibtrain.config_tasks import JudgeConfig
from calibtrain.engines.address import Address, shown
from calibtrain.errors import UserError
from calibtrain.lines import lines_of
from calibtrain.models.loading import cache_directory

logger = logging.getLogger(__name__)
KEY_VARIABLE = "CALIBTRAIN_JUDGE_KEY"
RETRIED = (429, 500, 502, 503, 504)


class JudgeClient:
    """A judge behind an address, with its replies in the cache directory. UserError for what is no address."""

    def __init__(self, config: JudgeConfig, *, first_wait: float = 0.5, section: str = "task.judge") -> None:
        self.config = config
        self.address = Address(
            config.url,
            timeout=config.timeout,
            first_wait=first_wait,
            key_variable=KEY_VARIABLE,
            option=f"{section}.url",
            must="take chat messages, as OpenAI's /chat/completions does",
            retried=RETRIED,
        )
        self.kept = Kept(cache_directory() / "judge" / f"{_hash(self.address.url, config.model)[:24]}.jsonl")
        self._met = False

    def meet(self) -> None:
        """Raise UserError unless the judge answers; asked once."""
        if not self._met:
            self._ask("Say: ready", 8, first=True)
            self._met = True

    def replies(self, prompts: Sequence[str]) -> tuple[dict[str, str], str]:
        """What the judge says to each prompt, and why the missing ones are missing. The first failure ends the asking."""
        keys = {prompt: _hash(prompt, str(self.config.max_tokens)) for prompt in prompts}
        found = {prompt: self.kept[key] for prompt, key in keys.items() if key in self.kept}
        problems: list[str] = []
        failed = threading.Event()

        def ask(prompt: str) -> None:
            if failed.is_set():
                return
            try:
                reply = self._ask(prompt, self.config.max_tokens)
            except UserError as error:
                failed.set()
                problems.append(str(error))
                return
            self.kept.add(keys[prompt], reply)
            found[prompt] = reply

        left = [prompt for prompt in keys if prompt not in found]
        if left:
            with ThreadPoolExecutor(self.config.at_once) as pool:
                list(pool.map(ask, left))
        return found, problems[0] if problems else ""

    def _ask(self, prompt: str, max_tokens: int, *, first: bool = False) -> str:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        reply = self.address.post("/chat/completions", body, first=first)
        try:
            choice: Any = reply["choices"][0]
            text = choice["message"]["content"]
            cut = choice.get("finish_reason") == "length"
            if not isinstance(text, str) and not (text is None and (cut or first)):
                raise TypeError(f"content is {type(text).__name__}")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.address.url}: the reply is no chat completion ({type(error).__name__}: {shown(str(error), 80)})"
            ) from None
        if cut and not first:
            return ""  # a verdict stands at the end: what was cut has none
        return text or ""


class Kept:
    """Replies by key in a file of JSON lines, which several processes may append to; lines that are none are passed over.

    Without room for them the run goes on: they were dear.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        self._torn = bool(text) and not text.endswith("\n")  # a line that was cut off: the next begins a new one
        for line in lines_of(text):
            try:
                row = json.loads(line)
                key, reply = row["key"], row["reply"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(reply, str):
                self._replies[key] = reply

    def __contains__(self, key: str) -> bool:
        """Whether the reply is kept."""
        return key in self._replies

    def __getitem__(self, key: str) -> str:
        """The reply."""
        return self._replies[key]

    def add(self, key: str, reply: str) -> None:
        """Keep a reply: one write of one whole line at the file's end."""
        with self._lock:
            self._replies[key] = reply
            line = ("\n" if self._torn else "") + json.dumps({"key": key, "reply": reply}) + "\n"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab", buffering=0) as file:
                    file.write(line.encode())
                self._torn = False
            except OSError as error:
                logger.warning("the judge's reply could not be kept for later runs in %s: %s", self.path, error)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
