"""The command line: a lazy group; a command imports its recipe, and torch, only when it runs."""

import importlib
import importlib.util
import io
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import click

from vitft.command.help import COMMANDS, kept
from vitft.command.streams import Outliving
from vitft.training.stop import stop_at_once
from vitft.version import __version__


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps, and imports one when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return a command and what is left of the arguments; print its help where that is all."""
        if len(args) == 2 and args[0] in COMMANDS and args[1] in ("-h", "--help"):
            click.echo(kept(args[0]), nl=False)
            ctx.exit()
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the command, imported from its recipe."""
        if name not in COMMANDS:
            raise click.UsageError(f"no command {name!r}; choose from {', '.join(COMMANDS)}")
        _check_packages()
        with stop_at_once():
            command: click.Command = importlib.import_module(f"recipes.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
@click.option("--traceback", is_flag=True, help="Show where an error was raised, for a bug report.")
def cli(traceback: bool) -> None:
    """Train Vision Transformers and fine-tune them with adapters.

    Results go to standard output, progress to standard error. Exit status: 0 done, 2 something
    you can mend, 130 interrupted (training goes on with --resume).
    """


def main() -> NoReturn:
    """Run the command line: status 2 and one line for the user's mistakes, 130 if interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal lacks is no error
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, Outliving(s)) for s in (sys.stdout, sys.stderr))
    try:
        cli(sys.argv[1:] or ["--help"], standalone_mode=False)
        code = 0
    except click.ClickException as error:
        code = _fail(error.format_message())
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        # click wraps the former in the latter
        text = str(error.__cause__ or error) or "interrupted"
        click.echo(f"Stopped: {text}", err=True)
        code = 130
    except (ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        code = _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        text = str(error)  # torch's kinds cannot be named without importing it
        full = any(words in text for words in ("out of memory", "allocate memory"))
        if "--traceback" in sys.argv or not (full or isinstance(error, MemoryError)):
            raise
        code = _fail(f"out of memory; try fewer images or parameters at a time ({text[:100]})")
    sys.stdout.flush()
    sys.exit(code)


def _fail(message: str) -> int:
    click.echo("Error: " + " ".join(message.split()), err=True)
    return 2


def _check_packages() -> None:
    """Refuse a foreign `recipes` or `adapters`; torchtune has the one, AdapterHub the other."""
    home = Path(__file__).resolve().parents[2]
    for name in ("adapters", "recipes"):
        spec = importlib.util.find_spec(name)
        place: Any = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if place != home:
            raise click.ClickException(
                f"the package {name!r} in {place or 'this environment'} is not vitft's, "
                f"which stands in {home}; another distribution has taken its name: "
                "install vitft into an environment of its own"
            )
