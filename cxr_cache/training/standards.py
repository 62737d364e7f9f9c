"""Mean and spread of a head's training inputs: applied in training, then folded into the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_ROWS_AT_ONCE: Final = 8192


@dataclass(frozen=True)
class Standards:
    """Mean and spread of each head's training inputs, to standardise by."""

    mean: Tensor
    """``(H, 1, D)``."""
    std: Tensor
    """``(H, 1, D)``; 1 where an input never varies."""

    @classmethod
    def of(cls, embeddings: Tensor, rows: Sequence[Tensor]) -> Standards:
        """Those of the rows of each head, of embeddings ``(N, D)``."""
        means, variances = [], []
        for chosen in rows:
            total, squares = torch.zeros(2, embeddings.shape[1], device=embeddings.device).double()
            for part in torch.split(chosen, _ROWS_AT_ONCE):
                x = embeddings[part].double()
                total += x.sum(dim=0)
                squares += x.square().sum(dim=0)
            means.append(total / len(chosen))
            variances.append((squares / len(chosen) - means[-1].square()).clamp(min=0))
        std = torch.stack(variances).sqrt()
        mean = torch.stack(means)
        # Of an input that never varies, rounding shows less than this share of its size.
        std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
        return cls(mean[:, None].to(embeddings.dtype), std[:, None].to(embeddings.dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Standardise ``(H, n, D)`` in place."""
        return x.sub_(self.mean).div_(self.std)

    def fold_into(self, state: dict[str, Tensor], h: int) -> dict[str, Tensor]:
        """Head `h` with its first layer changed so that it reads what is not standardised."""
        weight = state["weight_0"] / self.std[h].mT  # (1, D, C) / (D, 1)
        bias = state["bias_0"] - self.mean[h] @ weight  # (1, 1, C) - (1, D) @ (1, D, C)
        return state | {"weight_0": weight, "bias_0": bias}
