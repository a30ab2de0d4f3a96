"""Put an adapter or a base on the hub: `vitft push runs/signs hf:OWNER/NAME`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open

from recipes.sharing.card import CARD, card, is_ours
from recipes.sharing.public import (
    base_name,
    cleaned,
    data_name,
    holds,
    is_public,
    private_paths,
)
from recipes.sharing.run_files import read_run_files, read_text
from vitft import hub
from vitft.command import options as cli
from vitft.command.options import option

REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)")
TEXTS = ("adapter_config.json", "metrics.jsonl")  # beside summary.json, the card and the report
REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Upload the adapter or base in DIR, with its model card, to a repository on the hub.

    Only adapter_config.json, the weights, README.md, summary.json and metrics.jsonl go there, and
    no path of this machine. You are logged in by `hf auth login` or HF_TOKEN.
    """

    dir: str = option(help="A finished run's folder, or an adapter's.", argument=True)
    to: str = option(help="hf:OWNER/NAME; made if it is not there.", argument=True)
    private: bool = option(False, "Make a private repository.")
    report: bool = option(False, "Upload report.html too, which shows pictures of the data set.")


def push(options: PushOptions) -> tuple[str, str, list[str]]:
    """Upload a folder; return the address, the commit's hash and the names of the files.

    Raises:
        ValueError, OSError: the folder holds nothing to upload, a file is broken or holds a path of
            this machine, the hub refuses, or there is no network.
    """
    found = REPOSITORY.fullmatch(options.to)
    if found is None:
        raise ValueError(f"{options.to} is no hf:OWNER/NAME")
    files = published(Path(options.dir), found[1], with_report=options.report)
    address, commit = hub.push(found[1], files, private=options.private)
    return address, commit, [*files]


def published(folder: Path, repository: str, *, with_report: bool) -> dict[str, bytes | Path]:
    """Return the files of a run's folder to upload, by name, without paths of this machine.

    Raises:
        ValueError, OSError: it holds no adapter and no base, a file is broken, or the header of
            the weights holds a path.
    """
    run = read_run_files(folder)
    paths = private_paths(folder, run.config, run.summary, run.adapter)
    check_weights(run.file, paths)
    is_made = is_ours(folder)
    texts = {CARD: card(folder, repository) if is_made else read_text(folder / CARD)}
    if run.summary:
        texts["summary.json"] = json.dumps(public(run.summary), indent=2) + "\n"
    for name in (*TEXTS, *[REPORT] * with_report):
        if (folder / name).is_file():
            texts[name] = read_text(folder / name)
    files = {name: cleaned(text, paths).encode() for name, text in texts.items()}
    return {run.file.name: run.file, **files}


def public(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary with public names of its data set and base instead of paths.

    A base that others can't load is left out.
    """
    found, base = dict(summary), base_name(summary)
    if "data" in found:
        found["data"] = data_name(str(found["data"]))
    if base is not None:
        del found["base"]
        found |= {"base": base} if is_public(base) else {}
    return found


def check_weights(file: Path, paths: list[str]) -> None:
    """Check that the header of a safetensors file holds no path of this machine.

    Raises:
        ValueError: it holds one.
    """
    with safe_open(file, framework="pt") as opened:
        text = " ".join((opened.metadata() or {}).values())
    for path in paths:
        if holds(text, path):
            raise ValueError(
                f"the header of {file} holds the path {path}; save or convert it again"
            )


def run(options: PushOptions) -> None:
    """Push, and print the address and how to use it."""
    address, commit, names = push(options)
    name, is_adapter = options.to, "adapter_config.json" in names
    click.echo(f"uploaded        {', '.join(sorted(names))}")
    click.echo(f"address         {address}")
    click.echo(f"this version    {name}@{commit}")
    use = f"--adapter {name}" if is_adapter else f"--base {name}"
    click.echo(f"use it          vitft predict {use} IMAGE")
    if REPORT not in names and Path(options.dir, REPORT).is_file():
        click.echo("left here       report.html, which shows pictures of the data set (--report)")


command = cli.command("push", PushOptions, run)
