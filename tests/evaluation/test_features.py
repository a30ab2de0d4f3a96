"""What frozen stages compute once is what they would compute in every epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import adapters
from tests.shared import TINY, TINY_FLAGS
from tests.shared import Run as Command
from vitft import VisionTransformer, ViTConfig, save_model
from vitft.evaluation.features import extract, feature_bytes, n_frozen
from vitft.files import read_tensors
from vitft.pictures.images import Images
from vitft.training.epochs import finish_epoch
from vitft.training.run import Run
from vitft.training.saving import save

N_STAGES = 5  # embed, two blocks, pool, head


def images(n: int = 12) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 3)


@pytest.fixture(scope="module")
def base(vitft: Command, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "base"
    vitft("pretrain", "--data", folder, "--out", out, "--epochs=1", *TINY_FLAGS)
    return out


@pytest.mark.parametrize("first", range(N_STAGES + 1))
def test_the_stages_compose_to_the_model(tiny: VisionTransformer, first: int) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert len(tiny.stages()) == N_STAGES
    assert torch.equal(tiny.run(tiny.run(x, last=first), first), tiny(x))


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [(("wq",), (), 1), (("wv", "w1"), (1,), 2), (None, (), 4)],
)
def test_what_comes_before_the_first_trained_parameter_is_frozen(
    tiny: VisionTransformer, targets: Any, layers: tuple[int, ...], expected: int
) -> None:
    config = targets and adapters.LoRAConfig(targets=targets, layers=layers, rank=2)
    assert n_frozen(adapters.inject(tiny, config, trainable=("head",))) == expected


def test_nothing_is_frozen_before_inject_or_where_dropout_is_at_work(
    tiny: VisionTransformer,
) -> None:
    assert n_frozen(tiny) == 0
    dropping = VisionTransformer(ViTConfig(**TINY, dropout=0.1))
    assert n_frozen(adapters.inject(dropping, None, trainable=("head",))) == 0


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("max_bytes", [0, 10**9])
def test_features_are_what_the_stages_make_in_memory_or_in_a_file(
    tiny: VisionTransformer, n_stages: int, max_bytes: int, tmp_path: Path
) -> None:
    model, some = tiny.float(), images()
    options = {"folder": tmp_path, "batch_size": 5, "max_bytes": max_bytes}
    found = extract(model, some, n_stages, **options)
    assert found.held is not None
    assert (found.held.untyped_storage().filename is None) is (max_bytes > 0)
    every = model.normalize(torch.stack([some.decode(i) for i in range(12)]))
    torch.testing.assert_close(found.held, model.run(every, last=n_stages), rtol=0, atol=1e-6)
    assert found.held[0].numel() * 4 == feature_bytes(model, n_stages)
    assert found.labels is some.labels
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--adapter=linear"], ["--adapter=lora", "--layers=1"]])
def test_with_and_without_the_cache_the_result_is_the_same(
    vitft: Command, folder: Path, base: Path, tmp_path: Path, options: list[str]
) -> None:
    common = ["finetune", "--base", base, "--data", folder, "--epochs=3", "--batch-size=8"]
    tensors = {}
    for cache, stages in (("--cache-features", 1), ("--no-cache-features", 0)):
        out = tmp_path / cache
        done = vitft(*common, *options, cache, "--out", out)
        assert done.stderr.count("stages are computed once") == stages
        tensors[cache] = read_tensors(out / "adapter_model.safetensors")[0]
    cached, plain = tensors.values()
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=1e-5)
        assert value.any()  # the head and every lora_B started at zero


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shift=1"], "there is augmentation"),
        (["--layers=0-9"], "layer 2 has no target; there are: 0, 1"),
        (["--layers=1-0"], "layers=1-0 is not a number or a range, such as 0 or 4-5"),
        (["--layers=x"], "layers=x is not a number"),
    ],
)
def test_what_would_change_the_result_or_is_not_there_is_refused(
    vitft: Command, folder: Path, base: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    common = ["--base", base, "--data", folder, "--out", tmp_path / "a", "--cache-features"]
    done = vitft("finetune", "--adapter=lora", *common, *options, code=2)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error
    assert not (tmp_path / "a" / "config.json").exists()


@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("linear", 0.1)])
def test_what_is_not_frozen_or_drops_out_is_not_cached(
    vitft: Command, folder: Path, tmp_path: Path, method: str, dropout: float
) -> None:
    base = tmp_path / "base.safetensors"
    save_model(VisionTransformer(ViTConfig(**TINY, dropout=dropout)), base)
    common = [f"--adapter={method}", "--base", base, "--data", folder, "--out", tmp_path / "a"]
    done = vitft("finetune", *common, "--cache-features", code=2)
    assert "the embedding trains, or has dropout" in done.stderr
    done = vitft("finetune", *common, "--epochs=2")
    assert "computed once" not in done.stderr


def test_a_cached_run_goes_on_bit_for_bit_and_takes_no_validation_images(
    vitft: Command, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["finetune", "--adapter=lora", "--layers=1", "--base", base, "--data", folder]
    common += ["--epochs=4", "--batch-size=8", "--val-fraction=0"]
    vitft(*common, "--out", tmp_path / "whole")

    def stop(run: Run) -> dict[str, Any]:
        row = finish_epoch(run)
        if run.epoch == 2:
            save(run)
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr("vitft.training.loop.finish_epoch", stop)
    assert "--resume goes on" in vitft(*common, "--out", tmp_path / "cut", code=130).stderr
    monkeypatch.undo()
    vitft(*common, "--out", tmp_path / "cut", "--resume", "--cache-features")
    whole, cut = (
        read_tensors(tmp_path / name / "adapter_model.safetensors")[0] for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], value) for name, value in cut.items())


def test_a_streamed_set_gives_the_same_features(tiny: VisionTransformer, tmp_path: Path) -> None:
    model, some = tiny.float(), images()
    streamed = extract(model, some, 2, folder=tmp_path, bf16=True)
    held = extract(model, some.to(torch.device("cpu")), 2, folder=tmp_path, bf16=True)
    assert streamed.held is not None
    assert torch.equal(streamed.held, held.held)
    assert streamed.held.dtype == torch.float32
