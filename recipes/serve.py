"""Serve a base and its adapters: a page and an HTTP interface.

`vitft serve --base BASE --adapter runs/signs --adapter runs/symbols`
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click

from recipes.shared.model import ModelOptions, find_base_of
from recipes.shared.options import pick_device
from vitft.command import options as cli
from vitft.command.options import option
from vitft.hub import fetched, is_name, repository_of
from vitft.model.checkpoint import load_model

LOCAL = ("127.0.0.1", "localhost", "::1")
TOKEN = "VITFT_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """Serve a base and its adapters: a page and an HTTP interface on this machine.

    POST /predict takes pictures (files), adapters (names with commas) and top; GET /adapters lists
    them; PUT /adapters/NAME with {"folder": DIR} loads one while others answer. /docs describes it.
    """

    adapter: tuple[str, ...] = option(
        (),
        "A saved adapter's folder, hf:OWNER/NAME, or NAME= and one of these; may be repeated.",
        repeated=True,
    )
    host: str = option(
        "127.0.0.1", "Address to listen at; other than this machine's own, it needs a token."
    )
    port: int = option(8000, "Port to listen on.")
    token: str | None = option(
        None, f"Bearer token that requests must send.  [default: the value of ${TOKEN}]"
    )
    max_mb: int = option(20, "Largest size of a request, in megabytes.")
    max_pictures: int = option(16, "Most pictures in a request.")
    max_waiting: int = option(256, "Most pictures waiting; more are refused with status 503.")
    max_adapters: int = option(64, "Most adapters, including those loaded later.")
    max_rank: int = option(16, "Largest rank of adapters loaded later.")
    max_classes: int = option(0, "Most classes of adapters loaded later.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")


def named(folders: tuple[str, ...]) -> dict[str, str]:
    """Return adapters' folders by name: NAME of NAME=FOLDER, else the last part of the path.

    Raises:
        ValueError: two adapters have the same name.
    """
    found: dict[str, str] = {}
    for text in folders:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            path = repository_of(text)[0] if is_name(text) else Path(text).resolve()
            name, folder = Path(path).name, text
        if name in found:
            raise ValueError(f"two adapters are called {name}; write NAME=FOLDER")
        found[name] = folder
    return found


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen at every address of a host that is free, and yield the sockets.

    Args:
        host: a name or an address.
        port: its port; 0 for any that is free.

    Raises:
        ValueError: the port is out of its range, or no address of the host is free.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is not in 0..{2**16 - 1}")
    found: list[socket.socket] = []
    reason: Exception | None = None
    with ExitStack() as stack:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            addresses, reason = [], error
        for family, _, _, _, (name, _, *rest) in addresses:
            # With port 0, the first socket chooses the port for all.
            same_port = found[0].getsockname()[1] if found else port
            try:
                bound = socket.create_server((name, same_port, *rest), family=family)
            except OSError as error:
                reason = error
                continue
            found.append(stack.enter_context(bound))
        if not found:
            why = getattr(reason, "strerror", None) or reason
            raise ValueError(
                f"cannot listen at {host}, port {port}: {why}; choose another --port or --host"
            ) from reason
        yield found


def run(options: ServeOptions) -> None:
    """Serve until interrupted.

    Raises:
        ValueError, OSError: an option is out of its range, a package or a file is missing or
            broken, or the port is not free.
    """
    try:
        import uvicorn

        from recipes.serving.app import Limits, make_app
        from recipes.serving.desk import Desk
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}; pip install 'vitft[serve]'") from error
    token = options.token or os.environ.get(TOKEN)
    if options.host not in LOCAL and not token:
        raise ValueError(
            f"--host {options.host} can be reached by others; give them a token by --token or "
            f"${TOKEN}"
        )
    for name in ("max_waiting", "max_adapters", "max_rank"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is not positive")
    with listening(options.host, options.port) as listeners:
        folders = named(options.adapter)
        first = fetched(next(iter(folders.values()))) if folders else None
        desk = Desk(
            load_model(find_base_of(options.base, first)),
            folders,
            device=pick_device(options.device),
            max_adapters=options.max_adapters,
            max_waiting=options.max_waiting,
            rank=options.max_rank,
            n_classes=options.max_classes,
        )
        limits = Limits(options.max_pictures, options.max_mb * 2**20)
        hosts = [*LOCAL, options.host] if options.host in LOCAL else ["*"]
        click.echo(f"serving         {', '.join(desk.slots)}")
        host = f"[{options.host}]" if ":" in options.host else options.host
        click.echo(f"page            http://{host}:{listeners[0].getsockname()[1]}/")
        app = make_app(desk, limits, token=token, hosts=hosts)
        with suppress(KeyboardInterrupt):  # Ctrl-C is how a server is ended
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(listeners)


command = cli.command("serve", ServeOptions, run)
