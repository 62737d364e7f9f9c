"""Vision transformers taken apart at a block, into a stem and a tail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SplitTower(ABC):
    """A vision transformer taken apart: embed, blocks, finish.

    If only the class token is pooled, nothing after the last block reads the other tokens. The last
    block then needs the query, projection and MLP of the class token only, and its keys and values
    only as sums over tokens. This is algebra, not an approximation.
    """

    blocks: Sequence[nn.Module]
    reads_class_token_only: bool
    """Whether nothing but the class token is read after the last block."""
    patch_grid: tuple[int, int]
    """Numbers of rows and columns of patches; their tokens are the last ones, row by row."""
    quick_blocks: Sequence[nn.Module] = ()
    """What computes the blocks instead, as long as it is there: see :meth:`quicken`."""
    tokens_hold_positions = True
    """Whether blocks see the place of a patch in its token alone, so that others may be left
    out."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised pixels into the tokens that enter the first block."""

    @abstractmethod
    def class_token_block(self, tokens: Tensor) -> Tensor:
        """Run the last block for the class token alone, ``(B, T, W) -> (B, 1, W)``."""

    @abstractmethod
    def shows_attention(self, block: nn.Module) -> bool:
        """Tell whether :meth:`block_with_attention` computes exactly what a block does."""

    @abstractmethod
    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run one block; return its tokens, and its attention ``(B, heads, T, T)``.

        The rows of the attention sum to 1.
        """

    @abstractmethod
    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the tokens after the last block into pooled output and embedding."""

    def quicken(self, block: nn.Module) -> nn.Module:
        """Give what computes a block quicker, in bf16 on a CPU, from its weights as they are now.

        It is for inference only. Here it is the block itself.
        """
        return block

    def stem(self, pixels: Tensor, n_unfrozen: int) -> Tensor:
        """Turn normalised pixels into the tokens that enter the first unfrozen block."""
        tokens = self.embed(pixels)
        blocks = self.quick_blocks or self.blocks
        for block in blocks[: len(blocks) - n_unfrozen]:
            tokens = block(tokens)
        return tokens  # (B, T, W)

    def tail(
        self, tokens: Tensor, n_unfrozen: int, *, keeps_activations: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Turn the tokens of :meth:`stem` into pooled output and embedding.

        If activations are not kept, each block is computed again when its gradient is needed
        (Chen et al. 2016).
        """
        blocks = self.quick_blocks or self.blocks
        last = self.class_token_block if self.reads_class_token_only else blocks[-1]
        for block in (*blocks[len(blocks) - n_unfrozen : -1], last):
            if keeps_activations:
                tokens = block(tokens)
            else:
                tokens = checkpoint(block, tokens, use_reentrant=False)
        return self.finish(tokens)

    def tail_with_attention(self, tokens: Tensor, n_unfrozen: int) -> tuple[Tensor, list[Tensor]]:
        """Turn the tokens of :meth:`stem` into the embedding and the attention of each block.

        The embedding is computed from these attentions, so that gradients can be taken with respect
        to them. The faster methods never compute the attention.
        """
        attentions = []
        for block in self.blocks[len(self.blocks) - n_unfrozen :]:
            tokens, attention = self.block_with_attention(block, tokens)
            attentions.append(attention)
        return self.finish(tokens)[1], attentions


def run_whole(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pooled output and embedding by a tower that is not taken apart.

    A tower is a module that returns the embedding. If it has a `trunk` and a `head`, the output of
    the trunk is the pooled output; if it has `encode`, that gives both.
    """
    if hasattr(visual, "encode"):
        return visual.encode(pixels)  # type: ignore[no-any-return]
    if hasattr(visual, "trunk"):
        pooled = visual.trunk(pixels)
        embedding = visual.head(pooled)
        return (pooled if pooled.ndim == 2 else embedding), embedding
    output = visual(pixels)
    embedding = output[0] if isinstance(output, tuple) else output
    return embedding, embedding


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection ``(B, T, 3 A)`` into queries, keys and values.

    Each has shape ``(B, heads, T, head_dim)``.
    """
    q, k, v = qkv.view(*qkv.shape[:2], 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def softmax_products(q: Tensor, k: Tensor) -> Tensor:
    """Compute scaled dot-product attention (Vaswani et al. 2017, eq. 1), ``(B, heads, T, T)``."""
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), dim=-1)


def join_heads(mixed: Tensor) -> Tensor:
    """Join the heads again, ``(B, heads, T, head_dim)`` -> ``(B, T, A)``."""
    return mixed.transpose(1, 2).flatten(2)
