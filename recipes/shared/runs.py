"""The folder of a training run: whether it may be used, its options, and its files."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from recipes.shared.options import TrainOptions
from recipes.shared.places import check_writable, held
from recipes.sharing.card import CARD, is_ours
from vitft.data.load import unambiguous
from vitft.devices.processes import attempt, from_first, is_first, launch_time
from vitft.files import read_json, remove_unfinished, write_json
from vitft.records import record_of
from vitft.report.findings import FILE
from vitft.training.loggers import EVENTS, check_loggers
from vitft.training.state import NEXT, STATE

Options = TypeVar("Options", bound=TrainOptions)
LOG = "log.json"  # where the loggers of --log hold a run
# What a run leaves beside config.json.
OUTPUTS = (
    STATE,
    NEXT,
    "metrics.jsonl",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "summary.json",
    FILE,
    "report.html",
)
# What may differ between a run's start and its resumption.
MAY_DIFFER = (
    "out",
    "epochs",
    "patience",
    "device",
    "save_seconds",
    "compile",
    "cache_features",
    "accumulate",
    "auto_batch",
    "checkpoint_blocks",
    "shard",
    "log",
)


def continued(options: Options) -> Options:
    """Return the options of a run that torchrun may have started again after a process died.

    It resumes a state that the same launch of torchrun saved, not an older one. Where nothing was
    saved yet, --resume starts the run. All processes follow what the first one finds. A folder of
    images stays one, whatever stands where the options are read next.
    """
    folder, resume, overwrite = Path(options.out), options.resume, options.overwrite
    if attempt() and (folder / STATE).is_file():
        ours = (folder / STATE).stat().st_mtime >= launch_time()
        resume, overwrite = resume or ours, overwrite and not ours
    resume = resume and any((folder / name).exists() for name in OUTPUTS)
    resume, overwrite = from_first((resume, overwrite))
    data = unambiguous(options.data)
    return replace(options, resume=resume, overwrite=overwrite, data=data)


def check_run(options: TrainOptions) -> Path:
    """Return the run's folder, once --resume and --overwrite allow its use; no file is touched yet.

    Raises:
        ValueError: a run stands there already, or there is none to resume, or it was started
            with other options; or what --log needs is not there.
        OSError: the folder cannot be written to.
    """
    folder = Path(options.out)
    check_loggers(options.log)
    if options.resume:
        check_same(options, folder)
    elif not options.overwrite and any((folder / name).exists() for name in OUTPUTS):
        raise ValueError(
            f"{folder} holds a run already; use --resume, --overwrite or another --out"
        )
    if is_first():
        check_writable(folder)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder, so that no other run writes to it; released however the process ends.

    Unfinished files of a killed run are removed. On a file system without locks nothing is locked.
    Of several processes, the first one locks the folder.

    Raises:
        ValueError: another run holds it.
    """
    if not is_first():
        yield
        return
    with held(folder, folder / ".lock"):
        remove_unfinished(folder)
        yield


def start_run(options: TrainOptions, folder: Path) -> None:
    """Write config.json and, unless the run goes on with it, remove what an earlier run left.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not options.resume:
        _clear(folder)
    write_json(folder / "config.json", written(options))


def _clear(folder: Path) -> None:
    """Remove what an earlier run left."""
    for name in OUTPUTS:  # the state first: nothing goes on from it with other options
        (folder / name).unlink(missing_ok=True)
    if is_ours(folder):
        (folder / CARD).unlink(missing_ok=True)
    for path in (folder / LOG, *folder.glob(EVENTS)):
        path.unlink(missing_ok=True)


def check_same(options: TrainOptions, folder: Path) -> None:
    """Check that there is a run to resume, and that it was started with these options.

    Raises:
        ValueError: there is none, or it was started with others.
    """
    if options.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite removes it; choose one")
    if not (folder / "config.json").is_file() or not (folder / STATE).is_file():
        raise ValueError(
            f"there is no run to resume in {folder}, but files of one; start again with --overwrite"
        )
    told = started(folder, "resume")
    default = {field.name: field.default for field in fields(options)}
    for name, value in written(options).items():
        before = told.get(name, default[name])  # what an older version did not know
        unknown = name not in told and (before is None or before == ())  # the method's own
        if name in ("data", "base"):  # which older versions did not tell from what ships
            before, value = (str(place).removeprefix("./") for place in (before, value))
        if name not in MAY_DIFFER and before != value and not unknown:
            raise ValueError(
                f"the run in {folder} was started with {name} {before}, not {value}; "
                "resume it with the same options"
            )


def written(options: TrainOptions) -> dict[str, Any]:
    """Return the options as they read when they come back from a file: lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return {name: value for name, value in values.items() if name not in ("resume", "overwrite")}


def resumed(given: Mapping[str, Any], options: type[Any]) -> dict[str, Any]:
    """Return the options that the run of --resume was started with.

    They are {} if nothing was started yet and all required options are given.

    Raises:
        ValueError: nothing was started, and something is missing.
    """
    folder = Path(given["out"])
    needed = {field.name for field in fields(options) if field.default is MISSING}
    if needed <= given.keys() and not (folder / "config.json").exists():
        return {}
    return recall(started(folder, "resume"), options)


def started(folder: Path, purpose: str) -> dict[str, Any]:
    """Return what config.json tells of the run in a folder.

    Args:
        folder: of the run.
        purpose: what it is wanted for, for an error.

    Raises:
        ValueError: the folder holds no run that tells it.
    """
    try:
        return record_of(dict[str, Any], read_json(folder / "config.json"), "config.json")
    except FileNotFoundError:
        raise ValueError(
            f"there is no run to {purpose} in {folder}: it has no config.json"
        ) from None
    except (OSError, ValueError) as error:
        hint = "; start again with --overwrite" * (purpose == "resume")
        raise ValueError(f"the run in {folder} is broken: {error}{hint}") from error


def recall(
    told: Mapping[str, Any], options: type[Any], names: Collection[str] | None = None
) -> dict[str, Any]:
    """Return the options that a run was started with, each of its type.

    Args:
        told: by config.json.
        options: the dataclass of the run's options.
        names: of those that are wanted, where it is not all.

    Raises:
        ValueError: a value is of another type.
    """
    types = get_type_hints(options)
    known = types.keys() if names is None else types.keys() & names
    given = {name: value for name, value in told.items() if name in known and value is not None}
    for name, value in given.items():
        if isinstance(value, float) and value.is_integer() and float not in _kinds(types[name]):
            given[name] = int(value)  # epochs=2.0, from Python
        found = record_of(types[name], given[name], f"config.json: {name}")
        if isinstance(found, tuple):  # all else as it stands: 16 is not to become 16.0
            given[name] = found
    return given


def _kinds(kind: Any) -> tuple[Any, ...]:
    """Return a type, or those of a union."""
    return get_args(kind) or (kind,)
