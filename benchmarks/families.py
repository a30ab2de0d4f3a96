"""How far our models are from their sources', a family a row: `python -m benchmarks.families`.

Small models of transformers and timm with random weights, converted from the folders that the
libraries write; the largest difference of tokens, and of logits or what stands for them, on noise.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.results import table, write_result
from tests.families.sources import HF, TIMM, hf_model, timm_model
from vitft import load_model

COLUMNS = {"library": "", "family": "", "float32": ".1e", "float64": ".1e"}


def outputs(model: Any, library: str, name: str, images: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return a source's tokens, None where it gives none, and its logits, pooled or all tokens."""
    if library == "timm":
        return model.forward_features(images), model(images)
    noise = {"noise": torch.arange(16.0).expand(len(images), 16)} if name == "mae" else {}
    found = model(images, **noise)
    tokens = getattr(found, "last_hidden_state", None)
    logits = getattr(found, "logits", getattr(found, "image_embeds", None))
    return tokens, tokens if logits is None else logits


@torch.no_grad()
def difference(library: str, name: str, dtype: torch.dtype) -> float:
    """Return the largest difference of a family's tokens and logits."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        make = timm_model if library == "timm" else hf_model
        theirs = make(name, Path(folder)).to(dtype)
        ours = load_model(folder).to(dtype)
    images = images.to(dtype)
    tokens, logits = outputs(theirs, library, name, images)
    worst = 0.0 if tokens is None else (ours.tokens(images) - tokens).abs().max().item()
    for mine in (ours.tokens(images), ours(images), ours.features(images)):
        if mine.shape == logits.shape:
            near = (mine - logits).abs().max().item()
            return max(worst, near)
    raise ValueError(f"{library} {name} gives {tuple(logits.shape)}, which is nothing of ours")


@click.command()
def main() -> None:
    """Compare every family and print a table."""
    rows = []
    for library, names in (("transformers", HF), ("timm", TIMM)):
        for name in names:
            row: dict[str, Any] = {"library": library, "family": name}
            for dtype in (torch.float32, torch.float64):
                row[str(dtype)[6:]] = difference(library, name, dtype)
            rows.append(row)
            click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result("families", rows)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
