"""The options of a sweep, some with several values, in; the options of every adapter out."""

from dataclasses import dataclass, fields, make_dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from recipes.shared.finetuning import CommonOptions, FinetuneOptions
from recipes.shared.methods import method_lines, method_options
from vitft.command.options import option

# Options that may have several values: the numbers that methods take, and the learning rate.
GRID: dict[str, Any] = {
    name: kind
    for name, (hint, _) in method_options().items()
    for kind in get_args(hint)
    if kind in (int, float)
} | {"lr": float}


@dataclass(frozen=True, kw_only=True)
class SweepBase(CommonOptions):
    """The options of a sweep that do not belong to a method."""

    lr: tuple[str, ...] = option(  # type: ignore[assignment]
        (), "Highest learning rates, with commas.  [default: as in finetune]"
    )
    seeds: int = option(1, "Train each with this many seeds, counted from --seed.")
    together: int = option(16, "Most adapters in one pass; more take more memory.")
    plan: str | None = option(
        None, "Train nothing; write the command of every run to this file, for any scheduler."
    )
    only: str | None = option(
        None,
        "Train only this share of the runs, as 1/4; once all shares are there, --resume without "
        "--only picks the best.",
    )
    ray: bool = option(
        False, "Train each run as a task of the Ray cluster of $RAY_ADDRESS, or of this machine."
    )


SweepOptions = make_dataclass(
    "SweepOptions",
    [
        (name, tuple[str, ...], option((), f"Several with commas.  {field.metadata['help']}"))
        if name in GRID
        else (name, kind, field)
        for name, (kind, field) in method_options().items()
    ],
    bases=(SweepBase,),
    frozen=True,
    kw_only=True,
    namespace={
        "__doc__": "Train adapters of every combination of --lr and the method's numbers together, "
        "each as it would train alone, and pick the best by validation.\n\n\b\n"
        + "\n".join(["Methods:", *method_lines()])
    },
)


def combinations(options: SweepBase) -> list[tuple[dict[str, Any], CommonOptions]]:
    """Return for every run its values of the options that vary, and all its options.

    Raises:
        ValueError: a value is no number or is given twice, or an option does not suit a sweep.
    """
    if options.from_ is not None:
        raise ValueError("a sweep starts new adapters; leave out --from")
    if options.val_fraction == 0:
        raise ValueError("a sweep picks by validation; leave out --val-fraction 0")
    for name in ("seeds", "together"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is not positive")
    for name in ("compile", "checkpoint_blocks", "auto_batch"):
        if getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"a sweep computes its adapters in one pass; leave out {flag}")
    values = {
        name: [_number(name, text) for text in getattr(options, name)]
        for name in GRID
        if getattr(options, name)
    }
    for name, found in values.items():
        if len(set(found)) < len(found):
            raise ValueError(f"--{name.replace('_', '-')} has a value twice: {found}")
    same = {field.name for field in fields(FinetuneOptions)} - GRID.keys() - {"seed", "out"}
    common = {name: getattr(options, name) for name in same}
    made = []
    for numbers in product(*values.values()):
        for seed in range(options.seed, options.seed + options.seeds):
            varied = dict(zip(values, numbers, strict=True))
            chosen = {name: varied[name] for name in values if len(values[name]) > 1} | {
                "seed": seed
            }
            out = Path(options.out, ",".join(f"{name}={value}" for name, value in chosen.items()))
            made.append((chosen, FinetuneOptions(**common, **varied, seed=seed, out=str(out))))
    return made


def _number(name: str, text: str) -> float:
    try:
        number: float = GRID[name](text)
    except ValueError:
        raise ValueError(f"--{name.replace('_', '-')} {text!r} is no number") from None
    return number
