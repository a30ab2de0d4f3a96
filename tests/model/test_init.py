import pytest
import torch

from vitft.model.blocks import Attention
from vitft.model.config import ViTConfig
from vitft.model.init import INITS, initialise, sincos_positions
from vitft.model.vit import VisionTransformer


@pytest.mark.parametrize("name", INITS)
def test_every_tensor_of_the_blocks_has_a_gradient_from_the_first_step_on(name: str) -> None:
    model = VisionTransformer(ViTConfig(dim=32, hidden_dim=32, n_layers=2, dropout=0.0))
    initialise(model, name)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.blocks.parameters())


def test_the_articles_start_is_the_constructors() -> None:
    torch.manual_seed(0)
    expected = VisionTransformer().state_dict()
    torch.manual_seed(0)
    model = VisionTransformer()
    initialise(model, "article")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_mimetic_heads_attend_to_their_likes_and_the_block_takes_back() -> None:
    model = VisionTransformer(ViTConfig(n_layers=1))
    initialise(model, "mimetic")
    attn = model.blocks[0].attn
    assert isinstance(attn, Attention)
    for wq, wk in zip(attn.wq.weight.split(32), attn.wk.weight.split(32), strict=True):
        attends = (wq.T @ wk).diagonal().mean()
        assert 0.1 < attends < 0.7  # 0.7 I, of which a head holds 32 of 256 directions
    changes = attn.wo.weight @ attn.wv.weight
    assert changes.diagonal().mean().item() == pytest.approx(-0.4, abs=0.02)
    rest = changes - changes.diagonal().diag()
    assert rest.std().item() == pytest.approx(0.4 / 16, rel=0.05)


def test_positions_differ_and_depend_on_row_and_column_alike() -> None:
    grid = sincos_positions(16, 32).view(4, 4, 32)
    columns, rows = grid.tensor_split(2, dim=2)
    assert torch.equal(columns, rows.transpose(0, 1))
    assert len(grid.view(16, 32).unique(dim=0)) == 16
    torch.testing.assert_close(grid.square().sum(dim=2), torch.full((4, 4), 16.0))


def test_the_class_tokens_position_stays_small() -> None:
    model = VisionTransformer(ViTConfig(pooling="cls"))
    initialise(model, "sincos")
    assert model.pos_embedding[0, 0].std() < 0.03
    assert torch.equal(model.pos_embedding[0, 1:], sincos_positions(64, 256))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown init 'xavier'; choose from article, small"):
        initialise(VisionTransformer(), "xavier")
    with pytest.raises(ValueError, match="dim=6 is not divisible by 4"):
        sincos_positions(4, 6)
