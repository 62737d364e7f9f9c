"""timm's vision transformers: seeded random ones, and any of them taken apart at a block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_cache.common.wording import suggest
from cxr_cache.encoders.sources import Source
from cxr_cache.encoders.towers import SplitTower, join_heads, softmax_products, split_heads
from cxr_cache.errors import EncoderError

RANDOM_EMBEDDING_WIDTH = 512  # BiomedCLIP's, so that stores of random encoders have its shapes


def find_random(identifier: str) -> Source:
    """A timm architecture that will be filled with noise, projected as BiomedCLIP is."""
    import timm

    architecture, _, seed = identifier.partition(":")
    if not timm.is_model(architecture):
        raise EncoderError(
            f"timm {timm.__version__} has no architecture '{architecture}'."
            f"{suggest(architecture, timm.list_models())}"
        )
    if not re.fullmatch(r"\d{0,18}", seed):
        raise EncoderError(f"The seed in random:{identifier} is not a whole number.")
    timm_cfg = timm.models.get_pretrained_cfg(architecture)
    model_cfg = {
        "embed_dim": RANDOM_EMBEDDING_WIDTH,
        "vision_cfg": {
            "timm_model_name": architecture,
            "timm_pool": "",  # the architecture's own
            "timm_proj": "linear",
            "image_size": timm_cfg.input_size[-1] if timm_cfg else 224,
        },
    }
    name = f"random:{architecture}:{int(seed or 0)}"
    return Source(name, name, model_cfg, {}, weights=None, seed=int(seed or 0))


class PooledTower(nn.Module):
    """A tower of timm, how its tokens are pooled, and what its own library does with the result.

    `pool` is ``"default"`` for the tower's own way, and the projection `head` after it. The
    others take the tokens after the final norm, without projection: ``"cls"`` the class token,
    ``"mean"`` the mean over patches, ``"cls+mean"`` the two side by side. Registers are neither.
    `positions_from_px` is the size of the images that position embeddings were trained on, where
    they were resampled for this tower.
    """

    def __init__(
        self,
        trunk: Any,
        head: nn.Module | None = None,
        pool: str = "default",
        positions_from_px: int | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head or nn.Identity()
        self.pool, self.positions_from_px = pool, positions_from_px

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the embedding, ``(B, D)``."""
        return self.encode(pixels)[1]

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pooled output and embedding of normalised pixels."""
        if self.pool == "default":
            pooled = self.trunk(pixels)
            return pooled, self.head(pooled)
        return self.finish(self.trunk.forward_features(pixels))

    def finish(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the tokens after the final norm into pooled output and embedding."""
        trunk = self.trunk
        if self.pool == "default":
            pooled = trunk.forward_head(normed, pre_logits=True)
            return pooled, self.head(trunk.head(pooled))
        parts = []
        if "cls" in self.pool:
            parts.append(trunk.fc_norm(normed[:, 0]))  # either this norm or the one before is none
        if "mean" in self.pool:
            parts.append(trunk.fc_norm(normed[:, trunk.num_prefix_tokens :].mean(dim=1)))
        pooled = torch.cat(parts, dim=-1)
        return pooled, pooled


def pool_otherwise(visual: Any, pool: str, name: str) -> PooledTower:
    """Make a tower of timm's VisionTransformer that pools in another way than its own.

    Raises
    ------
    EncoderError
        The tower is of another kind, or has no class token.
    """
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    trunk = getattr(visual, "trunk", None)
    if not isinstance(trunk, VisionTransformer | Eva):
        raise EncoderError(
            f"{name} pools in one way only: --pool is for vision transformers of timm and Hugging "
            f"Face, and its image tower is a {type(trunk or visual).__name__}. Leave --pool out."
        )
    if "cls" in pool and trunk.cls_token is None:
        raise EncoderError(
            f"{name} has no class token that --pool {pool} could take. Choose --pool mean, or "
            "leave it out."
        )
    return PooledTower(trunk, None, pool, getattr(visual, "positions_from_px", None))


def split_pooled(visual: Any) -> SplitTower | None:
    """Take a tower apart, or None. Subclasses may do anything, so only the exact type counts."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    trunk = visual.trunk
    if visual.pool == "default" and not getattr(trunk, "global_pool", ""):
        return None
    if type(trunk) is Eva and not getattr(trunk, "rope_mixed", False):
        return EvaTower(visual)
    return TimmTower(visual) if type(trunk) is VisionTransformer else None


class TimmTower(SplitTower):
    """timm's VisionTransformer inside an adapter: open_clip's (BiomedCLIP), or ours."""

    def __init__(self, visual: Any) -> None:
        self._trunk, self._head = visual.trunk, visual.head
        self._visual = visual
        pool = getattr(visual, "pool", "default")
        self.blocks = self._trunk.blocks
        self.reads_class_token_only = (
            pool == "cls"
            or (
                pool == "default"
                and self._trunk.global_pool == "token"
                and self._trunk.attn_pool is None
            )
        ) and _is_plain_timm_block(self.blocks[-1])
        self.patch_grid = tuple(self._trunk.patch_embed.grid_size)

    def quicken(self, block: nn.Module) -> nn.Module:
        return _QuickBlock(block) if _may_be_quick(block) else block

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

    def shows_attention(self, block: nn.Module) -> bool:
        return _is_plain_timm_block(block)

    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attn = block.attn
        q, k, v = split_heads(attn.qkv(block.norm1(tokens)), attn.num_heads)
        attention = softmax_products(attn.q_norm(q), attn.k_norm(k))
        mixed = join_heads(attention @ v)
        mixed = attn.norm(mixed) if hasattr(attn, "norm") else mixed
        tokens = tokens + block.ls1(attn.proj(mixed))
        return tokens + block.ls2(block.mlp(block.norm2(tokens))), attention

    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        normed = self._trunk.norm(tokens)
        if isinstance(self._visual, PooledTower):
            return self._visual.finish(normed)
        pooled = self._trunk.forward_head(normed, pre_logits=True)
        return pooled, self._head(self._trunk.head(pooled))


class EvaTower(SplitTower):
    """timm's Eva: DINOv3 and EVA-X, whose blocks also take the rotary positions of the patches.

    They depend on the grid alone, so that a tail makes them again.
    """

    tokens_hold_positions = False

    def __init__(self, visual: PooledTower) -> None:
        self._visual = visual
        self.blocks = [_RotatedBlock(block, visual.trunk) for block in visual.trunk.blocks]
        own = visual.pool == "default" and visual.trunk.global_pool == "token"
        self.reads_class_token_only = (
            visual.pool == "cls" or own
        ) and visual.trunk.attn_pool is None
        self.patch_grid = tuple(visual.trunk.patch_embed.grid_size)

    def embed(self, pixels: Tensor) -> Tensor:
        trunk: Any = self._visual.trunk
        tokens: Tensor = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(pixels))[0])
        return tokens

    def class_token_block(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.blocks[-1](tokens)
        return mixed[:, :1]

    def shows_attention(self, block: nn.Module) -> bool:
        return True

    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attn = block.block.attn
        seen: list[Tensor] = []  # it passes its dropout, unless one kernel computes all
        hook = attn.attn_drop.register_forward_hook(lambda _m, _i, output: seen.append(output))
        is_fused, attn.fused_attn = attn.fused_attn, False
        try:
            tokens = block(tokens)
        finally:
            attn.fused_attn = is_fused
            hook.remove()
        return tokens, seen[0]

    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        trunk: Any = self._visual.trunk
        return self._visual.finish(trunk.norm(tokens))


class _RotatedBlock(nn.Module):
    """A block of Eva together with the rotary positions of its tower."""

    def __init__(self, block: nn.Module, trunk: Any) -> None:
        super().__init__()
        self.block, self.rope = block, trunk.rope
        self._grid = tuple(trunk.patch_embed.grid_size)

    def forward(self, tokens: Tensor) -> Tensor:
        rope = self.rope
        if rope is not None:  # one that was made for a grid knows it
            is_fixed = getattr(rope, "feat_shape", None) is not None
            rope = rope.get_embed() if is_fixed else rope.get_embed(shape=self._grid)
        mixed: Tensor = self.block(tokens, rope=rope)
        return mixed


def _is_plain_timm_block(block: nn.Module) -> bool:
    """Whether a block is what :meth:`TimmTower.class_token_block` spells out, and no more."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and {name for name, _ in block.attn.named_children()} <= known
    )


def _may_be_quick(block: Any) -> bool:
    """Whether :class:`_QuickBlock` computes what a block does, and this processor can."""
    from timm.layers.mlp import Mlp

    if not (_is_plain_timm_block(block) and type(block.mlp) is Mlp):
        return False
    absent = (block.attn.q_norm, block.attn.k_norm, getattr(block.attn, "norm", None))
    return (
        type(block.mlp.fc1) is nn.Linear
        and all(part is None or isinstance(part, nn.Identity) for part in (*absent, block.mlp.norm))
        and packs_bf16()
    )


def packs_bf16() -> bool:
    """Whether torch has oneDNN, by the names that its compiler uses, and bf16 for this processor.

    They are not public and may go, and builds of torch for Apple's processors have none.
    """
    names = ("_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight")
    has_all = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has_all and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _QuickBlock(nn.Module):
    """A plain block in bf16, for inference on a CPU, whose linear layers are cast to bf16 already.

    Weights are laid out beforehand as oneDNN's products read them, and biases and GELU are computed
    while a product's sums are in registers, which is what ``torch.compile`` does with frozen
    weights. The sum over blocks and the scores of attention stay float32. Of a real tower
    (DINOv2-small), embeddings with scores in bf16 miss a cosine of 0.9999 to those in fp32, and
    single tokens with sums in bf16 fall to 0.998, for 1 % of the time.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self._block, attn, mlp = block, block.attn, block.mlp
        self._qkv, self._proj = _PackedLinear(attn.qkv), _PackedLinear(attn.proj)
        gelu = _name_gelu(mlp.act)
        self._fc1, self._fc2 = _PackedLinear(mlp.fc1, gelu), _PackedLinear(mlp.fc2)
        self._act = mlp.act if gelu is None else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        block = self._block
        with torch.autocast("cpu", enabled=False):
            tokens = tokens.float()
            tokens = tokens + block.ls1(self._attend(block.norm1(tokens)))
            tokens += block.ls2(self._fc2(self._act(self._fc1(block.norm2(tokens)))))
        return tokens

    def _attend(self, tokens: Tensor) -> Tensor:
        q, k, v = split_heads(self._qkv(tokens), self._block.attn.num_heads)
        mixed: Tensor = self._proj(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return mixed


def _name_gelu(activation: nn.Module) -> str | None:
    """Give oneDNN's name of a kind of GELU; None for other functions."""
    from timm.layers.activations import GELU, GELUTanh

    if type(activation) is nn.GELU:
        return str(activation.approximate)
    return {GELU: "none", GELUTanh: "tanh"}.get(type(activation))


class _PackedLinear(nn.Module):
    """A linear layer in bf16, and the GELU that may follow it, by one product of oneDNN."""

    def __init__(self, layer: nn.Linear, gelu: str | None = None) -> None:
        super().__init__()
        self._layer, self._gelu = layer, gelu
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        if torch.compiler.is_compiling():  # the compiler packs and joins by itself
            product: Tensor = self._layer(x)
            return product if self._gelu is None else F.gelu(product, approximate=self._gelu)
        act = "none" if self._gelu is None else "gelu"
        multiply = torch.ops.mkldnn._linear_pointwise
        return cast(Tensor, multiply(x, self._packed, self._layer.bias, act, [], self._gelu))


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
