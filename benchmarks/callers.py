"""Requests to `vitft serve`: valid ones written, changed ones sent, and how that ends."""

import atexit
import base64
import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from select import select
from tempfile import mkdtemp
from typing import Any

import uvicorn

import adapters
from benchmarks.hostile import CPU, SECONDS, Kind, make_picture, tiny
from recipes.serving.app import Limits, make_app
from recipes.serving.desk import Desk

BOUNDARY = "------------a1b2c3"
PATIENCE = 0.3  # seconds
FIELDS = {"adapters": "a,base", "top": "3", "attention": "true"}


def multipart(fields: Mapping[str, str], name: str, picture: bytes) -> bytes:
    """Return the body of a form with fields and a picture."""
    parts = [(f'name="{key}"', str(value).encode()) for key, value in fields.items()]
    parts.append((f'name="files"; filename="{name}"', picture))
    body = b""
    for disposition, value in parts:
        line = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
        body += line.encode(errors="replace") + value + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def raw(request: Mapping[str, Any], body: bytes) -> bytes:
    """Return a request as it goes over the wire."""
    headers = {"Host": "x", "Connection": "close", "Content-Length": len(body)}
    headers |= request["headers"]
    lines = [f"{request['method']} {request['path']} HTTP/1.1"]
    lines += [f"{key}: {value}" for key, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode(errors="replace") + body


def described(number: int, folder: str) -> dict[str, Any]:
    """Return a valid request, of a kind that the number picks."""
    form = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    one = {"method": "POST", "path": "/predict", "headers": form, "fields": FIELDS, "name": "x.png"}
    text = {"Content-Type": "application/json"}
    put = {"method": "PUT", "path": "/adapters/b", "headers": text, "json": {"folder": folder}}
    get = {"method": "GET", "path": "/adapters", "headers": {"Accept": "*/*"}}
    return (one, put, one, get)[number % 4]


def make_request(folder: Path) -> None:
    """Write a request: its description and its picture, or every third time the raw bytes."""
    number = int(folder.name)
    make_picture(folder)
    (picture,) = folder.iterdir()
    request = described(number, server()[1])
    if number % 3 == 0:
        content = whole(request, picture.read_bytes())
        picture.unlink()
        (folder / "request.bin").write_bytes(content)
    else:
        (folder / "request.json").write_text(json.dumps(request))


def whole(request: Any, picture: bytes) -> bytes:
    """Return the raw request of a description; of one that describes none, its text."""
    try:
        if "fields" in request:
            return raw(request, multipart(request["fields"], request.get("name", ""), picture))
        return raw(request, json.dumps(request["json"]).encode() if "json" in request else b"")
    except (TypeError, KeyError, AttributeError, ValueError):
        return json.dumps(request).encode()


@cache
def server() -> tuple[int, str]:
    """Return the port of a server of two tiny adapters, and the folder of one of them."""
    model = adapters.inject(tiny(), adapters.LoRAConfig(rank=2), trainable=("head",))
    folder = Path(mkdtemp())
    adapters.save_adapter(model, folder)
    desk = Desk(tiny(), {"a": str(folder)}, device=CPU, max_adapters=4)
    limits = Limits(max_pictures=4, max_bytes=2**20)
    app = make_app(desk, limits, token=None, hosts=["*"])
    own = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=own.run, daemon=True)
    thread.start()
    while not own.started:
        time.sleep(0.01)

    @atexit.register
    def stop() -> None:
        own.should_exit = True
        thread.join()
        desk.close()

    return own.servers[0].sockets[0].getsockname()[1], str(folder)


def sent(content: bytes, patience: float) -> bytes:
    """Send bytes to the server and return all that it answers.

    Args:
        content: of the request.
        patience: seconds after which a server that still waits is told that there is no more.
    """
    with socket.create_connection(("127.0.0.1", server()[0]), timeout=SECONDS) as connection:
        with suppress(ConnectionError):  # it need not listen to the end
            connection.sendall(content)
        answer = b""
        if not select([connection], [], [], patience)[0]:
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while part := connection.recv(2**16):
                answer += part
    return answer


@cache
def first_answer() -> str:
    """Return what the server answers to a valid request before all others."""
    return valid_answer()


def valid_answer() -> str:
    """Return what the server answers about one picture."""
    pixel = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    )
    request = described(0, "") | {"fields": {"adapters": "a"}}
    return sent(whole(request, pixel), SECONDS).partition(b"\r\n\r\n")[2].decode()


def use_request(folder: Path) -> str:
    """Send a request; the next one, which is valid, must be answered as before."""
    expected = first_answer()
    if (path := folder / "request.bin").exists():
        content = path.read_bytes()
    else:
        picture = next(path for path in folder.iterdir() if path.suffix != ".json")
        text = (folder / "request.json").read_bytes()
        try:
            content = whole(json.loads(text), picture.read_bytes())
        except (ValueError, RecursionError):
            content = text
    head, _, body = sent(content, PATIENCE).partition(b"\r\n\r\n")
    if b"Traceback" in body or b'File "' in body:
        return "a traceback in the answer"
    if valid_answer() != expected:
        return "other answers afterwards"
    status = head.split(b" ")[1:2]
    if not head:
        raise ValueError("the connection was closed without an answer")
    if status and status[0].startswith(b"5") and status[0] != b"503":
        return f"status {status[0].decode()}"
    if status and status[0].startswith(b"4"):
        raise ValueError(body.decode(errors="replace"))
    return ""


REQUESTS = Kind(make_request, use_request)
