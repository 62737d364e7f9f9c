"""HeadBank: H three-layer heads in one set of tensors, trained side by side.

Shape letters used throughout the package:

====== ================================ ====== =========================================
letter axis                             letter axis
====== ================================ ====== =========================================
N      images in the store              H      heads trained side by side
B      images in a batch                K      folds
D      embedding width                  T      tokens of the ViT, class token included
F      findings                         L      transformer blocks
V      views of an image                C      hidden units of one layer
====== ================================ ====== =========================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_cache.config import Recipe

NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class HeadBank(nn.Module):
    """H independent heads: Linear, norm, ReLU, Dropout, twice, and a last Linear.

    Head `h` is the PyTorch ``nn.Sequential`` that :meth:`as_sequential` returns; stacking changes
    nothing about it. Weights are Xavier-uniform, biases zero.

    All trainable numbers of a head lie in one row of :attr:`flat`, and every parameter is a view
    of it; :meth:`backward` writes gradients to the same places of :attr:`flat_grad`. Clipping and
    the optimiser see one vector per head.

    Parameters
    ----------
    n_heads, n_inputs, n_outputs
        H, D and F.
    hidden
        Width of each hidden layer.
    dropout
        Probability of dropping a hidden unit.
    norm
        ``batch`` (the reference's) or ``layer``.
    seeds
        One per head; they decide initial weights and dropout, so that a head does not depend on
        its neighbours.
    """

    def __init__(
        self,
        n_heads: int,
        n_inputs: int,
        n_outputs: int,
        *,
        hidden: Sequence[int] = (512, 256),
        dropout: float = 0.5,
        norm: str = "batch",
        seeds: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        seeds = range(n_heads) if seeds is None else seeds
        if len(seeds) != n_heads:
            raise ValueError(f"{n_heads} heads need as many seeds, not {len(seeds)}")
        self.widths = (n_inputs, *hidden, n_outputs)
        self.dropout, self.norm = dropout, norm
        self._allocate(n_heads, torch.device(device))
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for h, generator in enumerate(self.generators):
            self._initialise(h, generator)
        if self.flat.device.type != "cpu":  # on the CPU, dropout goes on where the weights stopped
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    @classmethod
    def of_recipe(
        cls,
        recipe: Recipe,
        n_inputs: int,
        n_outputs: int,
        *,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> HeadBank:
        """Draw one head per seed, with the hidden layers, norm and dropout of a recipe."""
        return cls(
            len(seeds),
            n_inputs,
            n_outputs,
            hidden=recipe.hidden,
            dropout=recipe.dropout,
            norm=recipe.norm,
            seeds=seeds,
            device=device,
        )

    def _allocate(self, n_heads: int, device: torch.device) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n_in, n_out) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            shapes |= {f"weight_{i}": (n_in, n_out), f"bias_{i}": (1, n_out)}
            if i < self.n_hidden:
                shapes |= {f"norm_weight_{i}": (n_out,), f"norm_bias_{i}": (n_out,)}
            if i < self.n_hidden and self.norm == "batch":
                self.register_buffer(f"mean_{i}", torch.zeros(n_heads, n_out, device=device))
                self.register_buffer(f"var_{i}", torch.ones(n_heads, n_out, device=device))
        n_parameters = sum(math.prod(shape) for shape in shapes.values())
        self.flat = torch.zeros(n_heads, n_parameters, device=device)
        self.flat_grad = torch.zeros_like(self.flat)
        self._grad_views: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            self.register_parameter(
                name, nn.Parameter(self.flat[:, start:end].view(n_heads, *shape))
            )
            self._grad_views[name] = self.flat_grad[:, start:end].view(n_heads, *shape)
            start = end
        if self.norm == "batch":
            for i in range(self.n_hidden):
                del self._grad_views[f"bias_{i}"]  # see backward

    @torch.no_grad()
    def _initialise(self, h: int, generator: torch.Generator) -> None:
        for i in range(self.n_hidden + 1):
            weight = self.get_parameter(f"weight_{i}")[h]
            bound = math.sqrt(6 / sum(weight.shape))  # Glorot & Bengio 2010, eq. 16
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        for i in range(self.n_hidden):
            self.get_parameter(f"norm_weight_{i}")[h] = 1.0

    @property
    def n_heads(self) -> int:
        """H."""
        return len(self.flat)

    @property
    def n_hidden(self) -> int:
        """Number of hidden layers."""
        return len(self.widths) - 2

    @property
    def n_parameters(self) -> int:
        """Trainable numbers of one head."""
        return self.flat.shape[1]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits of every head, each on its own batch, ``(H, B, D)`` -> ``(H, B, F)``.

        With ``(B, D)``, every head has the same batch.
        """
        x = embeddings.expand(self.n_heads, *embeddings.shape[-2:])
        for i in range(self.n_hidden):
            x = self._linear(x, i)  # (H, B, C)
            x = self._batch_norm(x, i) if self.norm == "batch" else self._layer_norm(x, i)
            x = self._drop(F.relu(x))
        return self._linear(x, self.n_hidden)

    def backward(self, losses: Tensor) -> None:
        """Put the gradient of every head's training loss, ``(H,)``, into :attr:`flat_grad`.

        A bias before a batch norm is subtracted again with the batch's mean, so its gradient is
        zero and stays zero here. What autograd finds is rounding noise, which AdamW would scale
        up to full steps: the bias would wander, by another path in every bank and on every machine.
        """
        assert self.training, "in evaluation, a bias before a batch norm does have a gradient"
        moving = [self.get_parameter(name) for name in self._grad_views]
        gradients = torch.autograd.grad(losses.sum(), moving)
        for view, gradient in zip(self._grad_views.values(), gradients, strict=True):
            view.copy_(gradient)

    def grad_view(self, name: str) -> Tensor:
        """The part of :attr:`flat_grad` that belongs to a parameter."""
        return self._grad_views[name]

    def _linear(self, x: Tensor, i: int) -> Tensor:
        return torch.baddbmm(self.get_parameter(f"bias_{i}"), x, self.get_parameter(f"weight_{i}"))

    def _batch_norm(self, x: Tensor, i: int) -> Tensor:
        """Normalise every head by itself: to torch the units of all heads are channels."""
        y: Tensor = F.batch_norm(
            x.transpose(0, 1).flatten(1),  # (H, B, C) -> (B, H C)
            self.get_buffer(f"mean_{i}").view(-1),
            self.get_buffer(f"var_{i}").view(-1),
            self.get_parameter(f"norm_weight_{i}").reshape(-1),
            self.get_parameter(f"norm_bias_{i}").reshape(-1),
            training=self.training,
            momentum=BATCH_NORM_MOMENTUM,
            eps=NORM_EPS,
        )
        return y.view(len(y), self.n_heads, x.shape[-1]).transpose(0, 1)

    def _layer_norm(self, x: Tensor, i: int) -> Tensor:
        weight, bias = (self.get_parameter(f"norm_{part}_{i}") for part in ("weight", "bias"))
        normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(bias[:, None], normed, weight[:, None])  # (H, 1, C), (H, B, C)

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        (factors,) = self.draw_dropout(1, [x[0].numel()])
        return x * factors.view(x.shape)

    def draw_dropout(self, n_steps: int, sizes: Sequence[int]) -> list[Tensor]:
        """Factors of hidden units, 0 for the dropped: per layer of `sizes`, ``(H, n_steps, size)``.

        Each head has a generator of its own, so that heads do not share their luck.
        """
        bits, lowest = self.draw_bits(n_steps, sizes)
        factors = bits.to(self.flat.dtype)  # (H, n_steps, units)
        factors.ge_(lowest).mul_(1 / (1 - self.dropout))
        layers = torch.split(factors, [4 * -(-size // 4) for size in sizes], dim=2)
        return [layer[..., :size] for layer, size in zip(layers, sizes, strict=True)]

    def draw_bits(self, n_steps: int, sizes: Sequence[int]) -> tuple[Tensor, int]:
        """Draw what decides dropout: 16 bits per hidden unit, and the lowest that keep it.

        The bits are int16, ``(H, n_steps, units)``, each layer rounded up to a multiple of four:
        four units share a draw of 64 bits, which takes a quarter of the time of ``bernoulli_``.
        Without dropout nothing is drawn, and all bits are 0.
        """
        shape = (self.n_heads, n_steps, sum(-(-size // 4) for size in sizes))
        bits = torch.zeros(shape, dtype=torch.int64, device=self.flat.device)
        if self.dropout > 0:
            for head, generator in zip(bits, self.generators, strict=True):
                head.random_(torch.iinfo(torch.int64).min, None, generator=generator)
        lowest = min(round(self.dropout * 2**16) - 2**15, 2**15 - 1)  # of int16
        return bits.view(torch.int16), lowest

    def as_sequential(self, h: int) -> nn.Sequential:
        """Head `h` as a plain ``nn.Sequential`` with its own copy of the weights."""
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            linear = nn.Linear(n_in, n_out)
            linear.weight.data = self.get_parameter(f"weight_{i}")[h].detach().T.clone()
            linear.bias.data = self.get_parameter(f"bias_{i}")[h, 0].detach().clone()
            layers.append(linear)
            if i < self.n_hidden:
                norm: nn.LayerNorm | nn.BatchNorm1d
                if self.norm == "batch":
                    norm = nn.BatchNorm1d(n_out, NORM_EPS, BATCH_NORM_MOMENTUM)
                    norm.running_mean = self.get_buffer(f"mean_{i}")[h].clone()
                    norm.running_var = self.get_buffer(f"var_{i}")[h].clone()
                else:
                    norm = nn.LayerNorm(n_out, NORM_EPS)
                norm.weight.data = self.get_parameter(f"norm_weight_{i}")[h].detach().clone()
                norm.bias.data = self.get_parameter(f"norm_bias_{i}")[h].detach().clone()
                layers += [norm, nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers).train(self.training)

    def snapshot(self, heads: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Copy of what defines the heads (all of them, or those listed), by name."""
        chosen = list(range(self.n_heads)) if heads is None else list(heads)
        return {name: tensor[chosen].clone() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_snapshot(
        cls,
        state: Mapping[str, Tensor],
        *,
        dropout: float = 0.5,
        device: torch.device | str = "cpu",
    ) -> HeadBank:
        """Heads as :meth:`snapshot` left them, in evaluation mode."""
        n_layers = sum(name.startswith("weight_") for name in state)
        shapes = [state[f"weight_{i}"].shape for i in range(n_layers)]
        n_heads, n_inputs, _ = shapes[0]
        *hidden, n_outputs = (int(shape[2]) for shape in shapes)
        bank = cls(
            n_heads,
            n_inputs,
            n_outputs,
            hidden=hidden,
            dropout=dropout,
            norm=find_norm(state),
            device=device,
        )
        bank.load_state_dict(dict(state))
        return bank.eval()


def find_norm(state: Mapping[str, Tensor]) -> str:
    """Tell from a head's tensors what follows its hidden layers: ``"batch"`` or ``"layer"``.

    Only a batch norm keeps running means. A head without hidden layers has no norm and counts as
    ``"batch"``, which is the default of every recipe.
    """
    return "layer" if "norm_weight_0" in state and "mean_0" not in state else "batch"


@torch.inference_mode()
def predict_probabilities(bank: HeadBank, embeddings: Tensor, *, batch_size: int = 8192) -> Tensor:
    """Probabilities of every row in evaluation mode, averaged over the heads, ``(N, F)``.

    Embeddings, ``(N, D)``, are prepared as by :func:`cxr_cache.store.rows.prepare_features`.
    """
    was_training = bank.training
    bank.eval()
    parts = [
        torch.sigmoid(bank(batch)).mean(dim=0) for batch in torch.split(embeddings, batch_size)
    ]
    bank.train(was_training)
    return torch.cat(parts)
