"""Attention over few tokens by Triton kernels of one block a head, against torch's own on CUDA.

    python -m benchmarks.attention

A small image makes 64 tokens, so that a head's whole table of scores fits one block: the forward
pass then reads q, k, v and writes the result, and the backward pass reads those and the gradient
and writes three gradients; nothing else travels. Kernels made for long sequences
(arXiv:2205.14135) go over memory more often. This is a candidate: it moves into the model when a
GPU has shown that it pays. `TRITON_INTERPRET=1` checks it, untimed, without one.
"""

import os
from collections.abc import Callable
from typing import Any

import click
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.results import table, write_result

COLUMNS = {"kernel": "", "n_tokens": "", "n_heads": "", "forward_us": ".0f", "backward_us": ".0f"}
COLUMNS |= {"error": ".1e"}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DIM = 256


@triton.jit
def _places(n_heads, n_tokens, dim, TOKENS: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the numbers (N, K) of this program's head are, and which of them there are."""
    program = tl.program_id(0)
    start = (program // n_heads).to(tl.int64) * n_tokens * dim + (program % n_heads) * HEAD
    rows, columns = tl.arange(0, TOKENS)[:, None], tl.arange(0, HEAD)[None, :]
    return start + rows * dim + columns, (rows < n_tokens) & (columns < HEAD)


@triton.jit
def _weights(q, k, n_tokens, scale, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return softmax(scale q k^T) (N, N) in float32, zero for the columns after the last token."""
    scores = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)  # exp2 is the faster one
    scores = tl.where(tl.arange(0, TOKENS)[None, :] < n_tokens, scores, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, n_heads, n_tokens, dim, scale, TOKENS: tl.constexpr, HEAD: tl.constexpr
):
    at, there = _places(n_heads, n_tokens, dim, TOKENS, HEAD)
    value = tl.load(v + at, there, 0.0)
    query, key = tl.load(q + at, there, 0.0), tl.load(k + at, there, 0.0)
    weights = _weights(query, key, n_tokens, scale, TOKENS)
    tl.store(out + at, tl.dot(weights.to(value.dtype), value).to(value.dtype), there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, dq, dk, dv, n_heads, n_tokens, dim, scale,
    TOKENS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    at, there = _places(n_heads, n_tokens, dim, TOKENS, HEAD)
    dout, value = tl.load(grad + at, there, 0.0), tl.load(v + at, there, 0.0)
    query, key = tl.load(q + at, there, 0.0), tl.load(k + at, there, 0.0)
    weights = _weights(query, key, n_tokens, scale, TOKENS)
    dtype = value.dtype
    tl.store(dv + at, tl.dot(tl.trans(weights.to(dtype)), dout).to(dtype), there)
    dweights = tl.dot(dout, tl.trans(value))
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None]) * scale
    dscores = dscores.to(dtype)
    tl.store(dq + at, tl.dot(dscores, key).to(dtype), there)
    tl.store(dk + at, tl.dot(tl.trans(dscores), query).to(dtype), there)


def launch(kernel: "triton.JITFunction", tensors: tuple[Tensor, ...], n_heads: int) -> None:
    """Run a kernel on tensors (B, N, D), the results among them, a program for each head."""
    n_images, n_tokens, dim = tensors[0].shape
    head = dim // n_heads
    tokens = max(16, triton.next_power_of_2(n_tokens))
    kernel[(n_images * n_heads,)](
        *tensors, n_heads, n_tokens, dim, head**-0.5,
        TOKENS=tokens, HEAD=head, num_warps=4 if tokens > 32 else 2,
    )  # fmt: skip


class OneBlock(torch.autograd.Function):
    """Attention of q, k and v (B, N, D) by the kernels above."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.n_heads = n_heads
        out = torch.empty_like(q)
        launch(_forward, (q, k, v, out), n_heads)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        gradients = [torch.empty_like(x) for x in ctx.saved_tensors]
        launch(_backward, (grad.contiguous(), *ctx.saved_tensors, *gradients), ctx.n_heads)
        return (*gradients, None)  # type: ignore[return-value]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Return what the model computes now."""
    heads = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, K)
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def error(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, n_heads: int) -> float:
    """Return the largest relative error of the result and the gradients, against float64."""
    found = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out, truth = attend(*found, n_heads), torch_attention(*exact, n_heads)
    out.backward(grad)
    truth.backward(grad.double())
    pairs = [(out.detach(), truth.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(found, exact, strict=True)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def measure(name: str, n_images: int, n_tokens: int, n_heads: int, device: str) -> dict[str, Any]:
    """Return the microseconds of a kernel, forward and backward, and its error."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    *inputs, grad = torch.randn(4, n_images, n_tokens, DIM, device=device).to(dtype).unbind()
    attend = OneBlock.apply if name == "one block" else torch_attention
    row = {"kernel": name, "n_tokens": n_tokens, "n_heads": n_heads}
    row["error"] = error(attend, inputs, grad, n_heads)
    if device == "cuda":
        tracked = [x.requires_grad_() for x in inputs]
        out = attend(*tracked, n_heads)
        bench = triton.testing.do_bench
        row["forward_us"] = 1000 * bench(lambda: attend(*tracked, n_heads), return_mode="median")
        row["backward_us"] = 1000 * bench(
            lambda: torch.autograd.grad(out, tracked, grad, retain_graph=True), return_mode="median"
        )
    return row


@click.command()
@click.option("--n-images", default=512, show_default=True)
def main(n_images: int) -> None:
    """Check the kernels, time them on CUDA, and print a table."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device; TRITON_INTERPRET=1 checks without one")
    device = "cpu" if interpreted else "cuda"
    rows = []
    for n_tokens, n_heads in ((64, 8), (65, 8), (36, 8), (64, 4)):
        rows.append(measure("one block", n_images, n_tokens, n_heads, device))
        for name, backend in BACKENDS.items() if device == "cuda" else ():
            with sdpa_kernel(backend):
                rows.append(measure(name, n_images, n_tokens, n_heads, device))
    click.echo(table(rows, COLUMNS))
    if not interpreted:
        click.echo(write_result("attention_cuda", rows, n_images=n_images, dim=DIM))


if __name__ == "__main__":
    main()
