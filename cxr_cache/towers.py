"""A vision transformer taken apart at a block: stem and tail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SplitTower(ABC):
    """A vision transformer taken apart: embed, blocks, finish.

    Where the class token alone is pooled, nothing after the last block reads the other tokens.
    That block then needs the query, projection and MLP of the class token only; keys and values
    are needed for all. The arithmetic of what remains is unchanged.
    """

    blocks: Sequence[nn.Module]
    reads_class_token_only: bool

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels -> the tokens that enter the first block."""

    @abstractmethod
    def class_token_block(self, tokens: Tensor) -> Tensor:
        """The class token after the last block, ``(B, T, W) -> (B, 1, W)``."""

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


class _TimmTower(SplitTower):
    """timm's VisionTransformer inside open_clip's adapter: BiomedCLIP, and every `random:` ViT."""

    def __init__(self, visual: Any) -> None:
        self._trunk, self._head = visual.trunk, visual.head
        self.blocks = self._trunk.blocks
        self.reads_class_token_only = (
            self._trunk.global_pool == "token"
            and self._trunk.attn_pool is None
            and _is_plain_timm_block(self.blocks[-1])
        )

    def embed(self, pixels: Tensor) -> Tensor:
        trunk = self._trunk
        tokens: Tensor = trunk.norm_pre(
            trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels)))
        )
        return tokens

    def class_token_block(self, tokens: Tensor) -> Tensor:
        block: Any = self.blocks[-1]
        attended = _attend_with_class_token(block.attn, block.norm1(tokens))
        class_token: Tensor = tokens[:, :1] + block.drop_path1(block.ls1(attended))  # (B, 1, W)
        changed: Tensor = block.drop_path2(block.ls2(block.mlp(block.norm2(class_token))))
        return class_token + changed

    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self._trunk.forward_head(self._trunk.norm(tokens), pre_logits=True)
        return pooled, self._head(self._trunk.head(pooled))


class _OpenClipTower(SplitTower):
    """open_clip's own VisionTransformer, behind names such as ViT-B-32."""

    def __init__(self, visual: Any) -> None:
        from open_clip.transformer import ResidualAttentionBlock

        self._visual = visual
        self.blocks = visual.transformer.resblocks
        self.reads_class_token_only = (
            visual.pool_type == "tok"
            and visual.attn_pool is None
            and type(self.blocks[-1]) is ResidualAttentionBlock
        )

    def embed(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self._visual._embeds(pixels)
        return tokens

    def class_token_block(self, tokens: Tensor) -> Tensor:
        block: Any = self.blocks[-1]
        normed = block.ln_1(tokens)
        attended = block.attention(q_x=normed[:, :1], k_x=normed, v_x=normed)
        class_token: Tensor = tokens[:, :1] + block.ls_1(attended)  # (B, 1, W)
        changed: Tensor = block.ls_2(block.mlp(block.ln_2(class_token)))
        return class_token + changed

    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        pooled: Tensor = self._visual._pool(tokens)[0]
        return pooled, pooled @ self._visual.proj


def split_tower(visual: Any) -> SplitTower | None:
    """Take a tower apart, or None. Subclasses may do anything, so only the exact types count."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    if type(visual) is TimmModel and type(visual.trunk) is TimmTransformer:
        return _TimmTower(visual) if visual.trunk.global_pool else None
    if type(visual) is OpenClipTransformer and visual.transformer.batch_first:
        return _OpenClipTower(visual) if visual.pool_type != "none" else None
    return None


def run_whole(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled output and embedding of a tower that is not taken apart."""
    if hasattr(visual, "trunk"):
        pooled = visual.trunk(pixels)
        embedding = visual.head(pooled)
        return (pooled if pooled.ndim == 2 else embedding), embedding
    output = visual(pixels)
    embedding = output[0] if isinstance(output, tuple) else output
    return embedding, embedding


def _is_plain_timm_block(block: nn.Module) -> bool:
    """Whether a block is what :meth:`_TimmTower.class_token_block` spells out, and no more."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and {name for name, _ in block.attn.named_children()} <= known
    )


def _attend_with_class_token(attn: Any, tokens: Tensor) -> Tensor:
    """``attn(tokens)[:, :1]`` of timm's attention, without the other tokens' queries.

    The fused projection stacks the weights of queries, keys and values, A rows each; its first A
    rows are applied to the class token, the others to all tokens.
    """
    B, T, _ = tokens.shape
    A = attn.num_heads * attn.head_dim
    heads = (attn.num_heads, attn.head_dim)
    weight_q, weight_kv = attn.qkv.weight.split([A, 2 * A])
    bias_q, bias_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([A, 2 * A])
    q = F.linear(tokens[:, :1], weight_q, bias_q).view(B, 1, *heads).transpose(1, 2)
    k, v = F.linear(tokens, weight_kv, bias_kv).view(B, T, 2, *heads).permute(2, 0, 3, 1, 4)
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=dropout)
    mixed = mixed.transpose(1, 2).reshape(B, 1, A)  # (B, heads, 1, head_dim) -> (B, 1, A)
    mixed = attn.norm(mixed) if hasattr(attn, "norm") else mixed
    attended: Tensor = attn.proj_drop(attn.proj(mixed))
    return attended
