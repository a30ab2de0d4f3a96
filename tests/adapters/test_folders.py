"""Folders of PEFT's and of third parties, damaged ones, and several that write to one at once."""

import copy
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters.folder import read_adapter
from adapters.methods.lora import LoRAConfig, LoRALinear
from tests.adapters.toy import KINDS, X, adapted, config, toy


def nested() -> nn.Module:
    """Return a model whose head holds a linear called as one outside it, and two norms."""
    torch.manual_seed(0)
    head = OrderedDict(fc1=nn.Linear(8, 8), act=nn.GELU(), fc2=nn.Linear(8, 3))
    parts = {"fc1": nn.Linear(8, 8), "a_norm": nn.LayerNorm(8), "norm": nn.LayerNorm(8)}
    return nn.Sequential(OrderedDict(**parts, myfc2=nn.Linear(8, 8), head=nn.Sequential(head)))


def by_peft(config: Any, folder: Path) -> nn.Module:
    """Return the model adapted by PEFT, saved to the folder."""
    model = peft.get_peft_model(nested(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


LORA = {"r": 2, "init_lora_weights": False}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["fc1"], modules_to_save=["head"], **LORA),
        peft.LoraConfig(target_modules="all-linear", modules_to_save=["head"], **LORA),
        peft.LoraConfig(target_modules=["fc1"], modules_to_save=["norm"], **LORA),
        peft.LoraConfig(target_modules=["myfc2"], modules_to_save=["norm", "head"], **LORA),
        peft.LoraConfig(target_modules=["fc1", "no_such"], **LORA),
        peft.LoraConfig(target_modules=["fc1"], r=2, init_lora_weights="orthogonal"),
        peft.LoraConfig(target_modules=["fc1"], r=2, init_lora_weights="mica"),
        peft.IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=r".*\.fc2"),
        peft.IA3Config(target_modules=["myfc2", "fc2"], feedforward_modules=["fc2"]),
    ],
)
def test_what_peft_saves_means_what_it_means_to_peft(config: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = by_peft(config, tmp_path)
    loaded = adapters.load_adapter(nested(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    adapters.save_adapter(loaded, tmp_path / "again")
    again = adapters.load_adapter(nested(), tmp_path / "again")
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("config", "trainable"),
    [
        (LoRAConfig(targets=("fc1",), rank=2), ("norm",)),
        (adapters.IA3Config(targets=("head.fc2", "myfc2"), feedforward=("head.fc2",)), ()),
        (adapters.IA3Config(targets=("fc2", "myfc2"), feedforward=("fc2",)), ()),
        (adapters.IA3Config(targets=("fc1", "fc2", "myfc2"), feedforward=("fc1", "fc2")), ()),
    ],
)
def test_names_that_end_alike_mean_the_same_to_peft(
    config: Any, trainable: tuple[str, ...], tmp_path: Path
) -> None:
    model, x = adapters.inject(nested(), config, trainable), torch.randn(4, 8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    adapters.save_adapter(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(nested(), tmp_path)(x), model(x))
    again = adapters.load_adapter(nested(), tmp_path, train=True)
    torch.testing.assert_close(again(x), model(x))
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert names[0] == names[1]


def test_names_of_targets_come_in_a_list() -> None:
    written = {"target_modules": ".*fc2", "feedforward_modules": ["fc2"]}
    with pytest.raises(ValueError, match=r"targets='.\*fc2' is one string; write \('.\*fc2',\)"):
        adapters.IA3Config.from_peft(written)


def test_leftover_settings_of_a_start_are_no_hindrance(tmp_path: Path) -> None:
    eva = peft.EvaConfig()
    made = peft.LoraConfig(target_modules=["fc1"], init_lora_weights="eva", eva_config=eva, r=2)
    made.init_lora_weights, x = True, torch.randn(4, 8)
    model = by_peft(made, tmp_path)
    assert read_adapter(tmp_path).config["eva_config"]
    torch.testing.assert_close(adapters.load_adapter(nested(), tmp_path)(x), model(x))


@pytest.mark.parametrize("start", ["pissa", "corda", "olora", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start: str) -> None:
    message = (
        f"option init_lora_weights={start!r} changes the base's weights; convert it with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LoRAConfig.from_peft({"target_modules": ["wq"], "init_lora_weights": start})


class FrozenA(LoRALinear):
    """LoRA whose A stays what it was drawn as."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lora_a.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class FrozenAConfig(LoRAConfig):
    layer = FrozenA


def test_a_method_of_a_third_party_comes_back_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FrozenAConfig(targets=("wq",), rank=2, lr_ratio=16)
    model = adapters.inject(toy(), made, trainable=("head",))
    adapters.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the method 'FrozenAConfig', which is not known here"):
        adapters.load_adapter(toy(), tmp_path)
    methods = {"FrozenAConfig": FrozenAConfig}
    again = adapters.load_adapter(toy(), tmp_path, train=True, methods=methods)
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, again)]
    assert trained[0] == trained[1]
    record = vars(again)["_injection"]
    assert record.config == made
    assert record.config.lr_factors() == {"lora_b": 16}
    monkeypatch.setitem(adapters.METHODS, "lora-fa", FrozenAConfig)
    adapters.save_adapter(again, tmp_path / "named")
    assert read_adapter(tmp_path / "named").method == "lora-fa"
    adapters.load_adapter(toy(), tmp_path / "named")


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_comes_back_with_its_options(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    adapters.save_adapter(model, tmp_path)
    before = vars(model)["_injection"].config
    after = vars(adapters.load_adapter(toy(), tmp_path, train=True))["_injection"].config
    assert type(after) is type(before)
    assert after.lr_factors() == before.lr_factors()
    if "olora" not in kind and "pissa" not in kind:  # those have become plain, of twice the rank
        assert after.to_peft() == before.to_peft()
        assert kind.startswith("ia3") or after == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(value: float, tmp_path: Path) -> None:
    model = adapted("lora")
    adapters.save_adapter(model, tmp_path)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    with torch.no_grad():
        model.blocks[0].attn.wq.lora_b[0, 0] = value
    with pytest.raises(ValueError, match=r"wq\.lora_B\.weight has values that are not finite; n"):
        adapters.save_adapter(model, tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_several_may_save_to_one_folder_at_once(tmp_path: Path) -> None:
    models = [adapted("lora", seed=i) for i in range(3)]
    failures: list[BaseException] = []

    def save(model: nn.Module) -> None:
        try:
            for _ in range(20):
                adapters.save_adapter(model, tmp_path)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len([*tmp_path.iterdir()]) == 2
    read_adapter(tmp_path)


def embedding(folder: Path, targets: list[str]) -> Path:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    made = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(base, made).save_pretrained(folder)
    return folder


def test_a_combination_loses_nothing_in_silence(tmp_path: Path) -> None:
    both = embedding(tmp_path / "both", ["0", "1"])
    with pytest.raises(ValueError, match="lora_embedding_A is no factor of a linear, and would be"):
        adapters.combine([both], [1.0])
    heads = []
    for n in (2, 5):
        base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, n))
        made = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
        heads.append(tmp_path / str(n))
        peft.get_peft_model(base, made).save_pretrained(heads[-1])
    with pytest.raises(ValueError, match="other classes or heads; choose whose by head_of=0, 1"):
        adapters.combine(heads, [1, 1])
    kept = adapters.combine(heads, [1, 1], head_of=1).tensors["base_model.model.1.weight"]
    assert kept.shape == (5, 8)


def changed(names: tuple[str, ...]) -> nn.Module:
    tuned = toy()
    with torch.no_grad():
        for name in names:
            tuned.get_parameter(name).add_(torch.randn_like(tuned.get_parameter(name)))
    return tuned


def test_a_difference_takes_over_what_is_no_linear(tmp_path: Path) -> None:
    tuned = changed(("blocks.0.attn.wq.weight", "blocks.1.norm.weight", "head.weight"))
    model, kept = adapters.diff(toy(), tuned, rank=8)
    assert kept["all"] == pytest.approx(1)
    torch.testing.assert_close(model(X), tuned(X), rtol=0, atol=1e-10)
    adapters.save_adapter(model, tmp_path)
    torch.testing.assert_close(adapters.load_adapter(toy(), tmp_path)(X), tuned(X))


def test_a_difference_says_what_no_adapter_holds() -> None:
    tuned = changed(("blocks.0.attn.wq.weight", "blocks.0.attn.wq.bias"))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.wq\.bias changed, which no adapter"):
        adapters.diff(toy(), copy.deepcopy(tuned))
    _, kept = adapters.diff(toy(), tuned, rank=8, lossy=True)
    before, after = toy().blocks[0].attn.wq, tuned.blocks[0].attn.wq

    def energy(a: Tensor, b: Tensor) -> float:
        return (a - b).square().sum().item()

    weight = energy(after.weight, before.weight)
    whole = weight + energy(after.bias, before.bias)
    assert kept["blocks.0.attn.wq.bias"] == 0
    assert kept["all"] == pytest.approx(weight / whole)


def test_a_bank_knows_its_slots_and_its_head(tmp_path: Path) -> None:
    adapters.save_adapter(adapted("lora"), tmp_path)
    bank = adapters.Bank(toy(), [tmp_path])
    for ids in ([-1, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"are not all in 0 <= id < 2"):
            bank(X, torch.tensor(ids))
    with pytest.raises(ValueError, match="the model has no 'classifier'; give as head"):
        adapters.Bank(toy(), [tmp_path], head="classifier")


def test_a_16_bit_bank_gives_nearly_what_its_adapters_do(tmp_path: Path) -> None:
    folders = []
    for kind in ("lora", "dora", "ssf", "ia3"):
        model = adapters.inject(toy().bfloat16(), config(kind), trainable=("head",))
        folders.append(tmp_path / kind)
        adapters.save_adapter(model, folders[-1])
    bank, x = adapters.Bank(toy().bfloat16(), folders), X.bfloat16()
    for i, folder in enumerate(folders, start=1):
        alone = adapters.load_adapter(toy().bfloat16(), folder)
        ids = torch.full((len(x),), i)
        torch.testing.assert_close(bank(x, ids), alone(x), rtol=0.05, atol=0.05)
