"""The site: `make docs` builds docs/*.md into build/docs and fails where a link leads nowhere.

The menu is the list in index.md. commands.md is written here, from the options of each command.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from vitft.command.help import COMMANDS  # noqa: E402
from vitft.version import __version__  # noqa: E402

project, release, html_title = "vitft", __version__, "vitft"
extensions = ["myst_parser"]
root_doc = "index"
html_theme = "furo"
myst_heading_anchors = 4
html_show_sphinx = html_show_copyright = False
html_copy_source = False


def plain(text: str) -> str:
    """Return text whose stars and bars are no Markdown."""
    return re.sub(r"([*|<])", r"\\\1", " ".join(text.split()))


def paragraph(text: str) -> str:
    """Return a paragraph of a command's help; one that click must not wrap as a block."""
    kept = text.removeprefix("\b\n")
    return plain(text) if kept == text else "\n".join(f"    {line}" for line in kept.splitlines())


def option_row(parameter: click.Option) -> str:
    """Return a row of a command's table: the option, what it takes, what it does."""
    default = re.search(r"\s*\[(?:default: )?([^\[\]]*)\]$", parameter.help or "")
    told = (parameter.help or "")[: default.start()] if default else parameter.help or ""
    flags = " / ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    kind = "" if parameter.secondary_opts else parameter.metavar or parameter.type.name.upper()
    cells = (flags, f"`{kind}`" if kind else "", plain(told), plain(default[1]) if default else "")
    return f"| {' | '.join(cells)} |"


def command_section(name: str, command: click.Command) -> str:
    """Return the section of a command: its usage, what it does, a table of its options."""
    arguments = [p.human_readable_name for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join(["vitft", name, "[OPTIONS]", *arguments])
    rows = [option_row(p) for p in command.params if isinstance(p, click.Option)]
    head = "| option | takes | does | default |\n|---|---|---|---|"
    table = "\n".join([head, *rows]) if rows else ""
    text = "\n\n".join(map(paragraph, (command.help or "").split("\n\n")))
    return f"## {name}\n\n    {usage}\n\n{text}\n\n{table}\n"


def commands_page() -> str:
    """Return the page of every command."""
    made = {name: importlib.import_module(f"recipes.{name}").command for name in COMMANDS}
    head = (
        "# Every command\n\nMade from the options of the program, as `vitft COMMAND --help` is.\n"
    )
    return "\n".join([head, *(command_section(name, made[name]) for name in COMMANDS)])


def add_menu(_: Any, page: str, source: list[str]) -> None:
    """Add the menu to index.md: the pages that it links to, in its order, then all others."""
    if page == root_doc:
        linked = re.findall(r"\]\(([\w-]+)\.md\)", source[0])
        others = {path.stem for path in HERE.glob("*.md")} - {root_doc, *linked}
        entries = "\n".join([*linked, *sorted(others)])
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def setup(app: Any) -> None:
    """Write the page of the commands, and let Sphinx add the menu."""
    (HERE / "commands.md").write_text(commands_page())
    app.connect("source-read", add_menu)
