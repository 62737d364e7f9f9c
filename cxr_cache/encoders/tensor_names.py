"""Names of tensors: those of checkpoints of transformers and of Meta's repositories, and timm's.

Reading, one table serves all families, since none of the names means two things. Messages name
tensors as their file does, also those that it lacks: for that each family has a table of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from cxr_cache.encoders.weights import held_twice

_PREFIXES: Final = re.compile(r"^(?:vision_model|dinov2|dinov2_with_registers|vit)\.")
"""What models for more than embeddings call the tower."""
_IGNORED: Final = re.compile(
    r"text_model\..*|text_projection\..*|logit_scale|logit_bias|classifier\..*|head\.(weight|bias)"
    r"|(?:dino_head|ibot_head|student|local_cls_norm)\..*|decoder\.\d+\.(weight|bias)"
    r"|decoder_(?:embed|blocks|norm|pred)\..*|decoder_pos_embed"
    r"|head\.(?:(?:mlp\.)?\d+|last_layer)\.\w+"
    r"|(?:embeddings\.)?mask_token|.*\.position_ids|rope_embeddings\.inv_freq|rope_embed\.periods"
)
"""Tensors that no embedding of an image needs: the other tower, what was trained on top or beside,
what masked patches were replaced by, and positions that follow from the configuration."""

_WB: Final = r"(\.weight|\.bias)"
_NAMES: Final = [
    (re.compile(pattern), name)
    for pattern, name in {
        r"embeddings\.(?:cls_token|class_embedding)|cls_token": "trunk.cls_token",
        r"(?:embeddings\.)?register_tokens|storage_tokens": "trunk.reg_token",
        r"embeddings\.position_embeddings?(?:\.weight)?|pos_embed": "trunk.pos_embed",
        r"embeddings\.(?:patch_embeddings(?:\.projection)?|patch_embedding)" + _WB: (
            r"trunk.patch_embed.proj\1"
        ),
        r"patch_embed\.proj" + _WB: r"trunk.patch_embed.proj\1",
        r"pre_layrnorm" + _WB: r"trunk.norm_pre\1",  # spelt like this by transformers
        r"(?:layernorm|post_layernorm|norm)" + _WB: r"trunk.norm\1",
        # DINOv2's own trainer keeps blocks in groups, with their numbers after the group's.
        r"(?:encoder\.)?(?:layers?|blocks)\.(?:\d+\.)?(\d+)\.(.*)": r"trunk.blocks.\1.\2",
        r"visual_projection(\.weight)": r"head\1",
        r"pooler\.dense" + _WB: r"head.dense\1",
        r"head\.probe": "trunk.attn_pool.latent",
        r"head\.attention\.in_proj_(weight|bias)": r"trunk.attn_pool.qkv.\1",
        r"head\.attention\.out_proj" + _WB: r"trunk.attn_pool.proj\1",
        r"head\.layernorm" + _WB: r"trunk.attn_pool.norm\1",
        r"head\.mlp\.(fc[12])" + _WB: r"trunk.attn_pool.mlp.\1\2",
    }.items()
]
_NAMES_IN_BLOCKS: Final = [
    (re.compile(pattern + r"(\.weight|\.bias)$"), name)
    for pattern, name in {
        r"\.(?:attention\.attention\.|attention\.|self_attn\.)query": ".attn.q",
        r"\.(?:attention\.attention\.|attention\.|self_attn\.)key": ".attn.k",
        r"\.(?:attention\.attention\.|attention\.|self_attn\.)value": ".attn.v",
        r"\.(?:attention\.|self_attn\.)q_proj": ".attn.q",
        r"\.(?:attention\.|self_attn\.)k_proj": ".attn.k",
        r"\.(?:attention\.|self_attn\.)v_proj": ".attn.v",
        r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)": ".attn.proj",
        r"\.(?:layernorm_before|layer_norm1)": ".norm1",
        r"\.(?:layernorm_after|layer_norm2)": ".norm2",
        r"\.(?:intermediate\.dense|mlp\.weights_in|mlp\.w12)": ".mlp.fc1",
        r"\.(?:output\.dense|mlp\.weights_out|mlp\.w3|mlp\.down_proj)": ".mlp.fc2",
        r"\.mlp\.(?:gate_proj|w1)": ".mlp.gate",
        r"\.mlp\.(?:up_proj|w2)": ".mlp.value",
    }.items()
]
_JOINED: Final = {".qkv": (".q", ".k", ".v"), ".fc1": (".gate", ".value")}
"""Matrices that timm keeps as one, and their parts in order."""


def rename_tensors(tensors: Mapping[str, Tensor], path: Any) -> dict[str, Tensor]:
    """Give a checkpoint's tensors the names that :class:`PooledTower` has for them.

    Tensors that no image needs are left out by name; unknown ones keep their names, for
    :func:`cxr_cache.encoders.weights.fill_tower` to refuse.

    Raises
    ------
    EncoderError
        Two tensors would be the same.
    """
    renamed: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        bare = _PREFIXES.sub("", name)
        if _IGNORED.fullmatch(bare) or not tensor.numel():  # no registers are an empty tensor
            continue
        new = _rename(bare)
        if new in renamed:
            raise held_twice(path, origins[new], name)
        renamed[new], origins[new] = tensor, name
    for whole, parts in _JOINED.items():
        for name in [name for name in renamed if re.search(rf"{re.escape(parts[0])}\.\w+$", name)]:
            stem, _, kind = name.rpartition(f"{parts[0]}.")
            named = [f"{stem}{part}.{kind}" for part in parts]
            shapes = {tuple(renamed[p].shape[1:]) if p in renamed else None for p in named}
            if len(shapes) == 1 and None not in shapes:
                renamed[f"{stem}{whole}.{kind}"] = torch.cat([renamed.pop(part) for part in named])
    for name in [name for name in renamed if ".mlp.value." in name]:  # there was no gate
        renamed[name.replace(".mlp.value.", ".mlp.fc1.")] = renamed.pop(name)
    for name in [name for name in renamed if name.startswith("trunk.attn_pool.qkv.")]:
        tensor, kind = renamed.pop(name), name.rpartition(".")[2]
        width = len(tensor) // 3
        renamed[f"trunk.attn_pool.q.{kind}"] = tensor[:width]
        renamed[f"trunk.attn_pool.kv.{kind}"] = tensor[width:]
    return renamed


def _rename(name: str) -> str:
    """Give the tower's name of one tensor; an unknown one keeps its own."""
    for pattern, new in _NAMES:
        if match := pattern.fullmatch(name):
            renamed = match.expand(new)
            break
    else:
        return name
    if ".blocks." not in renamed:
        return renamed
    renamed = re.sub(r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma", renamed)
    for pattern, new in _NAMES_IN_BLOCKS:
        renamed, n_found = pattern.subn(rf"{new}\1", renamed)
        if n_found:
            break
    return renamed


# -- names for messages -------------------------------------------------------------------

_DINO: Final = {
    "trunk.cls_token": "embeddings.cls_token",
    "trunk.pos_embed": "embeddings.position_embeddings",
    "trunk.reg_token": "embeddings.register_tokens",
    "trunk.patch_embed.proj": "embeddings.patch_embeddings.projection",
    "trunk.norm": "layernorm",
    "trunk.blocks": "encoder.layer",
    ".attn.qkv": ".attention.attention.query|key|value",
    ".attn.proj": ".attention.output.dense",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
}
_DINO3: Final = {
    **_DINO,
    "trunk.patch_embed.proj": "embeddings.patch_embeddings",
    "trunk.norm": "norm",
    "trunk.blocks": "layer",
    ".attn.qkv": ".attention.q_proj|k_proj|v_proj",
    ".attn.q_bias": ".attention.q_proj.bias",
    ".attn.v_bias": ".attention.v_proj.bias",
    ".attn.proj": ".attention.o_proj",
    ".gamma_1": ".layer_scale1.lambda1",
    ".gamma_2": ".layer_scale2.lambda1",
    ".mlp.fc1": ".mlp.up_proj",
    ".mlp.fc2": ".mlp.down_proj",
}
_VIT: Final = {
    **_DINO,
    "head.dense": "pooler.dense",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    ".mlp.fc1": ".intermediate.dense",
    ".mlp.fc2": ".output.dense",
}
_CLIP: Final = {
    "trunk.attn_pool.latent": "head.probe",
    "trunk.attn_pool.q.weight": "head.attention.in_proj_weight",
    "trunk.attn_pool.q.bias": "head.attention.in_proj_bias",
    "trunk.attn_pool.kv.weight": "head.attention.in_proj_weight",
    "trunk.attn_pool.kv.bias": "head.attention.in_proj_bias",
    "trunk.attn_pool.proj": "head.attention.out_proj",
    "trunk.attn_pool.norm": "head.layernorm",
    "trunk.attn_pool": "head",
    "trunk.cls_token": "embeddings.class_embedding",
    "trunk.pos_embed": "embeddings.position_embedding.weight",
    "trunk.patch_embed.proj": "embeddings.patch_embedding",
    "trunk.norm_pre": "pre_layrnorm",
    "trunk.norm": "post_layernorm",
    "trunk.blocks": "encoder.layers",
    ".attn.qkv": ".self_attn.q_proj|k_proj|v_proj",
    ".attn.proj": ".self_attn.out_proj",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
    "head.weight": "visual_projection.weight",
}
_DINO_REPOSITORY: Final = {"trunk.reg_token": "register_tokens", "trunk": ""}
_DINO3_REPOSITORY: Final = {
    "trunk.reg_token": "storage_tokens",
    ".attn.q_bias": ".attn.qkv.bias",
    ".attn.k_bias": ".attn.qkv.bias",
    ".attn.v_bias": ".attn.qkv.bias",
    ".gamma_1": ".ls1.gamma",
    ".gamma_2": ".ls2.gamma",
    "trunk": "",
}
EVA_X: Final = {
    "trunk.fc_norm": "norm",
    ".mlp.norm": ".mlp.ffn_ln",
    ".attn.norm": ".attn.inner_attn_ln",
    ".attn.q_proj.bias": ".attn.q_bias",
    ".attn.v_proj.bias": ".attn.v_bias",
    "trunk": "",
}
EVA_X_GATED: Final = {
    ".mlp.fc1_g": ".mlp.w1",
    ".mlp.fc1_x": ".mlp.w2",
    ".mlp.fc2": ".mlp.w3",
    **EVA_X,
}
"""Parts of names in a tower of timm, and what checkpoints call them; bars part several names."""

_KINDS: Final = {"dinov2_with_registers": "dinov2"} | {
    n: n for n in ("dinov2", "dinov3_vit", "vit")
}
_TABLES: Final[dict[tuple[str, bool], tuple[Mapping[str, str], Mapping[str, str]]]] = {
    ("dinov2", False): (_DINO, {".mlp.fc1": ".mlp.weights_in", ".mlp.fc2": ".mlp.weights_out"}),
    ("dinov2", True): (_DINO_REPOSITORY, {".mlp.fc1": ".mlp.w12", ".mlp.fc2": ".mlp.w3"}),
    ("dinov3_vit", False): (_DINO3, {".mlp.fc1": ".mlp.gate_proj|up_proj"}),
    ("dinov3_vit", True): (_DINO3_REPOSITORY, {".mlp.fc1": ".mlp.w1|w2", ".mlp.fc2": ".mlp.w3"}),
    ("vit", False): (_VIT, {}),
    ("vit", True): (_DINO_REPOSITORY, {}),
    ("clip", False): (_CLIP, {}),
    ("clip", True): (_CLIP, {}),
}
"""By kind of tower, and whether names are those of Meta's repositories: the table, and what is
called otherwise in blocks with a gate."""


def spell(name: str, table: Mapping[str, str]) -> list[str]:
    """Give the names in a checkpoint of what a tower of timm holds under one.

    Examples
    --------
    >>> spell("trunk.blocks.0.attn.qkv.weight", {"trunk": "", ".qkv": ".query|key"})
    ['blocks.0.attn.query.weight', 'blocks.0.attn.key.weight']
    """
    for part, new in table.items():
        name = re.sub(rf"(?:^|(?=\.)){re.escape(part)}(?=\.|$)", new, name, count=1)
    name = name.removeprefix(".")
    start, bar, rest = name.partition("|")
    if not bar:
        return [name]
    stem, _, first = start.rpartition(".")
    *others, end = rest.split("|")
    last, _, kind = end.partition(".")
    return [f"{stem}.{part}.{kind}" for part in (first, *others, last)]


def make_speller(
    names: Collection[str], model_type: str, settings: Mapping[str, Any]
) -> Callable[[str], list[str]]:
    """Make what gives the names in a checkpoint of a tensor that a tower of timm holds.

    `names` are the checkpoint's. Those that it lacks are spelled as the others are.
    """
    origins: dict[str, list[str]] = {}
    prefixes: Counter[str] = Counter()
    for name in names:
        bare = _PREFIXES.sub("", name)
        renamed = _rename(bare)
        prefixes[name.removesuffix(bare)] += renamed != bare
        origins[renamed] = [name]
    for whole, parts in _JOINED.items():
        for name in [name for name in origins if f"{parts[0]}." in name]:
            joined = [name.replace(f"{parts[0]}.", f"{part}.") for part in parts]
            if all(part in origins for part in joined):
                origins[name.replace(f"{parts[0]}.", f"{whole}.")] = [
                    origins[part][0] for part in joined
                ]
    prefix = max(prefixes, key=lambda found: prefixes[found], default="")
    is_repository = any(_PREFIXES.sub("", name).startswith("blocks.") for name in names)
    table, gated = _TABLES[_KINDS.get(model_type, "clip"), is_repository]
    if settings.get("use_swiglu_ffn") or settings.get("use_gated_mlp"):
        table = {**table, **gated}

    def spell_missing(name: str) -> list[str]:
        is_outside = name.startswith("head.weight")  # transformers keeps it beside the tower
        return [each if is_outside else prefix + each for each in spell(name, table)]

    return lambda name: origins.get(name) or spell_missing(name)
