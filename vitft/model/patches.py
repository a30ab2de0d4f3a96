"""Images (B, C, height, width) in, a token for each patch out (B, N, D), row by row."""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut images into patches and embed each by one linear map (arXiv:2010.11929).

    A patch is flattened in (C, height, width) order, so a convolution's kernel (D, C, p, p) is this
    weight reshaped. It is no `nn.Linear`, since it takes images.
    """

    def __init__(self, *, patch_size: int, n_channels: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        linear = nn.Linear(n_channels * patch_size**2, dim, bias=bias)  # for its start
        self.weight, self.bias = linear.weight, linear.bias  # (D, C * p * p), (D,)

    def forward(self, images: Tensor) -> Tensor:
        """Return a token for each patch."""
        p = self.patch_size
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, rows, p, columns, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * p * p)
        return F.linear(x, self.weight, self.bias)


class ConvEmbed(nn.Module):
    """See edges before cutting: two 3x3 convolutions, then patches of what is half as large.

    Early convolutions train faster and to higher accuracy (arXiv:2106.14881). Group norms in place
    of batch norms keep a frozen base's function the same in training and evaluation.
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
        """Return a token for each patch."""
        x = F.gelu(self.conv_norm1(self.conv1(images)))  # (B, 32, height, width)
        x = F.gelu(self.conv_norm2(self.conv2(x)))  # (B, 64, height / 2, width / 2)
        return self.conv3(x).flatten(2).transpose(1, 2)
