"""50 clients at once for a minute against `calibtrain serve`: lost and crossed replies, latency, and hostile company.

    python benchmarks/server_load.py out --json benchmarks/results/server_load.json

A real server process answers the model of a finished run. First every question is asked alone, and one client measures
its latency. Then all clients ask questions in orders of their own, each waiting for its reply before it asks again. A
reply is crossed where its question is not the one asked. In bf16 the same question may get another guess (`other_guess`)
or probability (`largest_difference`) than alone, by rounding, as batches are padded to their longest question. Meanwhile
others send what no server likes: broken JSON, bodies over the limit, headers and bodies a byte at a time, connections
dropped before the reply. Each has to get its 4xx or be closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from _report import print_table, write_json

from calibtrain.lines import lines_of

HOSTILE = {
    "malformed": b'{"model": "demo", "messages": [',
    "nested": b"[" * 60_000,
    "huge": b'{"question": "' + b"x" * 1_000_000 + b'"}',
    "unknown key": b'{"question": "why", "sudo": true}',
    "control token": b'{"question": "<|im_end|>"}',
    "too long": json.dumps({"question": "why " * 5_000}).encode(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="a finished run, e.g. the demo's")
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    questions = test_questions(args.output_dir, args.questions)
    command = [sys.executable, "-m", "calibtrain.cli", "serve", str(args.output_dir), "--port", "0"]
    server = subprocess.Popen([*command, "--requests-per-minute", "0"], stdout=subprocess.PIPE, text=True)
    try:
        address = started(server)
        rows, summary = asyncio.run(measure(address, questions, args.clients, args.seconds))
        summary["alive_after"] = server.poll() is None
    finally:
        server.terminate()
        server.wait(30)
    print_table("calibtrain serve", rows)
    for name, value in summary.items():
        print(f"{name}: {value}")
    if args.json:
        write_json(args.json, rows, summary)


def test_questions(output_dir: Path, count: int) -> list[str]:
    """Different questions that the run was tested on."""
    lines = lines_of((output_dir / "answers" / "test.jsonl").read_text(encoding="utf-8"))
    return list(dict.fromkeys(json.loads(line)["question"] for line in lines))[:count]


def started(server: subprocess.Popen[str]) -> str:
    """The address that the server prints once it listens."""
    for line in server.stdout or ():
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise SystemExit(f"the server ended with code {server.wait()}")


async def measure(
    address: str, questions: list[str], clients: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    limits = httpx.Limits(max_connections=clients + 20, max_keepalive_connections=clients + 20)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as http:
        while (await http.get("/healthz")).status_code != 200:
            await asyncio.sleep(0.1)
        alone = {question: await ask(http, question) for question in questions}
        one = await load(http, questions, alone, 1, min(seconds, 15))
        stop = asyncio.Event()
        company = asyncio.create_task(annoy(address, stop))
        many = await load(http, questions, alone, clients, seconds)
        stop.set()
        hostile = await company
    rows = [row("one client", one, 1), row(f"{clients} clients, hostile company", many, clients)]
    summary = {
        **{
            key: rows[1][key]
            for key in ("requests", "lost", "crossed", "other_guess", "per_second", "p50_ms", "p95_ms", "p99_ms")
        },
        "largest_difference": max(found["difference"] for found in many),
        "hostile": dict(sorted(hostile.items())),
    }
    return rows, summary


async def ask(http: httpx.AsyncClient, question: str) -> dict[str, Any]:
    response = await http.post("/api/answer", json={"question": question})
    return response.json() | {"status": response.status_code}


async def load(
    http: httpx.AsyncClient, questions: list[str], alone: dict[str, Any], clients: int, seconds: float
) -> list[dict[str, Any]]:
    """What each request got: milliseconds, lost, crossed, difference of its probability from the one got alone."""
    found: list[dict[str, Any]] = []
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        order = np.random.default_rng(number).permutation(len(questions))
        for index in np.tile(order, 10_000):
            if time.monotonic() >= until:
                return
            question, start = questions[index], time.perf_counter()
            try:
                reply = await ask(http, question)
            except (httpx.HTTPError, ValueError) as error:
                reply = {"status": repr(error)}
            taken = 1000 * (time.perf_counter() - start)
            lost = reply["status"] != 200
            if lost:
                print(f"lost: {reply}", file=sys.stderr)
            first = alone[question]
            found.append(
                {
                    "ms": taken,
                    "lost": lost,
                    "crossed": not lost and reply["question"] != question,
                    "other_guess": not lost and reply["best_guess"] != first["best_guess"],
                    "difference": 0.0 if lost else abs(reply["confidence"] - first["confidence"]),
                }
            )

    await asyncio.gather(*(client(number) for number in range(clients)))
    return found


def row(name: str, found: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    taken = np.array([one["ms"] for one in found if not one["lost"]])
    percentiles = {f"p{p}_ms": float(np.percentile(taken, p)) for p in (50, 90, 95, 99)}
    return {
        "load": name,
        "requests": len(found),
        "lost": sum(one["lost"] for one in found),
        "crossed": sum(one["crossed"] for one in found),
        "other_guess": sum(one["other_guess"] for one in found),
        **percentiles,
        "max_ms": float(taken.max()),
        "per_second": 1000 * clients * len(taken) / float(taken.sum()),  # a client always waits for one reply
    }


async def annoy(address: str, stop: asyncio.Event) -> Counter[str]:
    """Hostile requests until told to stop; how many got which status ("closed": the server hung up)."""
    seen: Counter[str] = Counter()
    host, port = address.removeprefix("http://").split(":")
    slow = [asyncio.create_task(drip(host, int(port), name, seen)) for name in ("slow headers", "slow body") * 10]
    async with httpx.AsyncClient(base_url=address, timeout=60) as http:
        while not stop.is_set():
            for name, content in HOSTILE.items():
                try:
                    response = await http.post(
                        "/api/answer", content=content, headers={"Content-Type": "application/json"}
                    )
                    seen[f"{name}: {response.status_code}"] += 1
                except httpx.HTTPError as error:
                    seen[f"{name}: {type(error).__name__}"] += 1
            _, writer = await asyncio.open_connection(host, int(port))
            body = b'{"question": "Who leaves?"}'
            writer.write(head(f"Content-Length: {len(body)}") + body)
            await writer.drain()
            writer.close()
            seen["left before the reply"] += 1
            await asyncio.sleep(0.2)
    await asyncio.wait(slow, timeout=40)
    for task in slow:
        if not task.done():
            task.cancel()
            seen["slow: never closed"] += 1
    return seen


def head(*lines: str) -> bytes:
    first = ("POST /api/answer HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*first, *lines, "", "")).encode()


async def drip(host: str, port: int, name: str, seen: Counter[str]) -> None:
    """Send a request a byte a second until it is answered or the connection closed."""
    reader, writer = await asyncio.open_connection(host, port)
    content = head("Content-Length: 5000") + b" " * 5000
    if name == "slow body":
        writer.write(head("Content-Length: 5000"))
        content = b" " * 5000
    answer = asyncio.create_task(reader.read(200))
    for byte in content:
        if answer.done():
            break
        try:
            writer.write(bytes([byte]))
            await writer.drain()
        except ConnectionError:
            break
        await asyncio.wait({answer}, timeout=1)
    try:
        first = (await answer).split(b" ")
    except ConnectionError:
        first = []
    seen[f"{name}: {first[1].decode() if len(first) > 1 else 'closed'}"] += 1
    writer.close()


if __name__ == "__main__":
    main()
