"""A model that FSDP2 shards over two processes: saved, merged and ejected, whole."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import adapters
from tests.adapters.toy import X, adapted, toy
from tests.processes import in_processes


def use_sharded(folder: str) -> None:
    """Shard an adapted model in one of two processes, and save what each way back gives."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name, use in (("merged", adapters.merge), ("ejected", adapters.eject)):
        model = fully_shard(adapted("lora"), mesh=mesh)
        adapters.save_adapter(model, f"{folder}/adapter")
        assert adapters.fingerprint(model) == adapters.fingerprint(adapted("lora"))
        linear = use(model).blocks[0].attn.wq
        assert type(linear) is nn.Linear
        torch.save(linear.weight.detach(), f"{folder}/{name}{dist.get_rank()}")
    model = adapted("vpt")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert not adapters.mergeable(model)
    assert [name for name, *_ in adapters.updates(model)] == ["head"]


def test_what_is_sharded_comes_back_whole(tmp_path: Path) -> None:
    in_processes(2, tmp_path, use_sharded, str(tmp_path))
    loaded = adapters.load_adapter(toy(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(X), adapted("lora").eval()(X), rtol=0, atol=1e-12)
    merged = adapters.merge(adapted("lora")).blocks[0].attn.wq.weight
    for rank in (0, 1):
        found = torch.load(tmp_path / f"merged{rank}")
        torch.testing.assert_close(found, merged.detach(), rtol=0, atol=1e-12)
        base = torch.load(tmp_path / f"ejected{rank}")
        assert torch.equal(base, toy().blocks[0].attn.wq.weight.detach())
