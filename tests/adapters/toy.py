"""A foreign transformer in float64, nothing of ours, and what the tests of `adapters` do to it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import METHODS, inject
from adapters.config import AdapterConfig

torch.set_num_threads(1)

X = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
IMAGES = torch.randn(12, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.scaled_dot_product_attention(self.wq(x), self.wk(x), self.wv(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Attention()
        self.ffn = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ffn(x)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = ("a", "b", "c")
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(dim=1))


def toy(seed: int = 0) -> Toy:
    """Return a model in float64 whose biases are not zero."""
    torch.manual_seed(seed)
    return Toy().double()


LINEARS = ("wq", "attn.wv", "blocks.1.ffn.0")
TARGETS = {  # of the methods that do not adapt linears only
    "norm": ("norm",),
    "ssf": (*LINEARS, "norm"),
    "bitfit": (*LINEARS, "norm"),
    "adaptformer": ("ffn",),
    "adapterplus": (r"blocks\.\d",),
    "vpt": (r"blocks\.\d",),
}
# every method as it is, and what its options make another function of
KINDS: dict[str, tuple[str, dict[str, object]]] = {method: (method, {}) for method in METHODS} | {
    "vera": ("vera", {"rank": 5}),
    "vera unsaved": ("vera", {"rank": 5, "save_projection": False}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init": "pissa", "rank": 2}),
    "olora": ("lora", {"init": "olora", "rank": 2, "use_rslora": True}),
    "dora of pissa": ("dora", {"init": "pissa", "rank": 2}),
    "patterns": (
        "lora",
        {"rank_pattern": {"wq": 2, r"blocks\.1\.ffn.*": 3}, "alpha_pattern": {"attn.wv": 5.0}},
    ),
    "lokr of thin": ("lokr", {"rank": 1, "decompose_both": True, "decompose_factor": 4}),
    "ia3 of inputs": ("ia3", {"feedforward": ("wv", "ffn.0")}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
WRAPPERS = ("adaptformer", "adapterplus", "vpt")
MERGED = [kind for kind in KINDS if kind not in WRAPPERS]
CONVERTED = ("pissa", "olora", "dora of pissa")


def config(kind: str, **options: object) -> AdapterConfig:
    """Return a small config of a kind."""
    method, own = KINDS[kind]
    return METHODS[method](**{"targets": TARGETS.get(method, LINEARS), **own, **options})


def adapted(kind: str, seed: int = 0) -> Toy:
    """Return an adapted model in eval mode, every trained tensor of which is moved at random."""
    model = inject(toy(seed), config(kind), trainable=("head",)).eval()
    move(model)
    return model


def move(model: nn.Module) -> None:
    """Move every tensor that trains at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def added(model: nn.Module) -> set[str]:
    """Return the keys of an adapted toy that the base does not have."""
    return set(model.state_dict()) - set(toy().state_dict())


def fit(model: nn.Module, steps: int = 3) -> None:
    """Take steps of SGD on whatever trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return everything about a model that a failed or undone call must not have changed."""
    return {
        "modules": [(name, module) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "values": [(n, t.tolist()) for n, t in model.state_dict().items()],
        "attributes": sorted(vars(model)),
        "classes": getattr(model, "classes", None),
    }
