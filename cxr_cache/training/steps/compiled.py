"""Training steps of one head, compiled by numba: gradient, clipping and AdamW in one loop.

At batch 16, a third of a step is Python between some eighty calls of torch. Here one call takes
many steps; its matrix products are those of scipy's BLAS. The result is that of
:class:`~cxr_cache.training.steps.backprop.Backprop` and
:class:`~cxr_cache.training.steps.optim.BankOptimizer`, but for the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401 - its BLAS is there when threads are limited
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.models.heads import BATCH_NORM_MOMENTUM, NORM_EPS, HeadBank
from cxr_cache.training.losses import Loss, WeightedFocal
from cxr_cache.training.steps.optim import BETAS, EPS, BankOptimizer

Array: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

_FEW_ROWS: Final = 64
"""Below so many, BLAS needs half the time for ``(W d')'`` that it needs for ``d W'``."""


class CompiledSteps:
    """Steps of a bank of one head on the CPU, in float32, with batch norm and a focal loss."""

    def __init__(self, bank: HeadBank, optimizer: BankOptimizer, loss: Loss) -> None:
        assert isinstance(loss, WeightedFocal)
        self._bank, self._optimizer, self._loss = bank, optimizer, loss

    def take(self, x: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Take a step for each of S batches.

        Parameters
        ----------
        x
            Inputs, ``(S, B, D)``.
        targets
            ``(S, B, F)``, NaN where unlabelled.
        logits
            Is given what the head says of every batch before the step, ``(S, B, F)``.
        """
        assert logits.is_contiguous(), "a copy would be written"
        bank, optimizer, widths = self._bank, self._optimizer, self._bank.widths
        sign, weight = self._loss.prepare(targets)
        bits, lowest = bank.draw_bits(len(x), [x.shape[1] * width for width in widths[1:-1]])
        statistics = [
            [bank.get_buffer(f"{name}_{i}")[0] for i in range(bank.n_hidden)]
            for name in ("mean", "var")
        ]
        running = [torch.cat([torch.empty(0), *parts]) for parts in statistics]
        (n_done,), (first, second) = optimizer.n_steps, optimizer.moments
        after = _take_steps(
            _as_arrays(_Batches, x, sign, weight, bits[0], logits),
            _as_arrays(_Head, bank.flat[0], bank.flat_grad[0], first[0], second[0], *running),
            np.array(widths),
            _make_room(x.shape[1], widths),
            _Recipe(
                rate=optimizer.rates_by_head[0],
                decay=float(optimizer.weight_decays[0]),
                max_norm=float(optimizer.max_grad_norm or math.inf),
                gamma=np.float32(self._loss.gamma),
                kept=np.float32(1 / (1 - bank.dropout)),
                lowest=np.int16(lowest),
            ),
            n_done.item(),
        )
        n_done.fill_(after)
        for parts, together in zip(statistics, running, strict=True):
            for part, values in zip(parts, torch.split(together, list(widths[1:-1])), strict=True):
                part.copy_(values)


# --- what the compiled functions read and write -------------------------------------------------


class _Batches(NamedTuple):
    """S batches; `logits` is written."""

    x: Array  # (S, B, D)
    sign: Array  # (S, B, F), as WeightedFocal.prepare gives them
    weight: Array  # (S, B, F)
    bits: NDArray[np.int16]  # (S, units), random, for dropout
    logits: Array  # (S, B, F)


class _Head(NamedTuple):
    """One head and its optimiser; all of it is written."""

    flat: Array  # (n_parameters,), as HeadBank.flat
    grad: Array
    first: Array  # moments
    second: Array
    running_mean: Array  # (C of all layers,)
    running_var: Array


class _Room(NamedTuple):
    """Values of a step's forward pass that its backward pass needs, for all hidden layers."""

    z: Array  # before the norm, (B C of all layers,)
    y: Array  # after dropout
    mean: Array  # (C of all layers,)
    inverse_std: Array
    gradient: Array  # of the logits, (B, F)


class _Recipe(NamedTuple):
    rate: float
    decay: float
    max_norm: float
    gamma: np.float32
    kept: np.float32  # factor of the units that dropout keeps
    lowest: np.int16  # of the bits that keep a unit


def _as_arrays(kind: Callable[..., Any], *tensors: Tensor) -> Any:
    return kind(*(tensor.contiguous().numpy() for tensor in tensors))


def _make_room(batch_size: int, widths: tuple[int, ...]) -> _Room:
    n_units = sum(widths[1:-1])
    shapes = [batch_size * n_units] * 2 + [n_units] * 2 + [(batch_size, widths[-1])]
    return _Room(*(np.empty(shape, np.float32) for shape in shapes))


# --- compiled -----------------------------------------------------------------------------------

# Sums may be reordered, as every BLAS does; NaN and infinity stay what they are.
_OPTIONS: Final[dict[str, Any]] = {
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
    "error_model": "numpy",
}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is first called, and keep the result on disk where that goes."""
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither beside this file nor in the user's folder
        compiled = numba.njit(**_OPTIONS)(function)
    return compiled


_ZERO, _ONE = np.float32(0), np.float32(1)
_MOMENTUM, _NORM_EPS, _EPS = (np.float32(value) for value in (BATCH_NORM_MOMENTUM, NORM_EPS, EPS))
_BETA_1, _BETA_2 = BETAS
_OF_FIRST, _OF_SECOND = (np.float32(1 - beta) for beta in BETAS)


@_compiled
def _take_steps(
    batches: _Batches, head: _Head, widths: Ints, room: _Room, recipe: _Recipe, n_done: int
) -> int:
    """Take a step per batch; gives the number of steps done since the head was drawn."""
    for s in range(len(batches.x)):
        logits = batches.logits[s]
        _forward(batches.x[s], batches.bits[s], head, widths, room, recipe, logits)
        _focal_gradient(logits, batches.sign[s], batches.weight[s], recipe.gamma, room.gradient)
        _backward(batches.x[s], head, widths, room, recipe.kept)
        n_done += 1
        _update(head, recipe, n_done)
    return n_done


@_compiled
def _forward(
    x: Array,
    bits: NDArray[np.int16],
    head: _Head,
    widths: Ints,
    room: _Room,
    recipe: _Recipe,
    logits: Array,
) -> None:
    for i in range(len(widths) - 2):
        weight, bias, scale, shift = _layer_of(head.flat, widths, i)
        z = _units_of(room.z, widths, i).reshape(len(x), -1)
        y = _units_of(room.y, widths, i).reshape(len(x), -1)
        np.dot(x, weight, z)
        z += bias
        mean, inverse_std = _units_of(room.mean, widths, i), _units_of(room.inverse_std, widths, i)
        running_mean = _units_of(head.running_mean, widths, i)
        _find_statistics(z, mean, inverse_std, running_mean, _units_of(head.running_var, widths, i))
        _activate(z, mean, inverse_std * scale, shift, bits, recipe.lowest, recipe.kept, y)
        bits = bits[(z.size + 3) // 4 * 4 :]  # four units share a draw
        x = y
    weight, bias, _, _ = _layer_of(head.flat, widths, len(widths) - 2)
    np.dot(x, weight, logits)
    logits += bias


@_compiled
def _find_statistics(
    z: Array, mean: Array, inverse_std: Array, running_mean: Array, running_var: Array
) -> None:
    n = np.float32(len(z))
    squares = np.zeros_like(mean)
    mean[:] = 0
    for b in range(len(z)):
        for c in range(len(mean)):
            mean[c] += z[b, c]
    mean /= n
    for b in range(len(z)):
        for c in range(len(mean)):
            squares[c] += (z[b, c] - mean[c]) ** 2
    for c in range(len(mean)):
        inverse_std[c] = _ONE / np.sqrt(squares[c] / n + _NORM_EPS)
        running_mean[c] += _MOMENTUM * (mean[c] - running_mean[c])
        running_var[c] += _MOMENTUM * (squares[c] / (n - _ONE) - running_var[c])


@_compiled
def _activate(
    z: Array,
    mean: Array,
    factor: Array,
    shift: Array,
    bits: NDArray[np.int16],
    lowest: np.int16,
    kept: np.float32,
    y: Array,
) -> None:
    """Norm, ReLU and dropout."""
    for b in range(z.shape[0]):
        row = bits[b * z.shape[1] :]
        for c in range(z.shape[1]):
            normed = (z[b, c] - mean[c]) * factor[c] + shift[c]
            y[b, c] = kept * normed if normed > _ZERO and row[c] >= lowest else _ZERO


@_compiled
def _focal_gradient(
    logits: Array, sign: Array, weight: Array, gamma: np.float32, gradient: Array
) -> None:
    """As :meth:`WeightedFocal.gradient`."""
    for b in range(logits.shape[0]):
        for f in range(logits.shape[1]):
            log_odds = logits[b, f] * sign[b, f]
            small = np.exp(-abs(log_odds))
            log_p = min(log_odds, _ZERO) - np.log1p(small)
            q = (small if log_odds > _ZERO else _ONE) / (_ONE + small)
            slope = gamma * (_ONE - q) * log_p - q
            power = q * q if gamma == 2 else q**gamma
            gradient[b, f] = slope * power * weight[b, f]


@_compiled
def _backward(x: Array, head: _Head, widths: Ints, room: _Room, kept: np.float32) -> None:
    gradient = room.gradient
    last = len(widths) - 2
    _layer_of(head.grad, widths, last)[1][:] = gradient.sum(axis=0)
    for i in range(last, -1, -1):
        below = x if i == 0 else _units_of(room.y, widths, i - 1).reshape(len(x), -1)
        np.dot(below.T, gradient, _layer_of(head.grad, widths, i)[0])
        if i == 0:
            break
        back = _through_linear(gradient, _layer_of(head.flat, widths, i)[0])
        z = _units_of(room.z, widths, i - 1).reshape(len(x), -1)
        mean, inverse_std = (
            _units_of(room.mean, widths, i - 1),
            _units_of(room.inverse_std, widths, i - 1),
        )
        scale = _layer_of(head.flat, widths, i - 1)[2]
        _, _, of_scale, of_shift = _layer_of(head.grad, widths, i - 1)
        _through_activation(back, z, below, mean, inverse_std, kept, of_scale, of_shift)
        _through_norm(back, z, mean, inverse_std, scale, of_scale, of_shift)
        gradient = back


@_compiled
def _through_linear(gradient: Array, weight: Array) -> Array:
    if len(gradient) < _FEW_ROWS:
        back: Array = np.dot(weight, gradient.T).T.copy()
    else:
        back = np.dot(gradient, weight.T)
    return back


@_compiled
def _through_activation(
    back: Array,
    z: Array,
    y: Array,
    mean: Array,
    inverse_std: Array,
    kept: np.float32,
    of_scale: Array,
    of_shift: Array,
) -> None:
    """Dropout and ReLU in place, and what the norm's scale and shift get of it."""
    of_scale[:] = 0
    of_shift[:] = 0
    for b in range(back.shape[0]):
        for c in range(back.shape[1]):
            value = kept * back[b, c] if y[b, c] > _ZERO else _ZERO
            back[b, c] = value
            of_shift[c] += value
            of_scale[c] += value * (z[b, c] - mean[c]) * inverse_std[c]


@_compiled
def _through_norm(
    back: Array,
    z: Array,
    mean: Array,
    inverse_std: Array,
    scale: Array,
    of_scale: Array,
    of_shift: Array,
) -> None:
    """Batch norm in place (Ioffe & Szegedy 2015, section 3)."""
    n = np.float32(len(back))
    for b in range(back.shape[0]):
        for c in range(back.shape[1]):
            normed = (z[b, c] - mean[c]) * inverse_std[c]
            centred = back[b, c] - (of_shift[c] + normed * of_scale[c]) / n
            back[b, c] = scale[c] * inverse_std[c] * centred


@_compiled
def _update(head: _Head, recipe: _Recipe, n_done: int) -> None:
    """Clipping, and AdamW as torch's."""
    clip = min(1.0, recipe.max_norm / (math.sqrt(_sum_squares(head.grad)) + 1e-6))
    _step_adamw(
        head.flat,
        head.grad,
        head.first,
        head.second,
        np.float32(clip),
        np.float32(1 - recipe.rate * recipe.decay),
        np.float32(recipe.rate / (1 - _BETA_1**n_done)),
        np.float32(1 / math.sqrt(1 - _BETA_2**n_done)),
    )


@_compiled
def _sum_squares(values: Array) -> np.float32:
    total: np.float32 = np.float32(0)
    for i in range(len(values)):
        total += values[i] * values[i]
    return total


@_compiled
def _step_adamw(
    flat: Array,
    grad: Array,
    first: Array,
    second: Array,
    clip: np.float32,
    decay: np.float32,
    step: np.float32,
    root: np.float32,
) -> None:
    # Each array is read and written once per number: only then does the compiler see that it may
    # take sixteen at a time.
    for i in range(len(flat)):
        gradient = clip * grad[i]
        mean = first[i] + _OF_FIRST * (gradient - first[i])
        square = second[i] + _OF_SECOND * (gradient * gradient - second[i])
        first[i] = mean
        second[i] = square
        flat[i] = decay * flat[i] - step * mean / (root * np.sqrt(square) + _EPS)


@_compiled
def _layer_of(flat: Array, widths: Ints, i: int) -> tuple[Array, Array, Array, Array]:
    """Weight, bias, and scale and shift of the norm of layer `i`; the last layer has no norm."""
    at = 0
    for k in range(i):
        at += (widths[k] + 3) * widths[k + 1]
    n, c = widths[i], widths[i + 1]
    weight, rest = flat[at : at + n * c].reshape(n, c), flat[at + n * c :]
    return weight, rest[:c], rest[c : 2 * c], rest[2 * c : 3 * c]


@_compiled
def _units_of(values: Array, widths: Ints, i: int) -> Array:
    """What belongs to hidden layer `i` in an array of one value, or of B values, per unit."""
    per_unit = len(values) // widths[1:-1].sum()
    first = per_unit * widths[1 : i + 1].sum()
    return values[first : first + per_unit * widths[i + 1]]
