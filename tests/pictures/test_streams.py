"""Images held or streamed: what stays with them, and what a worker leaves to its process."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitft.pictures import stream as module
from vitft.pictures.images import Images

CPU = torch.device("cpu")


def numbered(n: int, sources: tuple[str, ...] = ()) -> Images:
    return Images(lambda i: torch.full((3, 2, 2), i, dtype=torch.uint8), torch.arange(n), sources)


def test_images_are_their_own_sources_where_none_are_given() -> None:
    assert numbered(3).sources == ["0", "1", "2"]
    assert numbered(2, ("a", "b")).sources == ["a", "b"]
    assert (numbered(3).held, numbered(3).stage, len(numbered(3))) == (None, 0, 3)


def test_a_digest_tells_other_labels_or_sources_and_nothing_else() -> None:
    first = numbered(3).digest()
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert numbered(3).to(CPU).digest() == first
    others = [numbered(4), numbered(3, ("0", "1", "x")), Images(len, torch.tensor([0, 1, 1]))]  # type: ignore[arg-type]
    assert first not in {other.digest() for other in others}


def test_contents_tell_files_of_other_sizes_and_nothing_else(tmp_path: Path) -> None:
    def images(*names: str) -> Images:
        paths = [str(tmp_path / name) for name in names]
        return Images(len, torch.zeros(len(names)), names=paths, are_files=True)  # type: ignore[arg-type]

    for name, text in (("a", "1"), ("b", "22"), ("c", "3")):
        (tmp_path / name).write_text(text)
    first = images("a", "b").contents
    assert images("c", "b").contents == first
    assert images("a", "b", "c").subset(torch.tensor([2, 1])).contents == first
    assert images("a", "c").contents != first
    assert images("a", "gone").contents != first
    assert numbered(2).contents == numbered(3).contents


@pytest.mark.parametrize("held", [True, False])
def test_a_subset_keeps_what_belongs_to_each_image(held: bool) -> None:
    images = numbered(5, tuple("abcde"))
    images = images.to(CPU) if held else images
    images.stage = 2
    chosen = images.subset(torch.tensor([3, 1]))
    assert chosen.labels.tolist() == [3, 1]
    assert chosen.sources == ["d", "b"]
    assert chosen.stage == 2
    assert (chosen.held is not None) is held
    assert [int(chosen.decode(i)[0, 0, 0]) for i in (0, 1)] == [3, 1]
    if chosen.held is not None:
        assert chosen.held[:, 0, 0, 0].tolist() == [3, 1]


def test_images_are_held_where_they_just_fit() -> None:
    size = 5 * 3 * 2 * 2
    assert numbered(5).to(CPU, max_bytes=size).held is not None
    assert numbered(5).to(CPU, max_bytes=size - 1).held is None
    empty = Images(lambda i: 1 // 0, torch.arange(0))  # type: ignore[arg-type, return-value]
    assert empty.to(CPU).held is None
    images = numbered(5).to(CPU)
    held = images.held
    images.decode = lambda i: 1 // 0  # type: ignore[assignment, return-value]
    assert images.to(CPU).held is held  # and not made again


def test_held_images_come_in_the_order_and_size_asked_for() -> None:
    images, order = numbered(7).to(CPU), torch.tensor([6, 0, 3, 5, 1])
    batches = list(images.batches(order.split(2), CPU))
    assert [batch[:, 0, 0, 0].tolist() for batch, _ in batches] == [[6, 0], [3, 5], [1]]
    assert [labels.tolist() for _, labels in batches] == [[6, 0], [3, 5], [1]]
    assert list(images.batches(torch.arange(0).split(2), CPU)) == []
    assert list(numbered(7).batches(torch.arange(0).split(2), CPU)) == []


def test_decoding_raises_what_it_raises() -> None:
    def decode(i: int) -> Tensor:
        if i == 3:
            raise ValueError("the fourth")
        return torch.zeros(1, 1, 1, dtype=torch.uint8)

    with pytest.raises(ValueError, match="^the fourth, or leave it out with --skip-broken$"):
        Images(decode, torch.arange(5)).to(CPU)


class Loader:
    """Stands for torch's loader: notes how it was made, and gives what is asked of it."""

    made: dict[str, Any]
    fails: Exception | None = None

    def __init__(self, source: Any, **options: Any) -> None:
        type(self).made = options
        self.source = source

    def __iter__(self) -> Any:
        if self.fails:
            raise self.fails
        pairs = [self.source[i] for i in sum(self.made["batch_sampler"], [])]
        assert len(self.source) == 4
        yield torch.stack([image for image, _ in pairs]), torch.stack([n for _, n in pairs])


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> type[Loader]:
    monkeypatch.setattr(module, "DataLoader", Loader)
    monkeypatch.setattr(Loader, "fails", None)
    return Loader


@pytest.mark.parametrize(("n_cores", "n_workers"), [(None, 1), (2, 2), (8, 8), (64, 8)])
def test_a_stream_is_read_by_a_few_workers_that_leave_stops_and_random_numbers_alone(
    loader: type[Loader], n_cores: int | None, n_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: n_cores)
    before = torch.get_rng_state()
    ((batch, labels),) = numbered(4).batches(torch.tensor([2, 0]).split(3), CPU)
    assert batch[:, 0, 0, 0].tolist() == labels.tolist() == [2, 0]
    generator = loader.made.pop("generator")
    assert isinstance(generator, torch.Generator)
    assert generator is not torch.default_generator
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.made == {
        "batch_sampler": [[2, 0]],
        "num_workers": n_workers,
        "pin_memory": False,
        "prefetch_factor": 4,
        "persistent_workers": True,
        "worker_init_fn": module._leave_signals,
    }


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ValueError("Caught ValueError\n  File x\nValueError: a.png is broken\n"),
            "a.png is broken",
        ),
        (OSError("Traceback\nOSError: disk gone"), "disk gone"),
        (ValueError("plain"), "plain"),
    ],
)
def test_a_workers_error_is_told_by_its_last_line(
    loader: type[Loader], error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "fails", error)
    with pytest.raises(ValueError, match=f"^{told}$"):
        list(numbered(4).batches(torch.arange(4).split(2), CPU))
    monkeypatch.setattr(loader, "fails", KeyError("a fault of ours"))
    with pytest.raises(KeyError):
        list(numbered(4).batches(torch.arange(4).split(2), CPU))


def test_a_worker_ignores_both_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", set_to.__setitem__)
    module._leave_signals(0)
    assert set_to == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


META = torch.device("meta")


@pytest.mark.parametrize("held", [True, False])
def test_images_and_labels_come_on_the_device_asked_for(held: bool, loader: type[Loader]) -> None:
    images = numbered(4).to(CPU) if held else numbered(4)
    for batch, labels in images.batches(torch.arange(4).split(4), META):
        assert batch.device == labels.device == META
        assert (batch.shape, labels.shape) == ((4, 3, 2, 2), (4,))
    there = numbered(4).to(CPU).to(META)
    assert there.held is not None
    assert there.held.device == there.labels.device == META
    assert there.subset(torch.arange(2)).held.shape == (2, 3, 2, 2)
    ((batch, _),) = there.batches(torch.arange(4).split(4), META)
    assert batch.device == META


def test_memory_is_pinned_where_it_goes_to_cuda(loader: type[Loader]) -> None:
    moved: list[Any] = []

    class Moving(Tensor):
        def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:  # type: ignore[override]
            moved.append((device.type, non_blocking))
            return self

    images = numbered(4)
    images.decode = lambda i: torch.zeros(1, 1, 1).as_subclass(Moving)
    images.labels.cpu = lambda: torch.arange(4).as_subclass(Moving)  # type: ignore[method-assign]
    list(images.batches(torch.arange(4).split(4), torch.device("cuda")))
    assert loader.made["pin_memory"] is True
    assert moved == [("cuda", True)] * 2


def test_one_image_is_a_set_too() -> None:
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    images = Images(pixels.__getitem__, torch.arange(1)).to(CPU)
    assert images.held is not None
