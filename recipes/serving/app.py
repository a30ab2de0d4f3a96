"""A desk in; its page and its HTTP interface out.

GET /           the page
GET /adapters   name, classes and folder of every adapter
PUT /adapters/NAME   {"folder": DIR}: load an adapter, or another in its place
POST /predict   files (several), adapters (names, with commas; all by default), top, attention
"""

import asyncio
import base64
import hmac
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.formparsers import MultiPartParser
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor

from recipes.serving.desk import Desk
from recipes.serving.jobs import Busy
from vitft.pictures.decode import read_image
from vitft.report.thumbnails import brightened_file
from vitft.version import __version__

PAGE = Path(__file__).with_name("page.html")
Next = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a request may bring."""

    max_pictures: int = 16
    max_bytes: int = 20 * 2**20  # of all its pictures together

    def __post_init__(self) -> None:
        if min(self.max_pictures, self.max_bytes) < 1:
            raise ValueError("a request may bring no picture at all; raise its limits")


class Folder(BaseModel):
    """Where a saved adapter lies, on this machine."""

    folder: str


def make_app(desk: Desk, limits: Limits, *, token: str | None, hosts: list[str]) -> FastAPI:
    """Return the application.

    Args:
        desk: answers.
        limits: of a request.
        token: that every request but the page's must bring as "Authorization: Bearer TOKEN"; None
            for none.
        hosts: names by which it may be called; another site in a browser then can't reach it.
    """
    app = FastAPI(title="vitft", version=__version__)
    MultiPartParser.spool_max_size = limits.max_bytes  # nothing of a picture reaches the disk
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def guard(request: Request, go_on: Next) -> Response:
        return refusal(request, limits, token) or await go_on(request)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        """Tell what is wrong in a line; what was sent, which JSON may not hold, is left out."""
        places = [(".".join(map(str, found["loc"][1:])), found["msg"]) for found in error.errors()]
        told = "; ".join(f"{place}: {message}" for place, message in places)
        return JSONResponse({"detail": told}, 422)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE.read_text()

    @app.get("/adapters")
    def told() -> list[dict[str, Any]]:
        return desk.told()

    @app.put("/adapters/{name}")
    def load(name: str, place: Folder) -> dict[str, Any]:
        with unprocessable():
            desk.load(name, place.folder)
        return next(found for found in desk.told() if found["name"] == name)

    @app.post("/predict")
    async def predict(
        files: list[UploadFile],
        adapters: Annotated[str, Form()] = "",
        top: Annotated[int, Form(ge=1, le=1000)] = 5,
        attention: Annotated[bool, Form()] = False,
    ) -> dict[str, Any]:
        if len(files) > limits.max_pictures:
            raise HTTPException(413, f"more than {limits.max_pictures} pictures")
        with unprocessable():
            names = desk.chosen([name.strip() for name in adapters.split(",") if name.strip()])
        asked = (answered(desk, file, names, top, attention) for file in files)
        answers = await asyncio.gather(*asked)
        return {"images": answers}

    return app


def refusal(request: Request, limits: Limits, token: str | None) -> Response | None:
    """Return what to answer a request that is not let in, None to the others."""
    given, expected = request.headers.get("authorization", ""), f"Bearer {token}"
    needed = token is not None and request.url.path != "/"
    if needed and not hmac.compare_digest(given.encode(), expected.encode()):
        return JSONResponse({"detail": "the token is missing or wrong"}, 401)
    if request.method not in ("POST", "PUT"):
        return None
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        return JSONResponse({"detail": "the length of the request is missing"}, 411)
    if int(length) > limits.max_bytes:
        return JSONResponse({"detail": f"more than {limits.max_bytes:,} bytes"}, 413)
    return None


@contextmanager
def unprocessable() -> Iterator[None]:
    """Answer what a client can mend with status 422."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise HTTPException(422, str(error)) from error


async def answered(
    desk: Desk, file: UploadFile, names: Sequence[str], top: int, attention: bool
) -> dict[str, Any]:
    """Return the adapters' answers to a picture, or what is wrong with it."""
    name = file.filename or "picture"
    content = await file.read()
    try:
        image = await run_in_threadpool(read_image, BytesIO(content), desk.fit, name)
        asked = (False, True) if attention and desk.can_look else (False,)
        waiting = [desk.ask(image, names, look=look) for look in asked]
        found, *looks = await asyncio.gather(*map(asyncio.wrap_future, waiting))
    except ValueError as error:
        return {"name": name, "error": str(error)}
    except Busy as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
    answers: dict[str, Any] = {"name": name, "answers": desk.named(found, names, top)}
    for weights in looks:
        answers["attention"] = {
            adapter: {
                "weights": one.tolist(),
                "picture": await run_in_threadpool(shown, image, one),
            }
            for adapter, one in zip(names, weights, strict=True)
        }
    return answers


def shown(image: Tensor, weights: Tensor) -> str:
    """Return the address, which holds all of it, of an image in the light of its weights."""
    content = brightened_file(image, weights)
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
