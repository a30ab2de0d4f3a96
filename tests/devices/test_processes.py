"""What processes that train together tell each other, and what one that is alone has already."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.processes import in_processes
from vitft.devices import processes
from vitft.devices.shares import Dropout, Rows, first_and_again, own_batches, own_slice


def exchange(folder: Path) -> None:
    """Exchange what each of three processes has, and check it."""
    n, me = processes.n_processes(), processes.rank()
    assert n == 3
    assert processes.is_first() == (me == 0)
    assert processes.from_first({"place": me}) == {"place": 0}
    assert processes.merged({2 - me: me, 10 + me: me}) == {2: 0, 1: 1, 0: 2, 10: 0, 11: 1, 12: 2}
    assert [*processes.merged({2 - me: me})] == [0, 1, 2]
    values = torch.tensor([1.0, me])
    assert processes.add_up(values) is values
    assert values.tolist() == [3.0, 3.0]
    assert processes.highest([me, -me]) == [2, 0]
    rows = torch.full((me, 2), me)  # 0, 1 and 2 of them
    assert processes.gathered(rows).tolist() == [[1, 1], [2, 2], [2, 2]]
    assert processes.local_device(torch.device("cpu")) == torch.device("cpu")
    (folder / f"came-{me}").touch()
    processes.barrier()
    assert len([*folder.glob("came-*")]) == 3
    (folder / f"failed-{me}-{processes.first_to_fail()}").touch()
    assert own_slice(7) == slice(7 * me // 3, 7 * (me + 1) // 3)
    batches = own_batches(4, 1)
    assert len(batches) == 2
    assert [int(i) for batch in batches for i in batch] == [*range(4)][own_slice(4)]
    assert [batch.tolist() for batch in own_batches(2, 5)] == [[max(0, me - 1)]]


def test_processes_tell_each_other_what_they_have(tmp_path: Path) -> None:
    in_processes(3, tmp_path, exchange, tmp_path)
    ends = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob("failed-*"))
    assert ends == ["False", "False", "True"]


def test_a_process_that_is_alone_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (processes.n_processes(), processes.rank(), processes.n_on_machine()) == (1, 0, 1)
    assert processes.is_first()
    assert processes.first_to_fail()
    value = torch.ones(2)
    assert processes.from_first(value) is processes.add_up(value) is value
    assert processes.gathered(value) is value
    assert [*processes.merged({2: "b", 1: "a"}).items()] == [(1, "a"), (2, "b")]
    assert processes.highest([3, 1]) == [3, 1]
    assert processes.local_device(torch.device("cuda")) == torch.device("cuda")
    processes.barrier()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, True),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "localhost"}, False),
    ],
)
def test_torchrun_is_known_by_what_it_sets(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.started_by_torchrun() == expected


def test_a_block_that_is_computed_again_drops_what_it_did_before() -> None:
    x, weight = torch.rand(2, 50), torch.ones(50, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * weight, 0.5) * weight

    gradients = []
    for again in (False, True):
        weight.grad = None
        torch.manual_seed(3)
        with Dropout(Rows(6, torch.tensor([1, 4]))):
            y = (
                checkpoint(block, x, use_reentrant=False, context_fn=first_and_again)
                if again
                else block(x)
            )
            y.sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_a_share_of_a_batch_drops_what_the_whole_batch_does() -> None:
    x, rows = torch.rand(6, 50), Rows(6, torch.tensor([1, 4]))
    torch.manual_seed(3)
    whole = F.dropout(x, 0.3)
    torch.manual_seed(3)
    with Dropout(rows):
        share = F.dropout(x[[1, 4]], 0.3)
        half = F.dropout(x[[1, 4]].fill_(1.0))
        assert F.dropout(share, 0.3, training=False) is share
        assert torch.equal(F.dropout(share, 0.0), share)
        other = F.dropout(torch.ones(5, 1000), 0.9)  # no rows of images
        assert F.relu(torch.tensor(-1.0)) == 0
    assert torch.equal(share, whole[[1, 4]])
    assert {*half.flatten().tolist()} == {0.0, 2.0}
    assert other.mean() == pytest.approx(1, abs=0.2)
    with Dropout(Rows(6)):
        torch.manual_seed(3)
        assert torch.equal(F.dropout(x, 0.3), whole)
