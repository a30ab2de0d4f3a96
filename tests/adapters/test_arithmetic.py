"""Sums of adapters are sums of their true updates; the LoRA of a full tune is the closest one."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from adapters import combine, diff, eject, inject, load_adapter, merge, save_adapter
from adapters.folder import read_adapter
from adapters.many.factors import A, closest
from tests.adapters.toy import Toy, X, adapted, config, move, toy

KINDS = ("lora", "rslora", "patterns", "pissa")
every_kind = pytest.mark.parametrize("kind", KINDS)


def saved(kind: str, folder: Path, seed: int = 0, **options: object) -> Path:
    torch.manual_seed(seed)
    model = inject(toy(), config(kind, **options), trainable=("head",))
    torch.manual_seed(seed + 100)
    move(model)
    model.classes = (kind, "b", "c")
    save_adapter(model, folder)
    return folder


def update(model: Toy, name: str = "blocks.1.ffn.0") -> Tensor:
    """Return what merging adds to a weight."""
    merged = merge(copy.deepcopy(model))
    return merged.get_submodule(name).weight - toy().get_submodule(name).weight


@every_kind
@pytest.mark.parametrize("how", ["cat", "svd", "ties", "dare"])
def test_one_adapter_with_weight_one_is_itself(kind: str, how: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "a")
    combine([folder], [1.0], how=how, density=1.0).save(tmp_path / "b")
    one, two = (load_adapter(toy(), tmp_path / name) for name in "ab")
    torch.testing.assert_close(two(X), one(X), rtol=0, atol=1e-10)
    assert one.classes == two.classes == (kind, "b", "c")


def test_concatenation_is_the_exact_weighted_sum(tmp_path: Path) -> None:
    folders = [saved(kind, tmp_path / kind, seed) for seed, kind in enumerate(KINDS[:3])]
    folders[0] = saved("lora", tmp_path / "few", rank=3, targets=("wq", "blocks.1.ffn.0"))
    weights = [0.5, -2.0, 1.5]
    with pytest.raises(ValueError, match="other classes or heads; choose whose by head_of"):
        combine(folders, weights)
    total = load_adapter(toy(), combine(folders, weights, head_of=1))  # rank 3 + 8 + 3, of 8
    parts = [update(load_adapter(toy(), folder)) for folder in folders]
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(update(total), expected, rtol=0, atol=1e-12)
    assert total.classes == ("rslora", "b", "c")


def test_the_rank_of_a_concatenation_is_the_sum_of_the_ranks(tmp_path: Path) -> None:
    folders = [saved("lora", tmp_path / str(rank), rank=rank) for rank in (1, 2)]
    both = combine(folders, [1, 1])
    assert {len(t) for key, t in both.tensors.items() if key.endswith(A)} == {3}
    assert both.config["r"] == both.config["lora_alpha"] == 3
    assert not both.config.get("rank_pattern")


def test_a_combination_is_of_the_adapters_base(tmp_path: Path) -> None:
    both = combine([saved("lora", tmp_path / "a"), saved("lora", tmp_path / "b", 1)], [1, 1])
    assert both.fingerprint == read_adapter(tmp_path / "a").fingerprint is not None
    with pytest.raises(ValueError, match="trained on the base"):
        load_adapter(toy(seed=1), both)


def test_two_adapters_of_other_classes_need_a_choice(tmp_path: Path) -> None:
    folders = [saved(kind, tmp_path / kind) for kind in ("lora", "rslora")]
    message = "^the adapters have other classes or heads; choose whose by head_of=0, 1$"
    with pytest.raises(ValueError, match=message):
        combine(folders, [1, 1])
    assert combine(folders, [1, 1], head_of=1).classes == ("rslora", "b", "c")


def test_a_combination_prepares_images_as_its_adapters_do(tmp_path: Path) -> None:
    for name, size in (("a", 8), ("b", 8), ("c", 9)):
        model = toy()
        model.preprocessing = {"image_size": size}
        save_adapter(inject(model, config("lora"), trainable=("head",)), tmp_path / name)
    save_adapter(inject(toy(), config("lora"), trainable=("head",)), tmp_path / "d")  # as PEFT's
    base, folders = toy(), [tmp_path / name for name in "abcd"]
    base.preprocessing = {"image_size": 7}
    for some, index in (("ab", None), ("da", None), ("ca", 1)):
        both = combine([tmp_path / name for name in some], [1, 1], head_of=index)
        assert load_adapter(copy.deepcopy(base), both).preprocessing == {"image_size": 8}
    assert combine(folders, [1] * 4, head_of=3).preprocessing is None
    message = "^the adapters prepare images otherwise; choose whose way by head_of=0, 1$"
    with pytest.raises(ValueError, match=message):
        combine(folders, [1] * 4)


def test_svd_is_the_closest_of_its_rank(tmp_path: Path) -> None:
    folders = [saved("lora", tmp_path / str(seed), seed) for seed in (1, 2)]
    total = sum(update(load_adapter(toy(), folder)) for folder in folders)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    for n in (1, 3):
        found = update(load_adapter(toy(), combine(folders, [1, 1], how="svd", rank=n)))
        torch.testing.assert_close(found, u[:, :n] * s[:n] @ v[:n], rtol=0, atol=1e-10)


def test_ties_keeps_the_largest_and_lets_the_sign_be_elected(tmp_path: Path) -> None:
    folders = [saved("lora", tmp_path / str(seed), seed) for seed in (1, 2)]
    combined = combine(folders, [1, 1], how="ties", density=0.25, rank=8)
    found = update(load_adapter(toy(), combined))
    parts = [update(load_adapter(toy(), folder)) for folder in folders]
    trimmed = []
    for part in parts:
        least = part.abs().flatten().sort(descending=True).values[part.numel() // 4 - 1]
        trimmed.append(part * (part.abs() >= least - 1e-12))
    expected = torch.zeros_like(parts[0])
    for place in torch.cartesian_prod(torch.arange(12), torch.arange(8)):
        values = [part[tuple(place)] for part in trimmed]
        agreeing = [v for v in values if v * sum(values) > 0]
        expected[tuple(place)] = sum(agreeing) / max(len(agreeing), 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_ties_takes_ones_for_numbers_like_others(tmp_path: Path) -> None:
    model = inject(toy(), config("lora", rank=1, alpha=1), trainable=("head",))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("head"):
                parameter.fill_(1.0)
    save_adapter(model, tmp_path)
    found = update(load_adapter(toy(), combine([tmp_path], [1], how="ties", density=1.0)))
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-9)


def test_dare_keeps_the_mean(tmp_path: Path) -> None:
    folder = saved("lora", tmp_path / "a")
    expected = update(load_adapter(toy(), folder))
    drawn = [
        update(load_adapter(toy(), combine([folder], [1], how="dare", seed=seed, rank=8)))
        for seed in range(40)
    ]
    kept = torch.stack(drawn)
    share = (kept.abs() > 1e-9).double().mean()
    assert 0.45 < share < 0.55
    error = (kept.mean(dim=0) - expected).abs().max()
    assert error < 5 * expected.abs().max() / 40**0.5
    again = update(load_adapter(toy(), combine([folder], [1], how="dare", seed=7, rank=8)))
    assert torch.equal(again, drawn[7])
    default = update(load_adapter(toy(), combine([folder], [1], how="dare", rank=8)))
    assert torch.equal(default, drawn[0])


def test_peft_reads_a_combination(tmp_path: Path) -> None:
    folders = [saved("lora", tmp_path / "a", rank=2), saved("rslora", tmp_path / "b", rank=3)]
    combine(folders, [1.0, 0.5], head_of=0).save(tmp_path / "both")
    ours = load_adapter(toy(), tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path / "both")
    torch.testing.assert_close(theirs(X), ours(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2]}, "1 folders and 2 weights; give one for each"),
        ({"weights": [float("nan")]}, "are not all finite"),
        ({"how": "mean"}, "how='mean' is unknown; choose from cat, svd, ties, dare"),
        ({"density": 1.5}, "density=1.5 is not in 0 < density <= 1"),
        ({"density": 0}, "density=0 is not in 0 < density <= 1"),
        ({"rank": 0, "how": "svd"}, "rank=0 is not positive"),
        ({"rank": 3}, "rank=3 is not positive, or given for how='cat'"),
        ({"head_of": 1}, "head_of=1 is no place in 1 folders, from 0"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = saved("lora", tmp_path)
    with pytest.raises(ValueError, match=message):
        combine([folder], **{"weights": [1.0], **options})


def test_other_methods_and_other_bases_are_refused(tmp_path: Path) -> None:
    save_adapter(adapted("dora"), tmp_path / "dora")
    with pytest.raises(ValueError, match="dora is no LoRA adapter, whose updates can be added up"):
        combine([tmp_path / "dora"], [1])
    save_adapter(adapted("lora", seed=1), tmp_path / "other")
    folder = saved("lora", tmp_path / "a")
    message = "^the adapters are of different bases: [0-9a-f]{16}, [0-9a-f]{16}$"
    with pytest.raises(ValueError, match=message):
        combine([folder, tmp_path / "other"], [1, 1])
    one = read_adapter(folder)
    lost = next(key for key in one.tensors if key.endswith("lora_B.weight"))
    fewer = {key: t for key, t in one.tensors.items() if key != lost}
    replace(one, tensors=fewer).save(tmp_path / "fewer")
    with pytest.raises(ValueError, match=f"fewer: tensor {re.escape(lost)} is missing"):
        combine([tmp_path / "fewer"], [1])


def test_the_lora_of_a_full_tune_keeps_what_its_rank_can(tmp_path: Path) -> None:
    tuned = toy()
    tuned.head = nn.Linear(8, 5).double()
    tuned.classes = tuple("vwxyz")
    with torch.no_grad():
        for module in (tuned.blocks[0].attn.wq, tuned.blocks[1].ffn[0]):
            module.weight.add_(torch.randn_like(module.weight))
    shares = []
    for rank in (2, 4, 8):
        model, kept = diff(toy(), tuned, rank=rank)
        assert kept.keys() == {"blocks.0.attn.wq", "blocks.1.ffn.0", "all"}
        shares.append(kept["all"])
        change = tuned.blocks[1].ffn[0].weight - toy().blocks[1].ffn[0].weight
        left = (change - update(model)).square().sum() / change.square().sum()
        assert kept["blocks.1.ffn.0"] == pytest.approx(1 - left.item(), abs=1e-9)
        save_adapter(model, tmp_path)
        torch.testing.assert_close(load_adapter(toy(), tmp_path)(X), model(X))
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] == pytest.approx(1)
    torch.testing.assert_close(model(X), tuned(X), rtol=0, atol=1e-10)
    assert model.classes == tuple("vwxyz")
    assert torch.equal(eject(model)(X), toy()(X))


def test_a_module_that_is_taken_over_is_meant_by_its_whole_name(tmp_path: Path) -> None:
    class Normed(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)  # as those of its blocks end

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.blocks(self.embed(x))).mean(dim=1))

    torch.manual_seed(0)
    base = Normed().double()
    tuned = copy.deepcopy(base)
    nn.init.normal_(tuned.norm.weight)
    nn.init.normal_(tuned.blocks[0].attn.wq.weight)
    model, _ = diff(copy.deepcopy(base), tuned)
    torch.testing.assert_close(model(X), tuned(X), rtol=0, atol=1e-10)
    assert not model.blocks[0].norm.weight.requires_grad
    assert model.norm.weight.requires_grad
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(X), tuned(X), rtol=0, atol=1e-10)


def test_a_parameter_beside_modules_is_held_by_no_adapter() -> None:
    class Scaled(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.scale = nn.Parameter(torch.ones(8))  # of a module with children

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.blocks(self.embed(x)) * self.blocks.scale).mean(dim=1))

    base = Scaled().double()
    tuned = copy.deepcopy(base)
    nn.init.normal_(tuned.blocks.scale)
    nn.init.normal_(tuned.blocks[0].attn.wq.weight)
    with pytest.raises(ValueError, match="blocks.scale changed, which no adapter holds"):
        diff(copy.deepcopy(base), tuned)
    _, kept = diff(copy.deepcopy(base), tuned, lossy=True)
    assert kept["blocks.scale"] == 0


def test_models_that_do_not_differ_or_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no linear differs between the two models"):
        diff(toy(), toy())
    other = toy()
    other.blocks[0].attn.wq = nn.Identity()
    with pytest.raises(ValueError, match="'blocks.0.attn.wq.bias' is not the same parameter"):
        diff(toy(), other)


def test_nothing_to_keep_is_kept_whole() -> None:
    (a, b), share = closest(torch.zeros(3, 4), 2)
    assert share == 1
    assert not (b @ a).any()
