"""The whole loop beside one of plain PyTorch, which must end on the same weights."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run

N, BATCH, EPOCHS = 27, 8, 3


def images() -> Images:
    pixels = torch.randint(0, 256, (N, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(N) % 3).to(torch.device("cpu"))


def base() -> VisionTransformer:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=3, dropout=0.0)).double()
    model.mean, model.std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    return model


def cosine(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def oracle(model: nn.Module, data: Images, plan: Plan) -> None:
    """Train `model` as the plan says, in plain PyTorch."""
    matrices = ("wq", "wk", "wv", "wo", "w1", "w2", "head", "patch_embed")
    groups = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = "lora_" in name or (name.split(".")[-2:][0] in matrices and p.ndim == 2)
            ratio = plan.lr_factors.get(name.split(".")[-1], 1.0)
            groups.append({"params": [p], "ratio": ratio, "lr": 0.0})
            groups[-1]["weight_decay"] = plan.weight_decay if matrix else 0.0
    optimizer = torch.optim.AdamW(groups)
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64).view(-1, 1, 1)
    pixels = (data.held.double() / 255 - mean) / std
    n_steps = math.ceil(N / BATCH)
    for epoch in range(EPOCHS):
        order = torch.randperm(
            N, generator=torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
        )
        for step, chosen in enumerate(order.split(BATCH)):
            rate = cosine((epoch * n_steps + step + 0.5) / (EPOCHS * n_steps), plan.warmup)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * rate * group["ratio"]
            logits = model(pixels[chosen])
            smoothing = plan.label_smoothing
            F.cross_entropy(logits, data.labels[chosen], label_smoothing=smoothing).backward()
            if plan.clip:
                nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimizer.step()
            optimizer.zero_grad()


def ends(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


PLAN: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 3e-3, "weight_decay": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "any gradient": {"clip": 0.0},
    "smoothing": {"label_smoothing": 0.2},
    "clipping": {"clip": 0.05},
    "decay": {"weight_decay": 3.0},
    "warmup": {"warmup": 0.5},
    "seed": {"seed": 5},
    "accumulation": {"accumulate": 3},
    "ratio": {"lr_factors": {"lora_b": 16.0}},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_loop_ends_where_plain_pytorch_does(option: str, adapted: bool, tmp_path: Path) -> None:
    data, model = images(), base()
    if adapted:
        config = adapters.LoRAConfig(rank=1, targets=("wq", "w1"))
        adapters.inject(model, config, trainable=("head",))
    same, without, start = copy.deepcopy(model), copy.deepcopy(model), ends(model)
    plan = Plan(**PLAN | OPTIONS[option])
    train(Run(model, data, data.subset(torch.arange(0)), plan, tmp_path))
    oracle(same, data, plan)
    assert (ends(model) - start).abs().mean() > 1e-3
    torch.testing.assert_close(ends(model), ends(same), rtol=0, atol=1e-9)
    oracle(without, data, Plan(**PLAN))
    matters = option != "accumulation" and (adapted or option != "ratio")
    assert bool((ends(same) - ends(without)).abs().max() > 1e-4) is matters
