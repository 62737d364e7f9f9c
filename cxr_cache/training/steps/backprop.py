"""Logits and gradients of a HeadBank in training, written out instead of recorded by autograd.

At batch 16 the products of a training step take half a millisecond, and recording, replaying and
copying gradients would take as long again. Since the network is fixed, its chain rule is too. A
test compares the result with autograd's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cxr_cache.models.heads import BATCH_NORM_MOMENTUM, NORM_EPS, HeadBank


class Backprop:
    """Training steps of a bank of heads with batch norm: :meth:`forward`, then :meth:`backward`.

    Running statistics are updated as by the bank's own forward pass, and gradients are written into
    ``bank.flat_grad``.
    """

    def __init__(self, bank: HeadBank) -> None:
        assert bank.norm == "batch", "layer norm goes through autograd"
        value = {name: tensor.detach() for name, tensor in bank.state_dict().items()}
        self._linears = [_Linear.of(bank, value, i) for i in range(bank.n_hidden + 1)]
        self._norms = [_Norm.of(bank, value, i) for i in range(bank.n_hidden)]
        self._last_bias_grad = bank.grad_view(f"bias_{bank.n_hidden}")
        self._inputs: list[Tensor] = []
        self._passed: list[_Passed] = []
        self._keep: Sequence[Tensor] = ()

    @torch.no_grad()
    def forward(self, x: Tensor, keep: Sequence[Tensor], *, out: Tensor) -> None:
        """Write the logits of every head on its own batch ``(H, B, D)`` into `out`, ``(H, B, F)``.

        `keep` holds the factors of dropout for each hidden layer, ``(H, B, C)`` each, as
        :func:`draw_dropout` draws them; it is empty for no dropout.
        """
        self._inputs, self._passed, self._keep = [x], [], keep
        H, B, _ = x.shape
        *hidden, last = self._linears
        for i, (linear, norm) in enumerate(zip(hidden, self._norms, strict=True)):
            z = torch.baddbmm(linear.bias, x, linear.weight).transpose(0, 1).reshape(B, -1)
            y, mean, inverse_std = torch.native_batch_norm(
                z,
                norm.weight.reshape(-1),
                norm.bias.reshape(-1),
                norm.running_mean,
                norm.running_var,
                True,
                BATCH_NORM_MOMENTUM,
                NORM_EPS,
            )
            x = y.clamp_min_(0).view(B, H, -1).transpose(0, 1)  # (H, B, C)
            if keep:
                x.mul_(keep[i])
            self._passed.append(_Passed(z, mean, inverse_std))
            self._inputs.append(x)
        torch.baddbmm(last.bias, x, last.weight, out=out)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> None:
        """Compute ``bank.flat_grad`` from the gradient of the logits, ``(H, B, F)``."""
        torch.sum(gradient, 1, keepdim=True, out=self._last_bias_grad)
        for i in range(len(self._norms), -1, -1):
            linear = self._linears[i]
            torch.bmm(self._inputs[i].mT, gradient, out=linear.weight_grad)
            if i > 0:
                gradient = self._through_hidden(torch.bmm(gradient, linear.transposed), i - 1)

    def _through_hidden(self, gradient: Tensor, i: int) -> Tensor:
        """Take a gradient back through dropout, ReLU and norm of hidden layer `i`.

        Both gradients have shape ``(H, B, C)``.
        """
        norm, passed, y = self._norms[i], self._passed[i], self._inputs[i + 1]
        H, B, C = gradient.shape
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        if self._keep:
            gradient.mul_(self._keep[i])
        before, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.transpose(0, 1).reshape(B, -1),
            passed.z,
            norm.weight.reshape(-1),
            norm.running_mean,
            norm.running_var,
            passed.mean,
            passed.inverse_std,
            True,
            NORM_EPS,
            (True, True, True),
        )
        norm.weight_grad.copy_(of_weight.view(H, C))
        norm.bias_grad.copy_(of_bias.view(H, C))
        back: Tensor = before.view(B, H, C).transpose(0, 1)
        return back


# --- views into the bank, and what the backward pass needs of the forward pass -------------------


class _Linear(NamedTuple):
    """Weights of one linear layer of every head, and the place of their gradient."""

    weight: Tensor  # (H, C_in, C)
    transposed: Tensor  # (H, C, C_in)
    bias: Tensor  # (H, 1, C)
    weight_grad: Tensor

    @classmethod
    def of(cls, bank: HeadBank, value: dict[str, Tensor], i: int) -> _Linear:
        weight = value[f"weight_{i}"]
        return cls(weight, weight.mT, value[f"bias_{i}"], bank.grad_view(f"weight_{i}"))


class _Norm(NamedTuple):
    """One batch norm over ``(B, H C)``: for torch, the units of all heads are its channels."""

    weight: Tensor  # (H, C)
    bias: Tensor
    running_mean: Tensor  # (H C,)
    running_var: Tensor
    weight_grad: Tensor  # (H, C)
    bias_grad: Tensor

    @classmethod
    def of(cls, bank: HeadBank, value: dict[str, Tensor], i: int) -> _Norm:
        return cls(
            value[f"norm_weight_{i}"],
            value[f"norm_bias_{i}"],
            value[f"mean_{i}"].view(-1),
            value[f"var_{i}"].view(-1),
            bank.grad_view(f"norm_weight_{i}"),
            bank.grad_view(f"norm_bias_{i}"),
        )


class _Passed(NamedTuple):
    """Values of one layer's forward pass that its backward pass needs."""

    z: Tensor  # before the norm, (B, H C)
    mean: Tensor  # (H C,)
    inverse_std: Tensor  # (H C,)


def draw_dropout(bank: HeadBank, n_steps: int, batch_size: int) -> Iterator[list[Tensor]]:
    """Draw the factors of dropout for several steps at once.

    The random numbers are those that as many forward passes would draw.
    """
    widths = bank.widths[1:-1]
    if bank.dropout == 0 or not widths:
        yield from ([] for _ in range(n_steps))
        return
    sizes = [batch_size * width for width in widths]
    layers = [
        layer.view(*layer.shape[:2], batch_size, width).unbind(1)
        for layer, width in zip(bank.draw_dropout(n_steps, sizes), widths, strict=True)
    ]
    for step in zip(*layers, strict=True):
        yield list(step)
