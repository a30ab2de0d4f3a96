"""The command line; a command's recipe, and with it torch, is imported only when it is needed."""

import importlib
import importlib.util
import io
import os
import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import click

from vitft.command.completion import command_from_help
from vitft.command.help import COMMANDS, saved_help
from vitft.command.streams import SafeStream
from vitft.training.stop import stop_at_once
from vitft.version import __version__

TRAINING = {"pretrain", "finetune", "rerun", "sweep"}  # go on when their terminal is lost
# commands that torchrun may start in several processes
DISTRIBUTED = {"pretrain", "finetune", "rerun", "evaluate"}
MAX_LINE = 2000  # characters of an error message
# Words in the errors that a process gets when another one has ended.
LOST_PROCESS = ("closed by peer", "reset by peer", "timed out", "NCCL", "connectFullMesh")


class LazyGroup(click.Group):
    """A group that lists its commands without importing them, and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return a command and its arguments; for --help alone, print the saved help instead."""
        is_help = not ctx.resilient_parsing and len(args) == 2
        if is_help and args[0] in COMMANDS and args[1] in ("-h", "--help"):
            click.echo(saved_help(args[0]), nl=False)
            ctx.exit()
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the command, imported from its recipe."""
        if ctx.resilient_parsing:  # the shell completes a line, which must be quick
            return command_from_help(name) if name in COMMANDS else None
        if name not in COMMANDS:
            raise click.UsageError(f"no command {name!r}; choose from {', '.join(COMMANDS)}")
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            _check_distributed(name)
        _check_packages()
        with stop_at_once():
            command: click.Command = importlib.import_module(f"recipes.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    """Print the versions from the packages' metadata; importing the packages takes seconds."""
    if not asked or ctx.resilient_parsing:
        return
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    click.echo(f"vitft {__version__} (Python {platform.python_version()}, {found})")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of vitft, Python and what it computes with, and exit.",
)
@click.option("--traceback", is_flag=True, help="Show where an error was raised, for a bug report.")
def cli(traceback: bool) -> None:
    """Train Vision Transformers and fine-tune them with adapters.

    Results go to standard output, progress to standard error. Exit status: 0 done, 2 an error
    that you can fix, 130 interrupted (training continues with --resume).
    """


def main() -> NoReturn:
    """Run the command line: status 2 and one line for the user's mistakes, 130 if interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and not TRAINING.isdisjoint(sys.argv[1:3]):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start, as by 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for letters that the terminal cannot show
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, SafeStream(s)) for s in (sys.stdout, sys.stderr))
    errors = sys.stderr
    if _is_distributed() and os.environ["RANK"] != "0":  # only the first writes
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    code = 0
    try:
        # colour: click must not drop a name's control characters, which SafeStream escapes
        cli(sys.argv[1:] or ["--help"], standalone_mode=False, color=True)
    except BaseException as error:
        sys.stderr = errors
        code = _status(error)
    sys.stdout.flush()
    if code and _is_distributed():
        os._exit(code)  # a normal exit could wait for the other processes, and they for this one
    sys.exit(code)


def _status(error: BaseException) -> int:
    """Write why a command ended, and return its exit status.

    Raises:
        BaseException: `error` itself, if it is a fault of the program and not the user's.
    """
    text, is_first = " ".join(str(error).split()), _is_first_to_fail()
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):  # of which click makes an Abort
        if is_first:
            reason = str(error.__cause__ or "") or text
            click.echo(f"Stopped: {reason or 'interrupted'}", err=True)
        return 130
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif "--traceback" in sys.argv:
        raise error
    elif isinstance(error, (RuntimeError, MemoryError)):
        # This imports torch, which only takes time where the error is not torch's.
        from vitft.devices.memory import is_out_of_memory

        if is_out_of_memory(error):
            text = f"out of memory{_less_memory()} ({text[:100]})"
        elif _is_distributed() and (not is_first or any(words in text for words in LOST_PROCESS)):
            text = "another process of this run has ended; --resume continues from what was saved"
        else:
            raise error
    elif not isinstance(error, (ValueError, OSError)):
        raise error
    if is_first:
        line = " ".join(text.split())
        more = f"... ({len(line):,} characters)" if len(line) > MAX_LINE else ""
        click.echo(f"Error: {line[:MAX_LINE]}{more}", err=True)
    return 2


def _less_memory() -> str:
    """Return how the command can do with less memory, as the end of a sentence."""
    half, same = "; try half the --batch-size", "--accumulate 2 for the same result"
    if "sweep" in sys.argv[1:3]:
        return f"{half}, {same}, or a smaller --together or --image-size"
    if not {"pretrain", "finetune"}.isdisjoint(sys.argv[1:3]):
        same = same if _is_distributed() else same.replace("2", "2 or --auto-batch")
        return f"{half}, {same}, --checkpoint-blocks or a smaller --image-size"
    return half if "evaluate" in sys.argv[1:3] else ""


def _is_distributed() -> bool:
    """Return whether torchrun started this process to train one model together with others."""
    return "RANK" in os.environ and not DISTRIBUTED.isdisjoint(sys.argv[1:3])


def _is_first_to_fail() -> bool:
    """Return whether no other process of this run has failed, and said why, before this one."""
    processes = sys.modules.get("vitft.devices.processes")  # which most commands never import
    return processes is None or processes.first_to_fail()


def _check_distributed(name: str) -> None:
    """Check that a command may run in several processes, as torchrun has started it.

    Raises:
        UsageError: it may not; told by the first process alone.
    """
    if name not in DISTRIBUTED:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)
        hint = "; --only 1/N shares its runs out" if name == "sweep" else ""
        raise click.UsageError(f"{name} is one process; start it without torchrun{hint}")


def _check_packages() -> None:
    """Check that `recipes` and `adapters` are vitft's; torchtune and AdapterHub have such packages.

    Raises:
        ClickException: one is another distribution's.
    """
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
