"""The API of the service, and the page."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any

import fastapi
import sqlalchemy as sa
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException

from spear_jax.core.errors import shown
from spear_jax.service import security
from spear_jax.service.agreement import agreement
from spear_jax.service.database import Refused, User
from spear_jax.service.hub import PAGE, Service, Settings
from spear_jax.service.schemas import (
    AnswerBody,
    ChatKey,
    Cursor,
    JobBody,
    JudgementBody,
    QuestionBody,
    RequestId,
    RequestsBody,
    RoundBody,
    RunBody,
    RunName,
    Wait,
    WebhookBody,
)
from spear_jax.service.security import COOKIE, Gate


def _needs(*scopes: str) -> Any:
    async def user(request: fastapi.Request) -> User:
        return security.need(request.state.user, scopes)

    return fastapi.Depends(user)


def _service(request: fastapi.Request) -> Service:
    return request.app.state.service


Person = Annotated[User, _needs("person")]
Trainer = Annotated[User, _needs("trainer")]
Admin = Annotated[User, _needs("admin")]
Anyone = Annotated[User, _needs()]
Request = fastapi.Request


def reply(content: Any) -> Response:
    """A JSON reply, made without FastAPI's walk through the content."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return Response(body, media_type="application/json")


# For the trainer

trainer = fastapi.APIRouter(prefix="/api", tags=["trainer"])


@trainer.post("/runs")
async def open_run(request: Request, user: Trainer, body: RunBody) -> Response:
    """Makes a run the current one. Again with the same name: it is described anew."""
    service = _service(request)
    row = body.model_dump()
    await service.call(service.store.open_run, user.name, {"name": row.pop("run"), **row})
    service.changed("answers", "jobs", "chats")
    return reply({"run": body.run})


@trainer.post("/requests")
async def add_requests(request: Request, user: Trainer, body: RequestsBody) -> Response:
    """Puts answers of the model to people. A request that is known is not put twice; another
    content under a known id is 409.
    """
    service = _service(request)
    rows = [one.model_dump() for one in body.requests]
    accepted, known = await service.call(
        service.store.add_requests, user.name, body.run, body.round, rows
    )
    if accepted:
        service.changed()
    return reply({"accepted": accepted, "known": known})


@trainer.get("/answers")
async def answers(
    request: Request, user: Trainer, run: RunName, after: Cursor = 0, wait: Wait = 0
) -> Response:
    """What people said, in the order in which they did; `after` is the last cursor that was seen.
    `wait` holds the reply back until there is something. An answer that was taken back
    comes with "undone", in place of itself; one after its round's end comes with "late".
    """
    service = _service(request)
    store, undo = service.store, service.settings.undo
    later: list[float | None] = [None]

    async def look() -> list[dict[str, Any]]:
        later[0] = None
        if not await service.call(store.news, run, after):
            return []
        found, later[0] = await service.call(store.collect, run, after, store.clock() - undo)
        return found

    found = await service.wait(
        "answers",
        wait,
        look,
        lambda: None if later[0] is None else later[0] + undo - store.clock(),
    )
    cursor = found[-1]["cursor"] if found else after
    return reply({"answers": found, "cursor": cursor, "status": await service.status()})


@trainer.post("/rounds")
async def set_round(request: Request, user: Trainer, body: RoundBody) -> Response:
    """Says what is known of a round; what is left out, or null, stays as it was. With "close", what
    nobody has answered is leased no more; an answer to what is leased is taken still, and late.
    """
    service = _service(request)
    values = body.model_dump(exclude={"run", "sample", "close"})
    values = {name: value for name, value in values.items() if value is not None}
    if body.sample is not None:
        values |= body.sample.model_dump()
    new = await service.call(service.store.set_round, user.name, body.run, values, body.close)
    service.changed("answers")
    if new:
        hooks = await service.call(service.store.webhooks)
        event = {"event": "round", "run": body.run, "round": body.round, "phase": body.phase}
        service.webhooks.send(hooks, event)
    return reply({"run": body.run, "round": body.round})


@trainer.get("/jobs")
async def jobs(request: Request, user: Trainer, run: RunName, wait: Wait = 0) -> Response:
    """Questions of people that wait for the model. "answer" and "feedback" are set where a revision
    is asked for. A job comes again until it has an end.
    """
    service = _service(request)

    async def look() -> list[dict[str, Any]]:
        return await service.call(service.store.jobs, run)

    return reply({"jobs": await service.wait("jobs", wait, look)})


@trainer.post("/jobs/{id}")
async def finish_job(request: Request, user: Trainer, id: RequestId, body: JobBody) -> Response:
    """Gives the model's answer to a job, or says why there is none."""
    service = _service(request)
    given = body.model_dump(exclude_none=True)
    if body.answer is not None:
        given.setdefault("adapter", "")
    key, _ = await service.call(service.store.finish_job, user.name, id, given)
    service.bell.ring(f"chat {key}", "chats")
    return reply({"id": id})


@trainer.get("/chats")
async def judged_chats(
    request: Request, user: Trainer, run: RunName, after: Cursor = 0, wait: Wait = 0
) -> Response:
    """Chats whose first answer has a verdict. One that changes, as by its revision, comes again
    with a higher cursor.
    """
    service = _service(request)

    async def look() -> list[dict[str, Any]]:
        return await service.call(service.store.judged_chats, run, after)

    found = await service.wait("chats", wait, look)
    return reply({"chats": found, "cursor": found[-1]["cursor"] if found else after})


# For people

people = fastapi.APIRouter(prefix="/api", tags=["people"])


@people.post("/lease", responses={204: {"description": "nothing is left"}})
async def lease(request: Request, user: Person) -> Response:
    """Leases the oldest request that waits, or gives the one again that the user holds."""
    service = _service(request)
    found = await service.call(service.store.lease, user)
    if found is None:
        return Response(status_code=204)
    service.changed()
    return reply(found)


@people.put("/answers/{id:path}")
async def answer(request: Request, user: Person, id: RequestId, body: AnswerBody) -> Response:
    """Answers the request that the user holds. The same answer again changes nothing."""
    service = _service(request)
    if await service.call(service.store.answer, user, id, body.verdict, body.hint):
        service.changed("answers")
    return reply({"id": id})


@people.post("/requests/{id:path}/skip")
async def skip(request: Request, user: Person, id: RequestId) -> Response:
    """Gives a lease back; the user gets the request again when nothing else is left."""
    service = _service(request)
    if await service.call(service.store.skip, user, id):
        service.changed()
    return reply({"id": id})


@people.post("/undo")
async def undo(request: Request, user: Person) -> Response:
    """Takes the user's last answer back, unless the trainer has it, and leases its request to them
    again.
    """
    service = _service(request)
    found = await service.call(service.store.undo, user)
    service.changed("answers")
    return reply(found)


@people.post("/chats")
async def add_chat(request: Request, user: Person, body: QuestionBody) -> Response:
    """Asks the model a question."""
    if not body.question.strip():
        raise Refused(422, "question is blank; write a question.")
    service = _service(request)
    key = await service.call(service.store.add_chat, user, body.question)
    service.bell.ring("jobs")
    return reply({"id": str(key)})


@people.get("/chats/{id}")
async def chat(request: Request, user: Person, id: ChatKey, wait: Wait = 0) -> Response:
    """A chat of the user. `wait` holds the reply back until the answer, or the revision, is there."""
    service = _service(request)
    found: dict[str, Any] = {}

    async def look() -> bool:
        found.update(await service.call(service.store.chat, user, id))
        newest = found["revision"] or found
        return newest["answer"] is not None or newest["error"] is not None

    await service.wait(f"chat {id}", wait, look)
    return reply(found)


@people.put("/chats/{id}")
async def judge_chat(request: Request, user: Person, id: ChatKey, body: JudgementBody) -> Response:
    """Says whether a chat's answer is right, or with "revision" whether its revision is. Wrong with
    a hint asks for a revision.
    """
    service = _service(request)
    await service.call(service.store.judge_chat, user, id, body.verdict, body.hint, body.revision)
    service.bell.ring("jobs", "chats", f"chat {id}")
    return reply({"id": str(id)})


@people.get("/status")
async def status(
    request: Request,
    user: Anyone,
    wait: Wait = 0,
    seen: Annotated[int, fastapi.Query(ge=-1, lt=2**53)] = -1,
) -> Response:
    """How the round stands. With `wait` and `seen`, the version that was seen last, the reply is
    held back until something has changed.
    """
    service = _service(request)
    await service.wait_for_change(seen, wait)
    shared = await service.status()
    mine = await service.call(service.store.mine, user, shared["run"], shared["round"])
    return reply(shared | {"mine": mine})


# For who may look

admin = fastapi.APIRouter(prefix="/api", tags=["admin"])


@admin.get("/export")
async def export(request: Request, user: Admin, run: RunName) -> Response:
    """All feedback of a run as JSONL: requests with every answer and skip, and chats."""
    service = _service(request)
    service.store.run(run)
    await service.note(user.name, "export", run)
    batches = service.store.export(run)

    async def lines() -> AsyncIterator[bytes]:
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            told = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in batch)
            yield "".join(f"{line}\n" for line in told).encode("utf-8")

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@admin.get("/agreement")
async def agree(request: Request, user: Admin, run: RunName) -> Response:
    """Krippendorff's alpha of people who answered the same requests, and counts."""
    service = _service(request)
    votes = await asyncio.to_thread(service.store.votes, run)
    await service.note(user.name, "agreement", run)
    return reply({"run": run, **await asyncio.to_thread(agreement, votes)})


@admin.get("/audit")
async def audit(request: Request, user: Admin, after: Cursor = 0) -> Response:
    """Who did what and when. It holds no tokens."""
    service = _service(request)
    await service.write_refused()
    found = await service.call(service.store.audit, after)
    return reply({"audit": found, "cursor": found[-1]["cursor"] if found else after})


@admin.post("/webhooks")
async def add_webhook(request: Request, user: Admin, body: WebhookBody) -> Response:
    """Tells a URL of every new round. The reply holds the secret that signs: the header
    X-Spear-Signature is "sha256=" and the HMAC-SHA256 of the body in hex.
    """
    service = _service(request)
    secret = secrets.token_hex(32)
    secret = await service.call(service.store.add_webhook, user.name, body.url, secret)
    return reply({"url": body.url, "secret": secret})


@admin.get("/webhooks")
async def list_webhooks(request: Request, user: Admin) -> Response:
    """The URLs that are told of new rounds."""
    service = _service(request)
    rows = await service.call(service.store.webhooks)
    return reply({"webhooks": [row["url"] for row in rows]})


@admin.delete("/webhooks")
async def drop_webhook(request: Request, user: Admin, body: WebhookBody) -> Response:
    """Tells a URL no more."""
    service = _service(request)
    await service.call(service.store.drop_webhook, user.name, body.url)
    return reply({"url": body.url})


# The page

page = fastapi.APIRouter(include_in_schema=False)
SIGN_IN = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Sign in</title>
<main><h1>Open your link</h1>
<p>This page opens with the link that you were given, which holds your token. If you just opened it,
<a href="./">go on</a>.</p></main></html>
"""


@page.get("/")
async def index(request: Request, token: str | None = None) -> Response:
    """The page; a token in the address is exchanged for a cookie at once."""
    service = _service(request)
    if token is not None:
        return await _sign_in(request, token)
    user, cookie = request.state.user, request.state.cookie
    if user is None or cookie is None:
        return HTMLResponse(SIGN_IN, 401)
    run = service.store.current
    shown_page = service.page.render(
        csrf=service.keys.csrf(cookie), user=user.name, run=run and run["name"]
    )
    return HTMLResponse(shown_page)


async def _sign_in(request: Request, token: str) -> Response:
    service = _service(request)
    user = service.keys.of_token(token)
    if user is None:
        address = request.client.host if request.client else "?"
        service.buckets.take(f"address {address}", service.settings.rates["nobody"])
        return HTMLResponse(SIGN_IN, 401)
    await service.note(user.name, "login")
    answer = RedirectResponse("./", 303)
    answer.set_cookie(
        COOKIE,
        service.keys.session(token),
        max_age=security.SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@page.get("/static/{name}")
async def static(name: str) -> Response:
    """A file of the page: one of those that lie in its folder."""
    for file in PAGE.iterdir():
        if file.name == name and file.suffix != ".html":
            return FileResponse(file)
    raise Refused(404, f"{shown(name)} is no file of the page; load the page again.")


@page.get("/healthz", include_in_schema=True)
async def healthz(request: Request) -> Response:
    """Whether the service and its database are up."""
    service = _service(request)
    await service.call(service.store.ping)
    return reply({"status": "ok"})


# Together


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, error.message)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(422, f"the body is no JSON ({first['ctx']['error']}); send a JSON object.")
    where = ".".join(str(part)[:80] for part in first["loc"])
    told = first["msg"].removeprefix("Value error, ")
    return _error(
        422, f"{where} is {shown(first['input'])}: {told[:1].lower()}{told[1:]}; see /openapi.json."
    )


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {
        400: "the body is no JSON in UTF-8, or nested too deep; send a JSON object.",
        404: "there is nothing at this address; see /openapi.json.",
        405: "this address does not take this method; see /openapi.json.",
    }
    status = 422 if error.status_code == 400 else error.status_code
    return _error(status, told.get(error.status_code, f"{error.detail}; see /openapi.json."))


async def _busy(_: Request, error: Exception) -> Response:
    return _error(503, "the database did not take the request; send it again in a moment.")


def _error(status: int, message: str) -> Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return Response(
        security.error_body(message), status, headers=headers, media_type="application/json"
    )


def make_app(settings: Settings) -> fastapi.FastAPI:
    """Makes the service's app; `app.state.service` is its `Service`.

    Raises: UserError for a folder or a database that cannot be used.
    """
    from spear_jax import __version__

    service = Service(settings)
    app = fastapi.FastAPI(
        title="spear_jax feedback",
        version=__version__,
        description=__doc__,
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            Refused: _refused,
            RequestValidationError: _invalid,
            HTTPException: _http,
            sa.exc.OperationalError: _busy,
        },
    )
    app.state.service = service
    for router in (people, trainer, admin, page):
        app.include_router(router)
    app.add_middleware(
        Gate,
        keys=service.keys,
        buckets=service.buckets,
        rates=settings.rates,
        refused=service.refused,
    )
    schema = app.openapi()  # made once; every path under /api needs a token
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for described in methods.values() if path.startswith("/api/") else ():
            described["security"] = [{"token": []}]
    return app
