"""`calibtrain serve`: the FastAPI application around an Answerer, and the process that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from calibtrain.app.batching import Batcher, Busy
from calibtrain.app.limits import AddHeaders, LimitRequests, Limits, Refusal
from calibtrain.app.openai_api import (
    ChatRequest,
    PageRequest,
    check,
    completion,
    page_reply,
    parse,
    stream,
)
from calibtrain.errors import UserError
from calibtrain.pipeline.answer import Answerer
from calibtrain.pipeline.measurement import read_measurement
from calibtrain.pipeline.promise import Level
from calibtrain.pipeline.question import Question
from calibtrain.pipeline.reply import Reply
from calibtrain.pipeline.scope import at_least, at_most

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as missing:
    raise UserError("`calibtrain serve` needs FastAPI and uvicorn: pip install 'calibtrain[serve]'") from missing

HERE = Path(__file__).parent
LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
EXAMPLES, EXAMPLE_LENGTH = 3, 80
Result = TypeVar("Result")


def create_app(
    answerer: Answerer,
    *,
    name: str,
    limits: Limits | None = None,
    hosts: list[str] | None = None,
    examples: Sequence[str] = (),
) -> FastAPI:
    """The application: page, /api/answer, /v1/chat/completions, /v1/models, /healthz.

    name: what the model is called. hosts: Host headers that are served, None for any; for a server on loopback they keep
    a foreign site that points its name at 127.0.0.1 from reading answers. examples: questions of the kind that the
    certificate is about, to try on the page.
    """
    limits = limits or Limits()
    batcher: Batcher[Question, Reply] = Batcher(answerer.guess, max_batch=limits.batch, max_waiting=limits.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = FastAPI(title="calibtrain", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitRequests, limits=limits)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(AddHeaders, headers=SECURITY)

    async def reply_to(request: Request, question: Question, level: Level) -> Reply:
        param = "calibtrain.options" if question.options else "messages"
        try:
            tokens = answerer.prompt_tokens(question) - answerer.own_tokens
            uncovered = answerer.uncovered(question)
        except UserError as error:
            raise Refusal(400, str(error), code="invalid_value", param=param) from None
        if uncovered and not answerer.uncertified:
            allowed = "Whoever runs the server may allow it (--uncertified)."
            raise Refusal(400, f"messages: {uncovered} {allowed}", code="unsupported_value", param=param)
        if tokens > limits.question_tokens:
            raise Refusal(
                400,
                f"the question has {tokens} tokens; the limit is {limits.question_tokens}",
                code="context_length_exceeded",
                param="messages",
            )
        try:
            guess = await _while_connected(request, batcher.submit(question), limits.answer_seconds)
        except Busy:
            raise Refusal(503, "too many questions are waiting; come back soon", code="busy", retry_after=2) from None
        return answerer.decide(guess, level)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def no_such_place(request: Request, error: HTTPException) -> JSONResponse:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code="not_found")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        body = Refusal(
            500, "the model failed on this question; the server's log says why", code="internal_error"
        ).body()
        return JSONResponse(body, 500)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return render_page(answerer, name, examples)

    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "calibtrain"}]}

    @app.post("/api/answer")
    async def answer(request: Request) -> dict[str, Any]:
        asked: PageRequest = parse(PageRequest, await request.body())
        return page_reply(await reply_to(request, asked.asked(), answerer.default))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        asked: ChatRequest = parse(ChatRequest, await request.body())
        check(asked, name, answerer.max_new_tokens, answerer.loaded.template.task.schema)
        try:
            level = answerer.level(asked.calibtrain.risk, asked.calibtrain.group)
        except UserError as error:
            param = "calibtrain.risk" if asked.calibtrain.risk is not None else "calibtrain.group"
            raise Refusal(400, str(error), code="invalid_value", param=param) from None
        reply = await reply_to(request, asked.question(), level)
        if asked.stream:
            return StreamingResponse(stream(reply, asked), media_type="text/event-stream")
        return JSONResponse(completion(reply, asked))

    return app


def render_page(answerer: Answerer, name: str, examples: Sequence[str] = ()) -> str:
    """The page; what the model or the run says is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("calibtrain.app", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["at_least"] = at_least
    levels, groups = answerer.levels(), answerer.calibrated.groups
    certificates = [level.certificate for level in levels if level.certificate is not None]
    return environment.get_template("page.html.j2").render(
        name=name,
        examples=examples,
        source=answerer.source,
        levels=[_shown(level) for level in levels],
        chosen=levels.index(answerer.default),
        default=answerer.default,
        certificates=certificates,
        joint=1 - sum(certificate.delta for certificate in certificates),
        by=None if groups is None else groups.by,
        groups_delta=None if groups is None else groups.delta,
        shapes=answerer.shapes,
        run={
            "conversations": answerer.shapes.conversations,
            "answers_outside": answerer.uncertified or answerer.loaded.config.abstention.outside != "abstain",
        },
        groups=[{"name": name, **_shown(level)} for name, level in answerer.promises.groups.items()],
        words=[{"name": word.name, "low": word.low, "high": word.high} for word in answerer.scale],
    )


def _shown(level: Level) -> dict[str, Any]:
    """A level for the page's script; threshold null where nothing is answered."""
    return {
        "threshold": level.threshold if level.answers else None,
        "risk": None if level.risk is None else at_most(level.risk),
        "coverage": level.coverage,
        "promise": level.promise,
        "limit": level.limit,
        "reservation": level.reservation,
        "claims": level.claims is not None,
    }


def run(
    output_dir: Path,
    *,
    host: str,
    port: int,
    requests_per_minute: int,
    source: str | None = None,
    uncertified: bool = False,
) -> None:
    """Serve a finished run until interrupted. Raises UserError when the address is taken or the run incomplete.

    uncertified: without a certificate everything is answered, and the page may be set to answer everything; no client can
    ask for that by itself.
    """
    import uvicorn
    from rich.console import Console

    from calibtrain.app.protocol import PatientProtocol
    from calibtrain.pipeline.answer import load

    listener = _listen(host, port)
    try:
        answerer = load(output_dir, source, uncertified=uncertified)
        loopback = _is_loopback(host)
        app = create_app(
            answerer,
            name=answerer.loaded.config.name,
            limits=Limits(requests_per_minute=requests_per_minute),
            hosts=[*LOOPBACK, host] if loopback else None,
            examples=_examples(output_dir),
        )
        console = Console(highlight=False)
        shown = f"[{host}]" if ":" in host else host
        console.print(
            f"{answerer.loaded.config.name} answers at http://{shown}:{listener.getsockname()[1]}", markup=False
        )
        certified = answerer.default.certified
        console.print(
            f"{answerer.default.promise} {answerer.default.limit}",
            markup=False,
            style=None if certified else "bold red",
        )
        if not loopback:
            console.print(
                "anyone who reaches this address can ask: there is no password and no encryption", style="yellow"
            )
        config = uvicorn.Config(
            app,
            log_level="warning",
            http=PatientProtocol,
            ws="none",
            timeout_keep_alive=15,
            timeout_graceful_shutdown=5,
            proxy_headers=False,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()


def _examples(output_dir: Path) -> list[str]:
    """A few questions of the certification split, which the promises are about."""
    path = output_dir / "answers" / "certification.jsonl"
    answers = read_measurement(path).answers if path.is_file() else []
    return [answer.question for answer in answers if len(answer.question) <= EXAMPLE_LENGTH][:EXAMPLES]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); choose another") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _while_connected(request: Request, work: Awaitable[Result], seconds: float) -> Result:
    """What `work` brings, unless the client leaves or the time is up: then it is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            raise Refusal(499, "the client left", code="client_left")
        raise Refusal(503, f"no answer within {seconds:g} s; come back later", code="timeout", retry_after=seconds)
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
