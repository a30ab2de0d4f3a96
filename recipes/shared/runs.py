"""The options of a training run in; its folder, checked, locked and cleared, out."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from recipes.shared.options import TrainOptions
from recipes.shared.places import check_writable, locked_path
from recipes.sharing.card import CARD, is_ours
from vitft.data.folders import is_new_class
from vitft.data.load import unambiguous
from vitft.devices.processes import attempt, from_first, is_first, launch_time
from vitft.files import read_json, read_metadata, remove_unfinished, write_json
from vitft.records import record_of
from vitft.report.findings import FILE
from vitft.training.loggers import EVENTS, check_loggers
from vitft.training.state import NEXT, STATE

Options = TypeVar("Options", bound=TrainOptions)
LOG = "log.json"  # the run's identity at each logger of --log
# The files that a run writes beside config.json.
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
# The options that may differ when a run is resumed.
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
    """Return the options with --resume and --overwrite as the run's folder requires.

    When torchrun starts the processes again after one died, the run resumes from its state if this
    launch of torchrun saved it. Where nothing was saved yet, --resume starts the run. The first
    process decides for all. A data folder that has a known set's name gets ./ in front, so that it
    is not taken for the set later.
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
    """Check that the run's folder may be used, and return it; no file in it is changed yet.

    Raises:
        ValueError: the folder holds a run already or a file of something else that a run replaces,
            there is none to resume or it was started with other options, it would be a class of the
            images, or a package that --log needs is missing.
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
    elif not options.overwrite and not _is_run(folder):
        for name in ("config.json", LOG):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is of no run of vitft; choose another --out")
    if is_first():
        if is_new_class(folder, Path(options.data)):
            raise ValueError(
                f"{folder} would be one of the classes in {options.data}; choose another --out"
            )
        check_writable(folder)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs; the lock is released however the process ends.

    Temporary files of a killed run are removed. A file system without locks gives none. Of several
    processes, the first one locks the folder.

    Raises:
        ValueError: another run has locked it, or it was removed meanwhile.
        OSError: the folder cannot be written to.
    """
    if not is_first():
        yield
        return
    with locked_path(folder, folder / ".lock"):
        remove_unfinished(folder)
        yield


def start_run(options: TrainOptions, folder: Path) -> None:
    """Write config.json and, unless the run is resumed, remove the files of an earlier run.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not options.resume:
        _clear(folder)
    write_json(folder / "config.json", saved_options(options))


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run, but for its logs."""
    for name in OUTPUTS:  # the state first, so that it is never resumed with other options
        (folder / name).unlink(missing_ok=True)
    if is_ours(folder):
        (folder / CARD).unlink(missing_ok=True)


def earlier_logs(folder: Path) -> list[Path]:
    """Return the files of an earlier run's logs."""
    return [folder / LOG, *folder.glob(EVENTS)] if _is_run(folder) else []


def _is_run(folder: Path) -> bool:
    """Return whether the folder's config.json is that of a run, finished or not."""
    with suppress(OSError, ValueError):
        config = read_json(folder / "config.json")
        return isinstance(config, dict) and {"data", "out"} <= config.keys()
    return False


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
    config = read_config(folder, "resume")
    default = {field.name: field.default for field in fields(options)}
    for name, value in saved_options(options).items():
        before = config.get(name, default[name])  # an older vitft lacked some options
        # The default is then the method's, which is not known here.
        unknown = name not in config and (before is None or before == ())
        if name in ("data", "base"):  # an older vitft wrote folders without ./
            before, value = (str(path).removeprefix("./") for path in (before, value))
        if name not in MAY_DIFFER and before != value and not unknown:
            raise ValueError(
                f"the run in {folder} was started with {name} {before}, not {value}; "
                "resume it with the same options"
            )


def saved_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options as config.json holds them: lists for tuples, no resume or overwrite."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return {name: value for name, value in values.items() if name not in ("resume", "overwrite")}


def resumed_options(given: Mapping[str, Any], options: type[Any]) -> dict[str, Any]:
    """Return the options in the config.json of the run that --resume continues.

    Where there is none, but all required options are given, return {}: the run starts anew.

    Raises:
        ValueError: there is no run, and a required option is missing; or config.json is broken.
    """
    folder = Path(given["out"])
    needed = {field.name for field in fields(options) if field.default is MISSING}
    if needed <= given.keys() and not (folder / "config.json").exists():
        return {}
    return typed_options(read_config(folder, "resume"), options)


def read_config(folder: Path, purpose: str) -> dict[str, Any]:
    """Return the content of a run's config.json.

    Args:
        folder: the run's folder.
        purpose: what the run is wanted for, for error messages, such as "resume".

    Raises:
        ValueError: the folder holds no config.json, it is broken, or it was edited since the state
            was saved.
    """
    try:
        config = record_of(dict[str, Any], read_json(folder / "config.json"), "config.json")
    except FileNotFoundError:
        raise ValueError(
            f"there is no run to {purpose} in {folder}: it has no config.json"
        ) from None
    except (OSError, ValueError) as error:
        hint = "; start again with --overwrite" * (purpose == "resume")
        raise ValueError(f"the run in {folder} is broken: {error}{hint}") from error
    _check_unedited(config, folder)
    return config


def _check_unedited(config: Mapping[str, Any], folder: Path) -> None:
    """Check that config.json has the options that the state in the folder was saved with.

    The images and the base may have been moved: the state tells whether they are the same.

    Raises:
        ValueError: an option is another, and may not differ.
    """
    saved: Any = None
    with suppress(OSError, ValueError):  # where a state is needed, it is told that it is broken
        saved = read_metadata(folder / STATE).get("options")  # an older vitft saved none
    for name, value in saved.items() if isinstance(saved, dict) else ():
        if name not in (*MAY_DIFFER, "data", "base") and config.get(name) != value:
            raise ValueError(
                f"the run in {folder} was started with {name} {value}, but its config.json now has "
                f"{config.get(name)}; write {value} there"
            )


def typed_options(
    config: Mapping[str, Any], options: type[Any], names: Collection[str] | None = None
) -> dict[str, Any]:
    """Return the options in a config.json, each converted to the type of its field.

    Args:
        config: the content of config.json.
        options: the dataclass of the run's options.
        names: return only these; by default all.

    Raises:
        ValueError: a value is of another type.
    """
    types = get_type_hints(options)
    known = types.keys() if names is None else types.keys() & names
    given = {name: value for name, value in config.items() if name in known and value is not None}
    for name, value in given.items():
        if isinstance(value, float) and value.is_integer() and float not in _kinds(types[name]):
            given[name] = int(value)  # a script may have given epochs=2.0
        found = record_of(types[name], given[name], f"config.json: {name}")
        if isinstance(found, tuple):  # only lists are converted; 16 must not become 16.0
            given[name] = found
    return given


def _kinds(kind: Any) -> tuple[Any, ...]:
    """Return a type, or those of a union."""
    return get_args(kind) or (kind,)
