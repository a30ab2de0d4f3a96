"""Milliseconds a training step, every method in turn: `python -m benchmarks.lora_step`.

The article's sizes, rank 8 on wq wk wv wo, AdamW, random images. Every round takes one step of each
contestant, so that a machine whose speed drifts treats them alike; the medians are compared. A
contestant takes the usual step, of the whole batch through autograd, or the step of vitft's loop
where that is in its name: in parts on a CPU, recorded on CUDA.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch.nn import functional as F

import adapters
from benchmarks.results import medians, table, write_result
from vitft import VisionTransformer, ViTConfig
from vitft.data.named import import_torchvision
from vitft.devices.shares import Rows
from vitft.pictures.images import Images
from vitft.training.loop import synchronize
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step

import_torchvision()  # before PEFT does, which gives up where the operators do not fit
import peft  # noqa: E402

TARGETS = ("wq", "wk", "wv", "wo")
COLUMNS = {
    "method": "",
    "milliseconds": ".0f",
    "of full": ".2f",
    "of full in vitft's loop": ".2f",
    "of peft lora": ".2f",
    "megabytes": ".0f",
}


def full() -> torch.nn.Module:
    """Return the model with everything to train."""
    return VisionTransformer(ViTConfig(dropout=0.0))


def with_peft(use_dora: bool) -> torch.nn.Module:
    """Return the model adapted by PEFT."""
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=[*TARGETS], modules_to_save=["head"], use_dora=use_dora
    )
    return peft.get_peft_model(full(), config)


def with_vitft(config: adapters.LoRAConfig | None) -> torch.nn.Module:
    """Return the model adapted by vitft; None trains the head alone."""
    return adapters.inject(full(), config, trainable=("head",))


CONTESTANTS: dict[str, Callable[[], torch.nn.Module]] = {
    "full": full,
    "peft lora": lambda: with_peft(use_dora=False),
    "vitft lora": lambda: with_vitft(adapters.LoRAConfig(targets=TARGETS)),
    "peft dora": lambda: with_peft(use_dora=True),
    "vitft dora": lambda: with_vitft(adapters.DoRAConfig(targets=TARGETS)),
    "vitft linear": lambda: with_vitft(None),
}
LOOP = " in vitft's loop"
CONTESTANTS |= {
    name + LOOP: make for name, make in CONTESTANTS.items() if not name.startswith("peft")
}


def stepper(
    model: torch.nn.Module, device: str, batch_size: int, bf16: bool
) -> Callable[[], float]:
    """Return a function that takes a training step and returns its milliseconds."""
    model.to(device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1000

    return step


def looper(model: torch.nn.Module, device: str, batch_size: int, bf16: bool) -> Callable[[], float]:
    """Return a function that takes a step of `vitft finetune` and returns its milliseconds."""
    none = Images(lambda i: torch.zeros(0), torch.zeros(0, dtype=torch.long))
    plan = Plan(
        epochs=1,
        batch_size=batch_size,
        lr=1e-4,
        weight_decay=0.01,
        clip=0.0,
        bf16=bf16,
        recorded=device == "cuda",
    )
    assert isinstance(model, VisionTransformer)
    run = Run(model.to(device).train(), none, none, plan, Path(tempfile.gettempdir()))
    run.steps_per_epoch = 1000
    take = Step([run], lambda models: models[0])
    take.rows = Rows(batch_size)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    targets = F.one_hot(torch.randint(10, (batch_size,), device=device), 10).float()

    def step() -> float:
        started = time.perf_counter()
        run.updates.set_lr(1e-4)
        take.learn(images, targets)
        synchronize(run.device)
        return (time.perf_counter() - started) * 1000

    return step


def saved_megabytes(model: torch.nn.Module, device: str, batch_size: int, bf16: bool) -> float:
    """Return what a forward pass keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(batch_size, 3, 32, 32, device=device)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=bf16),
    ):
        logits = model(images)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del logits
    return sum(kept.values()) / 1e6


@click.command()
@click.option("--rounds", default=9, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--bf16", is_flag=True, help="Under autocast.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--only", default=",".join(CONTESTANTS), help="Some of the contestants.")
def main(rounds: int, batch_size: int, bf16: bool, device: str, only: str) -> None:
    """Time the contestants in turn and print a table."""
    torch.manual_seed(0)
    models = {name: CONTESTANTS[name]() for name in only.split(",")}
    steps = {
        name: (looper if name.endswith(LOOP) else stepper)(model, device, batch_size, bf16)
        for name, model in models.items()
    }
    times = medians(steps, rounds)
    rows = [
        {
            "method": name,
            "milliseconds": median,
            "megabytes": saved_megabytes(models[name], device, batch_size, bf16),
            **{
                f"of {other}": median / times[other]
                for other in ("full", "full" + LOOP, "peft lora")
                if other in times
            },
        }
        for name, median in times.items()
    ]
    name = f"lora_step_{device}_{'bf16' if bf16 else 'fp32'}"
    path = write_result(name, rows, batch_size=batch_size, rounds=rounds, peft=peft.__version__)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
