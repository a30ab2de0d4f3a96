"""A training step of LoRA on a known backbone, beside transformers with PEFT.

`python -m benchmarks.backbone_step FOLDER`, a Hugging Face folder such as DINOv2's. Both adapt each
linear of the blocks with rank 8 and train a head on the same features of the same images by AdamW.
Beside them a step of vitft on smaller images, as the first epochs of `--sizes` take them, and what
no step can do without: the products of the frozen weights with the inputs and with the gradients.
Every round takes each in turn; the medians are compared.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
from benchmarks.results import medians, table, write_result
from vitft import load_model
from vitft.data.named import import_torchvision
from vitft.pictures.images import Images
from vitft.training.loop import synchronize
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step

import_torchvision()  # before PEFT does, which gives up where the operators do not fit

THEIRS = ["query", "key", "value", "dense", "fc1", "fc2", "q_proj", "k_proj", "v_proj", "o_proj"]
COLUMNS = {"step": "", "milliseconds": ".0f", "images_per_second": ".1f", "of peft": ".2f"}


def ours(
    folder: str,
    pixels: Tensor,
    labels: Tensor,
    bf16: bool,
    *,
    layers: tuple[int, ...] = (),
    **options: Any,
) -> Callable[[], float]:
    """Return a function that takes a step of vitft's loop and returns its milliseconds.

    Args:
        layers: numbers of the blocks to adapt; (): all.
        options: others of the plan.
    """
    device = pixels.device
    model = load_model(folder)
    model.resize(pixels.shape[-1])
    model.new_head([str(i) for i in range(10)])
    adapters.inject(model, adapters.LoRAConfig(layers=layers), trainable=("head",)).to(device)
    images = Images(lambda i: pixels[i].cpu(), labels.cpu()).to(device)
    options = {"recorded": device.type == "cuda"} | options
    plan = Plan(
        epochs=1000, batch_size=len(labels), lr=1e-4, weight_decay=0.0, bf16=bf16, **options
    )
    run = Run(model.train(), images, images, plan, Path(tempfile.mkdtemp()))
    step = Step([run], lambda models: models[0])
    return timed(lambda: step([(pixels, labels)]), device)


def peft_model(folder: str, n_classes: int) -> nn.Module:
    """Return a model of transformers for images' classes, adapted by PEFT."""
    import peft
    import transformers

    model: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=n_classes, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in THEIRS if name in there]
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"]
    )
    return peft.get_peft_model(model, config).train()


def theirs(folder: str, pixels: Tensor, labels: Tensor, bf16: bool) -> Callable[[], float]:
    """Return a function that takes a step of transformers and PEFT; it returns milliseconds."""
    device = pixels.device
    model = peft_model(folder, 10).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    images = (pixels.float() / 255 - 0.45) / 0.22

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(images).logits
        F.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, device)


def products(folder: str, pixels: Tensor, bf16: bool) -> Callable[[], float]:
    """Return a function that only multiplies the blocks' weights, forwards and backwards."""
    model = load_model(folder).to(pixels.device)
    model.resize(pixels.shape[-1])
    with torch.no_grad():
        n_tokens = len(pixels) * model.tokens(torch.zeros(1, *pixels.shape[1:])).shape[1]
    weights = [m.weight.detach() for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    weights = [weight.bfloat16() if bf16 else weight for weight in weights]
    widths = {width for weight in weights for width in weight.shape}
    inputs = {width: torch.randn(n_tokens, width).to(weights[0]) for width in widths}

    def step() -> None:
        for weight in weights:
            n_out, n_in = weight.shape
            F.linear(inputs[n_in], weight)
            inputs[n_out] @ weight

    return timed(step, pixels.device)


def timed(step: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Return a function that takes a step and returns its milliseconds."""

    def take() -> float:
        started = time.perf_counter()
        step()
        synchronize(device)
        return 1000 * (time.perf_counter() - started)

    return take


@click.command()
@click.argument("folder")
@click.option("--image-size", default=112, show_default=True)
@click.option("--smaller", default=84, show_default=True, help="The size in the first epochs.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--bf16", is_flag=True, help="Under autocast.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(
    folder: str,
    image_size: int,
    smaller: int,
    batch_size: int,
    rounds: int,
    bf16: bool,
    device: str,
) -> None:
    """Time all in turn and print a table."""
    torch.manual_seed(0)
    shape = (batch_size, 3, image_size, image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    small = F.interpolate(pixels.float(), smaller).to(torch.uint8)
    labels = (torch.arange(batch_size) % 10).to(device)
    steps = {
        "transformers and peft": theirs(folder, pixels, labels, bf16),
        "vitft": ours(folder, pixels, labels, bf16),
        f"vitft, images of {smaller} pixels": ours(folder, small, labels, bf16),
        "products with the frozen weights alone": products(folder, pixels, bf16),
    }
    times = medians(steps, rounds)
    rows = [
        {
            "step": name,
            "milliseconds": median,
            "images_per_second": 1000 * batch_size / median,
            "of peft": median / times["transformers and peft"],
        }
        for name, median in times.items()
    ]
    name = f"backbone_step_{device}_{'bf16' if bf16 else 'fp32'}"
    path = write_result(name, rows, image_size=image_size, batch_size=batch_size, rounds=rounds)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
