"""What a step promises: to the model, to what was saved, and to several runs at once."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
from tests.shared import TINY, long, some
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.evaluate import evaluate, suitable_batch
from vitft.files import read_tensors
from vitft.optimizers.updates import NotFinite
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training.draws import first_varying_stage
from vitft.training.forward import Pass
from vitft.training.gradients import add_gradients
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step
from vitft.training.stop import Interrupted

CPU = torch.device("cpu")
LABELS = torch.arange(40) % 2


def images(n: int = 40) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 2).to(CPU)


def tiny_model(**options: Any) -> VisionTransformer:
    return VisionTransformer(ViTConfig(**TINY | {"n_classes": 2, "dropout": 0.0} | options))


def new_run(model: VisionTransformer, folder: Path, **options: Any) -> Run:
    plan = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "weight_decay": 0.0} | options
    folder.mkdir(exist_ok=True)
    return Run(model, images(), images(10), Plan(**plan), folder)


def break_at(n: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let step `n`, from 1, have gradients of this value."""
    plain, taken = Run.update, 0

    def update(self: Run) -> None:
        nonlocal taken
        taken += 1
        if taken == n:
            next(iter(self.trainable.values())).grad.fill_(value)  # type: ignore[union-attr]
        plain(self)

    monkeypatch.setattr(Run, "update", update)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_that_is_not_finite_keeps_the_last_good_state(
    tmp_path: Path, value: float, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tiny_model(), tmp_path, save_seconds=1e-9, clip=clip)
    break_at(5, value, monkeypatch)
    message = r"not finite at step 2 of 3 in epoch 2, at learning rate 0\.00\d+; try a smaller --lr"
    with pytest.raises(NotFinite, match=message):
        train(run)
    saved, progress = read_tensors(tmp_path / "state.safetensors")
    assert (progress["epoch"], progress["step"]) == (1, 1)
    assert all(tensor.isfinite().all() for tensor in saved.values() if tensor.is_floating_point())
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_the_remedy_names_what_could_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tiny_model(), tmp_path, clip=0.0, bf16=True)
    break_at(1, float("nan"), monkeypatch)
    with pytest.raises(NotFinite, match=r"--lr than 0\.01 or --clip 1 or --precision fp32"):
        train(run)


class Bypassing(nn.Module):
    """Reads the weights of a block's attention without calling its linears."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = attn.wq, attn.wk, attn.wv, attn.wo

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        return self.wo(self.wv(x[:, :n]) + F.linear(x[:, :n], self._modules["wq"].weight))


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_parameter_without_a_gradient_stops_the_first_step(
    tmp_path: Path, batch_size: int
) -> None:
    torch.set_num_threads(2)
    model = tiny_model()
    for block in model.blocks:
        block.attn = Bypassing(block.attn)
    config = adapters.LoRAConfig(targets=("wq", "wv"), rank=2)
    adapters.inject(model, config, trainable=("head",))
    with pytest.raises(ValueError, match=r"no gradient reaches 'blocks\.0\.attn\.wq\.lora_a'"):
        train(new_run(model, tmp_path, batch_size=batch_size))


def test_the_model_is_called_so_that_hooks_on_it_run(tmp_path: Path) -> None:
    model, calls = tiny_model(), []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    run = new_run(model, tmp_path, epochs=1)
    run.validation_inputs = run.validation = images(0)
    train(run)
    assert calls == [True] * 3


def test_what_trains_is_settled_when_the_run_is_made(tmp_path: Path) -> None:
    run = new_run(tiny_model(), tmp_path)
    run.model.new_head(("a", "b"))
    with pytest.raises(ValueError, match="other trainable parameters than when the run was made"):
        train(run)


def test_a_stopped_run_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().eval()
    model.blocks[1].train()
    adapters.inject(model, adapters.LoRAConfig(layers=(1,)), trainable=("head",))
    modes = [module.training for module in model.modules()]
    run = new_run(model, tmp_path, n_cached=9)
    step = Step.__call__

    def stop(self: Step, *batches: Any) -> None:
        step(self, *batches)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", stop)
    with pytest.raises(Interrupted):
        train(run)
    assert [module.training for module in model.modules()] == modes
    assert run.inputs is run.train
    assert evaluate(model, run.validation).probabilities.shape == (10, 2)
    smaller = new_run(tiny_model(), tmp_path, sizes=((4, 0.5),))
    with pytest.raises(Interrupted):
        train(smaller)
    assert smaller.model.image_size == 8


def test_a_run_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    model, data = tiny_model(), images()
    torch.manual_seed(7)
    plan = Plan(epochs=1, batch_size=8, lr=1e-3, weight_decay=0.0)
    Run(model, data, data, plan, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_more_is_not_cached_than_is_frozen(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(new_run(model, tmp_path, n_cached=3))
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize(
    "options", [{"augmentation": Augmentation(flip=True)}, {"sizes": ((4, 0.5),)}]
)
def test_features_of_changing_images_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="n_cached=2 computes features of unchanged images"):
        Plan(epochs=1, batch_size=8, lr=1e-3, weight_decay=0.0, n_cached=2, **options)


class DropPath(nn.Module):
    """Drops whole paths, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), 1, 1).bernoulli_(0.5) if self.training else x


RANDOM = [nn.Dropout(0.1), nn.Dropout1d(0.1), nn.AlphaDropout(0.1), nn.RReLU(), DropPath()]


@pytest.mark.parametrize("module", some(RANDOM, 4), ids=lambda module: type(module).__name__)
def test_any_random_module_gives_one_result_with_any_number_of_threads(
    tmp_path: Path, module: nn.Module
) -> None:
    ends = []
    for n_threads in (1, 2, 2):
        torch.set_num_threads(n_threads)
        torch.manual_seed(0)
        model = tiny_model()
        model.blocks[1].ffn = nn.Sequential(module, model.blocks[1].ffn)
        before = torch.get_rng_state()
        assert first_varying_stage(model) == 2
        assert torch.equal(torch.get_rng_state(), before)
        train(new_run(model, tmp_path, batch_size=32))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    assert torch.equal(ends[1], ends[2])


def test_gradients_are_held_once() -> None:
    weights = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in "abc"})
    one, wide = torch.ones(3), torch.ones(1).expand(3)
    add_gradients(dict(weights), [one, one, wide])
    assert weights.a.grad is one
    assert weights.b.grad is not one  # one tensor for two parameters
    assert weights.c.grad.is_contiguous()
    add_gradients(dict(weights), [torch.ones(3), None, torch.ones(3)])
    assert [p.grad.tolist() for p in weights.values()] == [[2.0] * 3, [1.0] * 3, [2.0] * 3]


@long
@pytest.mark.parametrize("n", some([3, 2], 2))
def test_runs_together_take_smaller_images_first_as_alone(tmp_path: Path, n: int) -> None:
    base, plan = tiny_model(), {"sizes": ((4, 0.5),), "batch_size": 8, "accumulate": 2}

    def member(i: int) -> VisionTransformer:
        torch.manual_seed(i)
        model = adapters.shared_copy(base)
        return adapters.inject(model, adapters.LoRAConfig(rank=2), trainable=("head",))

    def runs(kind: str) -> list[Run]:
        torch.manual_seed(9)
        made = [new_run(member(i), tmp_path / f"{kind}{i}", **plan) for i in range(n)]
        for run in made:
            run.train = run.inputs = made[0].train
            run.validation = run.validation_inputs = made[0].validation
        return made

    together, alone = runs("together"), runs("alone")
    assert train(together, lambda models: adapters.together(base, models)) == {}
    for run in alone:
        train(run)
    for one, other in zip(together, alone, strict=True):
        assert one.history[0]["train_loss"] == pytest.approx(other.history[0]["train_loss"], 1e-5)
        for key, p in one.trainable.items():
            torch.testing.assert_close(p, other.trainable[key], rtol=0, atol=1e-4)


def test_runs_that_cannot_train_together_are_refused(tmp_path: Path) -> None:
    one, two = (new_run(tiny_model(), tmp_path, clip=clip) for clip in (0.0, 1.0))
    with pytest.raises(ValueError, match="2 runs need join"):
        train([one, two])
    with pytest.raises(ValueError, match="differ in lr and seed only"):
        train([one, two], lambda models: models[0])
    with pytest.raises(ValueError, match="there is no run to train"):
        train([])


def test_batches_of_evaluation_follow_the_size_of_the_images() -> None:
    sizes = {"dim": 768, "hidden_dim": 3072, "n_heads": 12, "n_layers": 1, "patch_size": 16}
    with torch.device("meta"):
        large = VisionTransformer(ViTConfig(**sizes, image_size=224))
        assert suitable_batch(VisionTransformer(ViTConfig())) == 500
        assert suitable_batch(large) == 2**26 // (196 * 3072)
        large.resize(448)
        assert suitable_batch(large) == 2**26 // (784 * 3072)


def test_evaluation_gives_every_module_its_mode_back_and_knows_large_losses() -> None:
    model = tiny_model().train()
    model.blocks[0].eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1000.0, 0.0]))
    found = evaluate(model, images(10))
    assert not model.blocks[0].training
    assert model.blocks[1].training
    assert found.loss == pytest.approx(500, abs=5)  # half of the images are of class 1
    assert found.accuracy == 0.5


def kept_bytes(run: Run) -> int:
    """Return the bytes that a forward pass of the run's step keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    step = Step([run], lambda models: models[0])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step.backward.forward(torch.randn(16, 3, 8, 8))
    return sum(kept.values())


@pytest.mark.parametrize("config", [None, adapters.LoRAConfig(rank=2, dropout=0.3)])
def test_blocks_computed_again_give_the_same_with_less_memory(
    tmp_path: Path, config: adapters.AdapterConfig | None
) -> None:
    ends, bytes_kept = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = tiny_model(n_layers=4)
        if config:
            adapters.inject(model, config, trainable=("head",))
        run = new_run(model, tmp_path, checkpoint_blocks=again)
        run.train = run.inputs = Images(lambda i: torch.full((3, 8, 8), i).byte(), LABELS).to(CPU)
        run.steps_per_epoch = 3
        bytes_kept.append(kept_bytes(run))
        train(run)
        ends.append(torch.cat([p.detach().flatten() for p in run.trainable.values()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    assert bytes_kept[1] < 0.5 * bytes_kept[0]


def test_blocks_computed_again_stand_in_the_pass_of_the_model(tmp_path: Path) -> None:
    run, seen = new_run(tiny_model(), tmp_path, checkpoint_blocks=True), list[int]()
    plain = run.model.run

    def method(*arguments: Any, **options: Any) -> Tensor:
        seen.append(len(arguments[0]))  # FSDP2 gathers the parameters in such a method
        return plain(*arguments, **options)

    vars(run.model)["run"] = method
    Pass(run, 0)(torch.randn(3, 3, 8, 8))
    assert seen == [3]


def test_blocks_before_the_first_adapter_keep_nothing_for_the_backward_pass(tmp_path: Path) -> None:
    kept = {}
    for layers in ((), (7,)):
        model = tiny_model(n_layers=8)
        adapters.inject(model, adapters.LoRAConfig(rank=2, layers=layers), trainable=("head",))
        kept[layers] = kept_bytes(new_run(model, tmp_path))
    assert kept[7,] < kept[()] / 4
