"""A vision transformer taken apart at a block: stem and tail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    def is_spelled_out(self, block: nn.Module) -> bool:
        """Whether :meth:`block_with_attention` is what a block does."""

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
        self.patch_grid = tuple(self._trunk.patch_embed.grid_size)

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

    def is_spelled_out(self, block: nn.Module) -> bool:
        return _is_plain_timm_block(block)

    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attn = block.attn
        q, k, v = _split_heads(attn.qkv(block.norm1(tokens)), attn.num_heads)
        attention = _softmax_products(attn.q_norm(q), attn.k_norm(k))
        mixed = _join_heads(attention @ v)
        mixed = attn.norm(mixed) if hasattr(attn, "norm") else mixed
        tokens = tokens + block.ls1(attn.proj(mixed))
        return tokens + block.ls2(block.mlp(block.norm2(tokens))), attention

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
        self.patch_grid = tuple(visual.grid_size)

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

    def is_spelled_out(self, block: nn.Module) -> bool:
        from open_clip.transformer import ResidualAttentionBlock

        return type(block) is ResidualAttentionBlock and type(block.attn) is nn.MultiheadAttention

    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attn = block.attn
        projected = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = _split_heads(projected, attn.num_heads)
        attention = _softmax_products(q, k)
        tokens = tokens + block.ls_1(attn.out_proj(_join_heads(attention @ v)))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens))), attention

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


def _split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused projection ``(B, T, 3 A)`` -> queries, keys, values, ``(B, heads, T, head_dim)``."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def _softmax_products(q: Tensor, k: Tensor) -> Tensor:
    """Scaled dot-product attention weights (Vaswani et al. 2017, eq. 1), ``(B, heads, T, T)``."""
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), dim=-1)


def _join_heads(mixed: Tensor) -> Tensor:
    """``(B, heads, T, head_dim)`` -> ``(B, T, A)``."""
    return mixed.transpose(1, 2).flatten(2)


def _attend_with_class_token(attn: Any, tokens: Tensor) -> Tensor:
    """``attn(tokens)[:, :1]`` of timm's attention, without the other tokens' queries.

    The fused projection stacks the weights of queries, keys and values, A rows each; its first A
    rows are applied to the class token only.
    """
    B = tokens.shape[0]  # len() would be a constant in an exported graph
    A = attn.num_heads * attn.head_dim
    weights = attn.qkv.weight.split(A)
    biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.split(A)
    q = F.linear(tokens[:, :1], weights[0], biases[0]).view(B, attn.num_heads, attn.head_dim)
    is_linear = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    drops = attn.training and attn.attn_drop.p > 0
    mix = _mix_tokens if is_linear and not drops else _mix_values
    mixed = mix(attn, q, tokens, weights[1:], biases[1:]).reshape(B, 1, A)
    mixed = attn.norm(mixed) if hasattr(attn, "norm") else mixed
    attended: Tensor = attn.proj_drop(attn.proj(mixed))
    return attended


def _mix_tokens(
    attn: Any, q: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """What one query per head attends to, ``(B, heads, head_dim)``, with no key or value computed.

    With one query q, tokens x_t and per head the matrices K, V and biases b, c:

        q . (K x_t + b) = (K^T q) . x_t + const,  and softmax does not notice the constant
        sum_t a_t (V x_t + c) = V (sum_t a_t x_t) + c,  for the a_t sum to one

    so the two projections of all tokens become two of one vector per head.
    """
    heads, head_dim = attn.num_heads, attn.head_dim
    weight_k, weight_v = (weight.view(heads, head_dim, -1) for weight in weights)
    direction = torch.einsum("bhd,hdw->bhw", q * head_dim**-0.5, weight_k)  # (B, heads, W)
    attention = torch.softmax(direction @ x.transpose(1, 2), dim=-1)  # (B, heads, T)
    mixed = torch.einsum("bhw,hdw->bhd", attention.to(x.dtype) @ x, weight_v)
    return mixed if biases[1] is None else mixed + biases[1].view(heads, head_dim)


def _mix_values(
    attn: Any, q: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """The same where keys are normalised, or attention is dropped out: keys and values of all."""
    heads = (*x.shape[:2], attn.num_heads, attn.head_dim)
    k, v = (
        F.linear(x, weight, bias).view(heads).transpose(1, 2)  # (B, heads, T, head_dim)
        for weight, bias in zip(weights, biases, strict=True)
    )
    dropout = attn.attn_drop.p if attn.training else 0.0
    q = attn.q_norm(q[:, :, None])
    return F.scaled_dot_product_attention(q, attn.k_norm(k), v, dropout_p=dropout)
