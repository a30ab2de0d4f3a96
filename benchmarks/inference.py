"""Images a second of inference, in turn: base, adapter, adapter switched off, merged, bfloat16.

python -m benchmarks.inference
"""

import copy
import time
from collections.abc import Callable

import click
import torch

import adapters
from benchmarks.results import medians, table, write_result
from vitft import load_model

COLUMNS = {"model": "", "images_per_second": ",.0f", "of base": ".3f"}


@click.command()
@click.option("--base", default="cifar10", show_default=True, help="As in vitft evaluate.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--batch-size", default=500, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--bf16", is_flag=True, help="Also under autocast.")
def main(base: str, rounds: int, batch_size: int, device: str, bf16: bool) -> None:
    """Time a batch through each in turn and print the medians."""
    plain = load_model(base).to(device)
    config = plain.config
    images = torch.randn(
        batch_size, config.n_channels, config.image_size, config.image_size, device=device
    )
    adapted = adapters.inject(
        copy.deepcopy(plain), adapters.LoRAConfig(targets=("wq", "wk", "wv", "wo"))
    ).eval()
    off = copy.deepcopy(adapted)
    merged = adapters.merge(copy.deepcopy(adapted))
    contestants = {"base": plain, "lora": adapted, "lora, switched off": off, "merged": merged}
    if bf16:
        contestants["merged, bf16"] = merged

    def timer(name: str, model: torch.nn.Module) -> Callable[[], float]:
        def forward() -> float:
            started = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled="bf16" in name):
                model(images)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        return forward

    with torch.inference_mode(), adapters.disabled(off):
        timers = {name: timer(name, model) for name, model in contestants.items()}
        times = medians(timers, rounds)
    rows = [
        {
            "model": name,
            "images_per_second": batch_size / median,
            "of base": median / times["base"],
        }
        for name, median in times.items()
    ]
    path = write_result(f"inference_{device}", rows, batch_size=batch_size, rounds=rounds)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
