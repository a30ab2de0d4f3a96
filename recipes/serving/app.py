"""A `Desk` in; its web page and HTTP interface out.

GET /           the page
GET /adapters   name, classes and folder of every adapter
PUT /adapters/NAME   {"folder": DIR}: load an adapter, or replace the one of that name
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
    """How much a request may contain."""

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
        token: that every request except for the page must have, as "Authorization: Bearer TOKEN";
            None for no such check.
        hosts: accepted names in the Host header, against DNS rebinding by other web sites.
    """
    app = FastAPI(title="vitft", version=__version__)
    MultiPartParser.spool_max_size = limits.max_bytes  # keep pictures off the disk
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def guard(request: Request, go_on: Next) -> Response:
        return refusal(request, limits, token) or await go_on(request)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        """Return what is wrong in a line, without the input, which may not be valid JSON."""
        found = [(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
        detail = "; ".join(f"{field}: {message}" for field, message in found)
        return JSONResponse({"detail": detail}, 422)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE.read_text()

    @app.get("/adapters")
    def list_adapters() -> list[dict[str, Any]]:
        return desk.listing()

    @app.put("/adapters/{name}")
    def load(name: str, saved: Folder) -> dict[str, Any]:
        with unprocessable():
            desk.load(name, saved.folder)
        return next(adapter for adapter in desk.listing() if adapter["name"] == name)

    @app.post("/predict")
    async def predict(
        files: list[UploadFile],
        adapters: Annotated[list[str], Form(default_factory=list)],
        top: Annotated[int, Form(ge=1, le=1000)] = 5,
        attention: Annotated[bool, Form()] = False,
    ) -> dict[str, Any]:
        if len(files) > limits.max_pictures:
            raise HTTPException(413, f"more than {limits.max_pictures} pictures")
        with unprocessable():
            names = desk.chosen(adapters)
        asked = (answered(desk, file, names, top, attention) for file in files)
        answers = await asyncio.gather(*asked)
        return {"images": answers}

    return app


def refusal(request: Request, limits: Limits, token: str | None) -> Response | None:
    """Return the response that refuses a request: no valid token, or too large; else None."""
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
    """Turn errors that the client can mend into status 422."""
    try:
        yield
    except (ValueError, OSError) as error:
        told = str(error).encode(errors="replace").decode()  # JSON takes no lone surrogates
        raise HTTPException(422, told) from error


async def answered(
    desk: Desk, file: UploadFile, names: Sequence[str], top: int, attention: bool
) -> dict[str, Any]:
    """Return the adapters' answers to a picture, or what is wrong with it."""
    name = file.filename or "picture"
    content = await file.read()
    try:
        image = await run_in_threadpool(read_image, BytesIO(content), desk.fit, name)
        kinds = (False, True) if attention and desk.can_attend else (False,)
        waiting = [desk.ask(image, names, attention=kind) for kind in kinds]
        found, *maps = await asyncio.gather(*map(asyncio.wrap_future, waiting))
    except ValueError as error:
        return {"name": name, "error": str(error)}
    except Busy as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
    answers: dict[str, Any] = {"name": name, "answers": desk.named(found, names, top)}
    for weights in maps:
        answers["attention"] = {
            adapter: {
                "weights": one.tolist(),
                "picture": await run_in_threadpool(data_url, image, one),
            }
            for adapter, one in zip(names, weights, strict=True)
        }
    return answers


def data_url(image: Tensor, weights: Tensor) -> str:
    """Return an image, uint8 (C, height, width), brightened by its weights, as a data URL."""
    content = brightened_file(image, weights)
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
