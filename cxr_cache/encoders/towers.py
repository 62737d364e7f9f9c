"""A vision transformer taken apart at a block: stem and tail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SplitTower(ABC):
    """A vision transformer taken apart: embed, blocks, finish.

    Where the class token alone is pooled, nothing after the last block reads the other tokens.
    That block then needs the query, projection and MLP of the class token only, and its keys and
    values only as sums over tokens. This is algebra, not an approximation.
    """

    blocks: Sequence[nn.Module]
    reads_class_token_only: bool
    patch_grid: tuple[int, int]
    """Rows and columns of patches; their tokens are the last ones, row by row."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels -> the tokens that enter the first block."""

    @abstractmethod
    def class_token_block(self, tokens: Tensor) -> Tensor:
        """The class token after the last block, ``(B, T, W) -> (B, 1, W)``."""

    @abstractmethod
    def shows_attention(self, block: nn.Module) -> bool:
        """Whether :meth:`block_with_attention` computes all that a block does, and nothing else."""

    @abstractmethod
    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One block: tokens after it, and its attention, ``(B, heads, T, T)``, rows sum to 1."""

    @abstractmethod
    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after the last block -> pooled, embedding."""

    def stem(self, pixels: Tensor, n_unfrozen: int) -> Tensor:
        """Normalised pixels -> tokens that enter the first unfrozen block."""
        tokens = self.embed(pixels)
        for block in self.blocks[: len(self.blocks) - n_unfrozen]:
            tokens = block(tokens)
        return tokens  # (B, T, W)

    def tail(
        self, tokens: Tensor, n_unfrozen: int, *, keeps_activations: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Those tokens -> pooled, embedding.

        Without its activations, each block is computed again when its gradient is asked for
        (Chen et al. 2016).
        """
        last = self.class_token_block if self.reads_class_token_only else self.blocks[-1]
        for block in (*self.blocks[len(self.blocks) - n_unfrozen : -1], last):
            if keeps_activations:
                tokens = block(tokens)
            else:
                tokens = checkpoint(block, tokens, use_reentrant=False)
        return self.finish(tokens)

    def tail_with_attention(self, tokens: Tensor, n_unfrozen: int) -> tuple[Tensor, list[Tensor]]:
        """Those tokens -> embedding, and the attention of each block, on which it depends.

        For gradients with respect to the attention, which the quick ways never compute.
        """
        attentions = []
        for block in self.blocks[len(self.blocks) - n_unfrozen :]:
            tokens, attention = self.block_with_attention(block, tokens)
            attentions.append(attention)
        return self.finish(tokens)[1], attentions


def run_whole(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled output and embedding of a tower that is not taken apart.

    A tower is a module that gives the embedding; where it has a `trunk` and a `head`, what the
    trunk gives is the pooled output.
    """
    if hasattr(visual, "trunk"):
        pooled = visual.trunk(pixels)
        embedding = visual.head(pooled)
        return (pooled if pooled.ndim == 2 else embedding), embedding
    output = visual(pixels)
    embedding = output[0] if isinstance(output, tuple) else output
    return embedding, embedding


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused projection ``(B, T, 3 A)`` -> queries, keys, values, ``(B, heads, T, head_dim)``."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def softmax_products(q: Tensor, k: Tensor) -> Tensor:
    """Scaled dot-product attention weights (Vaswani et al. 2017, eq. 1), ``(B, heads, T, T)``."""
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), dim=-1)


def join_heads(mixed: Tensor) -> Tensor:
    """``(B, heads, T, head_dim)`` -> ``(B, T, A)``."""
    return mixed.transpose(1, 2).flatten(2)
