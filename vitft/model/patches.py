"""Images (B, C, height, width) in; a token for each patch, row by row, (B, N, D), out."""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut images into patches and embed each by one linear map (arXiv:2010.11929).

    A patch is flattened in (C, height, width) order, so the weight is the reshaped kernel
    (D, C, p, p) of the convolution that other libraries use. The class is no `nn.Linear`, since its
    input are images.
    """

    def __init__(self, *, patch_size: int, n_channels: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        linear = nn.Linear(n_channels * patch_size**2, dim, bias=bias)  # for its initialisation
        self.weight, self.bias = linear.weight, linear.bias  # (D, C * p * p), (D,)

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens (B, N, D)."""
        p = self.patch_size
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, rows, p, columns, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * p * p)
        return F.linear(x, self.weight, self.bias)


class ConvEmbed(nn.Module):
    """Embed patches by three convolutions, so that edges are seen across the patches' borders.

    Two 3x3 convolutions, the second of stride 2, come before one that cuts the patches. Early
    convolutions train faster and to higher accuracy (arXiv:2106.14881). Group norms in place of
    batch norms keep a frozen base's function the same in training and evaluation.
    """

    def __init__(self, *, patch_size: int, n_channels: int, dim: int) -> None:
        super().__init__()
        p = patch_size // 2
        self.conv1 = nn.Conv2d(n_channels, 32, 3, padding=1, bias=False)
        self.conv_norm1 = nn.GroupNorm(4, 32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.conv_norm2 = nn.GroupNorm(8, 64)
        self.conv3 = nn.Conv2d(64, dim, p, stride=p)

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens (B, N, D)."""
        x = F.gelu(self.conv_norm1(self.conv1(images)))  # (B, 32, height, width)
        x = F.gelu(self.conv_norm2(self.conv2(x)))  # (B, 64, height / 2, width / 2)
        return self.conv3(x).flatten(2).transpose(1, 2)
