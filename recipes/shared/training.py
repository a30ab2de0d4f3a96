"""A model, images and a plan in; the trained run and its summary out, also if it is stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recipes.shared.explain import explain
from recipes.shared.logs import logged
from recipes.shared.options import TrainOptions, pick_compile
from recipes.shared.report import make_report
from recipes.shared.runs import saved_options, start_run
from recipes.shared.splits import Splits
from recipes.shared.summary import as_computed, finish, summarise, summary_before
from vitft.devices.processes import barrier, is_first, n_processes
from vitft.devices.spread import shard
from vitft.evaluation.evaluate import evaluate
from vitft.evaluation.metrics import temperature
from vitft.evaluation.task import SeveralLabels, SingleLabel, balanced
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images
from vitft.report.findings import FILE
from vitft.training.loop import check_runs
from vitft.training.loop import train as train_runs
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import restore

CLASS_WEIGHTS = ("equal", "balanced")


def weighted(plan: Plan, options: TrainOptions, train: Images, n_classes: int) -> Plan:
    """Return the plan with the task that suits the labels, and with --class-weights in its loss.

    Raises:
        ValueError: --class-weights is unknown, or given for several labels an image.
    """
    if options.class_weights not in CLASS_WEIGHTS:
        known = ", ".join(CLASS_WEIGHTS)
        raise ValueError(f"class_weights={options.class_weights!r} is none of {known}")
    if train.labels.ndim == 2:
        if options.class_weights != "equal":
            raise ValueError("--class-weights is for one label an image; leave it out")
        return replace(plan, task=SeveralLabels())
    if options.class_weights == "equal":
        return plan
    return replace(plan, task=SingleLabel(balanced(train.labels, n_classes)))


def to_device(model: VisionTransformer, options: TrainOptions, device: torch.device) -> None:
    """Move a model to its device, or with --shard spread its weights over those of all processes.

    Raises:
        ValueError: there is only one process, or the optimizer needs whole matrices.
    """
    if not options.shard:
        model.to(device)
        return
    if n_processes() == 1:
        raise ValueError(
            "--shard is for several processes: torchrun --nproc-per-node N -m vitft ... --shard"
        )
    if options.optimizer == "muon":
        raise ValueError("--optimizer muon needs whole matrices; leave out --shard, or use adamw")
    shard(model, model.blocks, methods=("run",))


def train(
    model: VisionTransformer,
    splits: Splits,
    plan: Plan,
    options: TrainOptions,
    folder: Path,
    save: Callable[[Run], dict[str, Any]],
    belongs: Sequence[str] = (),
) -> tuple[Run, dict[str, Any]]:
    """Train the model in place, or continue a stopped run; return the run and its summary.

    A run that is stopped after its first epoch leaves its best weights so far, ready for use.

    Args:
        model: on its device.
        splits: the images.
        plan: how to train.
        options: of the run.
        folder: the run's folder.
        save: writes what was trained, and returns what summary.json says of it.
        belongs: what a state must have in common with the run to be resumed, such as the base's
            fingerprint.

    Raises:
        ValueError, OSError: an option does not suit the run, its state is broken or another run's,
            or a file cannot be written.
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; the message says how to go on.
    """
    compiled = pick_compile(options, plan, len(splits.train), model.head.weight.device)
    plan = weighted(replace(plan, compiled=compiled), options, splits.train, len(model.classes))
    given = saved_options(options)
    run = Run(model, splits.train, splits.validation, plan, folder, belongs, given)
    if options.resume:
        restore(run)
    check_runs([run])
    explain(run)
    computed = as_computed(summary_before(run, folder)) if options.resume else {}
    barrier()
    with logged(options, folder, run, is_new=not options.resume) as logs:
        if is_first():  # every process has checked everything, so an earlier run may be removed
            start_run(options, folder)
        try:
            train_runs(run)
        except KeyboardInterrupt:
            usable = ""
            if run.history:
                run.use_kept_weights()
                logs.end(summarise_stopped(run, splits, options, folder, save(run)))
                epoch = run.kept.get("epoch")
                what = "its last weights are" if epoch is None else f"epoch {epoch} is"
                usable = f"; {what} there to use"
            raise KeyboardInterrupt(
                f"the state is saved in {folder}; the same command with --resume goes on{usable}"
            ) from None
        calibrate(run, options)
        summary = finish(run, splits, options, folder, save(run) | computed)
        logs.end(summary)
    return run, summary


def summarise_stopped(
    run: Run, splits: Splits, options: TrainOptions, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write summary.json and report.html of a run that is stopped, and return the summary."""
    facts = {"stopped": f"after {run.epoch} of {run.plan.epochs} epochs", **facts}
    summary = summarise(run, splits, options, folder, facts)
    if is_first():
        (folder / FILE).unlink(missing_ok=True)  # an earlier run's findings
        make_report(folder)
    return summary


@torch.no_grad()
def calibrate(run: Run, options: TrainOptions) -> None:
    """With --calibrate, divide the head by the temperature that fits the validation images best.

    Temperature scaling: arXiv:1706.04599.
    """
    if not options.calibrate:
        return
    found = evaluate(run.model, run.validation, bf16=run.plan.bf16)
    run.temperature = temperature(found.probabilities, found.labels)
    for parameter in run.model.head.parameters():
        parameter.div_(run.temperature)
