"""open_clip's vision tower as an encoder: load it, identify it, run it whole or in two parts.

Only the image half of a model is built and read; the text tower costs more parameters than the
image tower, and a download of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cxr_cache.common.devices import (
    Precision,
    require_choice,
    resolve_device,
    resolve_precision,
)
from cxr_cache.config import DEFAULT_ENCODER
from cxr_cache.datasets.images import Preprocessing, normalise
from cxr_cache.encoders.sources import Source, find_source
from cxr_cache.encoders.towers import SplitTower, run_whole, split_tower
from cxr_cache.encoders.weights import fill_with_noise, hash_tensors, load_weights
from cxr_cache.errors import ConfigError, EncoderError, suggest

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RESIZE_OF_MODE = {"shortest": "crop", "squash": "squash"}
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EncoderIdentity:
    """What decides whether two sets of features may be mixed, as a store records it.

    Widths and counts are those of one real forward pass; None where there is no such thing:
    blocks and tokens of a tower that cannot be split, the pooled output of imported embeddings.
    """

    name: str
    revision: str | None
    """Commit of the repository; None where there is none (a folder, random weights)."""
    weights_sha256: str
    """Of the vision tensors as loaded: names, types, shapes and bytes, whatever file held them."""
    preprocessing: Mapping[str, Any]
    """What :meth:`Preprocessing.to_dict` gives: size, statistics, resizing and decode rule."""
    precision: str
    n_blocks: int | None
    n_tokens: int | None
    token_width: int | None
    pooled_width: int | None
    embedding_width: int
    is_random: bool
    """The weights are seeded noise: for demonstrations, tests and speed, not for findings."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderIdentity:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        EncoderError
            A field is missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise EncoderError(
                f"An encoder's identity holds the fields {sorted(expected)}, not {sorted(values)}."
            )
        return cls(**values)

    def differences(self, other: EncoderIdentity) -> dict[str, tuple[Any, Any]]:
        """What makes features of the two incomparable: field -> (mine, theirs).

        Equal weights under two names are the same encoder, so names count only where the
        weights differ. An empty answer means that the features may be mixed.
        """
        mine, theirs = self._comparable(), other._comparable()
        if self.weights_sha256 == other.weights_sha256:
            mine["name"] = theirs["name"] = None
        return {
            field: (mine.get(field), theirs.get(field))
            for field in mine | theirs
            if mine.get(field) != theirs.get(field)
        }

    def _comparable(self) -> dict[str, Any]:
        """The fields that matter, with the preprocessing's among them."""
        own = {
            name: value
            for name, value in self.to_dict().items()
            if name not in ("revision", "preprocessing", "is_random")
        }
        return own | dict(self.preprocessing)


class Encoder(nn.Module):
    """A frozen vision tower together with the preprocessing that it expects.

    Parameters are named as in the checkpoint (``visual.trunk.blocks.11.norm1.weight``), take no
    gradient until a caller says so, and stay float32: lower precisions are autocast.

    Attributes
    ----------
    visual
        open_clip's tower.
    preprocessing
        How a file becomes pixels, and pixels become the tower's input.
    precision
        ``"fp32"``, ``"bf16"`` or ``"fp16"``: what matrix products are computed in.
    identity
        What a store records.
    """

    identity: EncoderIdentity

    def __init__(
        self, visual: nn.Module, preprocessing: Preprocessing, precision: Precision, source: Source
    ) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.precision = precision
        self._name = source.name
        self._split = split_tower(visual)
        self.identity = self._identify(source)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs are brought."""
        return next(self.visual.parameters()).device

    @property
    def is_splittable(self) -> bool:
        """Whether :meth:`stem` and :meth:`tail` exist for this tower."""
        return self._split is not None

    def stem(self, pixels: Tensor, n_unfrozen: int) -> Tensor:
        """The frozen part of the tower: everything before the last `n_unfrozen` blocks.

        Parameters
        ----------
        pixels
            Normalised images, float32, shape ``(B, 3, S, S)``.
        n_unfrozen
            Blocks left to :meth:`tail`, from 1 to all.

        Returns
        -------
        Tensor
            Tokens that enter the first unfrozen block, float32, shape ``(B, T, W)``.

        Raises
        ------
        EncoderError
            The tower cannot be split, or has fewer blocks.
        """
        split = self._require_split(n_unfrozen)
        with self._autocast():
            return split.stem(pixels.to(self.device), n_unfrozen).float()

    def tail(
        self,
        tokens: Tensor,
        n_unfrozen: int,
        *,
        precision: Precision | None = None,
        keeps_activations: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The end of the tower: the last `n_unfrozen` blocks, pooling and projection.

        Gradients flow to whatever parameters ask for them. Where the tower pools its class
        token, the last block computes that token only, which changes no result.

        Parameters
        ----------
        tokens
            Output of :meth:`stem` for the same `n_unfrozen`, any float type.
        n_unfrozen
            Blocks that are left, from 1 to all.
        precision
            What matrix products are computed in; None for the encoder's own.
        keeps_activations
            Off, a backward pass computes each block again: less memory, more work.

        Returns
        -------
        pooled
            Before the projection, float32, shape ``(B, P)``.
        embedding
            After it, float32, shape ``(B, D)``, in the encoder's scale, not normalised.

        Raises
        ------
        EncoderError
            The tower cannot be split, or has fewer blocks.
        """
        split = self._require_split(n_unfrozen)
        tokens = tokens.to(self.device, non_blocking=True).float()  # float16 travels, not float32
        with self._autocast(precision):
            pooled, embedding = split.tail(tokens, n_unfrozen, keeps_activations=keeps_activations)
        return pooled.float(), embedding.float()

    def tail_with_attention(self, tokens: Tensor, n_unfrozen: int) -> tuple[Tensor, list[Tensor]]:
        """The embedding of :meth:`tail`, in float32, with what every block attended to.

        Gradients of anything computed from the embedding exist for the attention, too.

        Parameters
        ----------
        tokens
            As :meth:`tail` takes them; where no parameter asks for gradients, they must.
        n_unfrozen
            Blocks counted from the end, from 1 to all.

        Returns
        -------
        embedding
            float32, shape ``(B, D)``.
        attentions
            One per block, first to last, ``(B, heads, T, T)``; the patches are the last
            :attr:`patch_grid` tokens, the class token is the first.

        Raises
        ------
        EncoderError
            The tower cannot be split, has fewer blocks, pools other tokens than its class token, or
            its blocks are of a kind that is not spelled out.
        """
        split = self._require_split(n_unfrozen)
        blocks = split.blocks[len(split.blocks) - n_unfrozen :]
        if not split.reads_class_token_only or not all(map(split.is_spelled_out, blocks)):
            raise EncoderError(
                f"{self._name} cannot show where it looked: that is read off the class token's "
                "attention, and this tower pools other tokens, or has blocks of its own kind. "
                "Choose a ViT that pools its class token, as BiomedCLIP does."
            )
        return split.tail_with_attention(tokens.to(self.device).float(), n_unfrozen)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a tower that can be split."""
        return self._require_split(1).patch_grid

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled output and embedding of images, as open_clip's own tower gives them.

        Parameters
        ----------
        pixels
            Images as :func:`cxr_cache.datasets.images.read_image` gives them, uint8, shape
            ``(B, 3, S, S)``; normalised here, on the encoder's device.

        Returns
        -------
        pooled
            float32, shape ``(B, P)``, on the encoder's device; the embedding again where a tower
            does not keep the two apart.
        embedding
            float32, shape ``(B, D)``, not normalised.
        """
        if self.is_splittable:
            return self.encode_with_tokens(pixels, 1)[1:]
        with self._autocast():
            pooled, embedding = run_whole(self.visual, self.prepare(pixels))
        return pooled.float(), embedding.float()

    @torch.inference_mode()
    def encode_with_tokens(self, pixels: Tensor, n_unfrozen: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens before the last `n_unfrozen` blocks, pooled output and embedding, in one pass.

        Parameters and shapes are those of :meth:`encode`, :meth:`stem` and :meth:`tail`.
        """
        tokens = self.stem(self.prepare(pixels), n_unfrozen)
        return tokens, *self.tail(tokens, n_unfrozen)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Images as :meth:`encode` takes them -> the input of :meth:`stem`."""
        assert pixels.dtype == torch.uint8, f"pixels are {pixels.dtype}, not uint8"
        return normalise(pixels.to(self.device, non_blocking=True), self.preprocessing)

    @contextmanager
    def cast_weights(self) -> Iterator[None]:
        """Hold the weights of matrix products in the encoder's precision for a while.

        Autocast casts them anew in every pass, to the same bits: for ViT-B/16 on one core 0.15 s,
        what bf16 instructions need for half an image.
        """
        dtype = _AUTOCAST_DTYPES.get(self.precision)
        plain = (nn.Linear, nn.Conv2d)  # not their subclasses, whose owners may look at types
        layers = [module for module in self.visual.modules() if type(module) in plain]
        kept = [(p, p.data) for layer in layers for p in layer.parameters(recurse=False)]
        try:
            for parameter, values in kept if dtype is not None else ():
                parameter.data = values.to(dtype)
            yield
        finally:
            for parameter, values in kept:
                parameter.data = values

    def _autocast(self, precision: Precision | None = None) -> torch.autocast:
        dtype = _AUTOCAST_DTYPES.get(precision or self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _require_split(self, n_unfrozen: int) -> SplitTower:
        if self._split is None:
            inner = getattr(self.visual, "trunk", self.visual)
            raise EncoderError(
                f"{self._name} cannot be split into frozen and trainable blocks: its image tower "
                f"is a {type(inner).__name__}, and only plain vision transformers are taken "
                "apart. Work with its embeddings, or choose a ViT."
            )
        n_blocks = len(self._split.blocks)
        if not 1 <= n_unfrozen <= n_blocks:
            raise EncoderError(
                f"{self._name} has {n_blocks} blocks, of which {n_unfrozen} cannot be unfrozen. "
                f"Choose from 1 to {n_blocks}."
            )
        return self._split

    def _identify(self, source: Source) -> EncoderIdentity:
        """Run one black image, and record what came out beside what went in."""
        size_px = self.preprocessing.image_size_px
        black = torch.zeros(1, 3, size_px, size_px, dtype=torch.uint8)
        tokens: Tensor | None = None
        try:
            if self.is_splittable:
                tokens, pooled, embedding = self.encode_with_tokens(black, 1)
            else:
                pooled, embedding = self.encode(black)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise EncoderError(
                f"{source.name} cannot encode an image of {size_px} x {size_px} pixels in "
                f"{self.precision} on {self.device}: {error}"
            ) from error
        self._require_usable(pooled, embedding)
        return EncoderIdentity(
            name=source.name,
            revision=source.revision,
            weights_sha256=hash_tensors(self.visual.state_dict()),
            preprocessing=self.preprocessing.to_dict(),
            precision=self.precision,
            n_blocks=None if self._split is None else len(self._split.blocks),
            n_tokens=None if tokens is None else tokens.shape[1],
            token_width=None if tokens is None else tokens.shape[2],
            pooled_width=pooled.shape[1],
            embedding_width=embedding.shape[1],
            is_random=source.weights is None,
        )

    def _require_usable(self, pooled: Tensor, embedding: Tensor) -> None:
        if pooled.ndim != 2 or embedding.ndim != 2:
            raise EncoderError(
                f"{self._name} gives an output of shape {tuple(embedding.shape)} for one image, "
                "not one embedding. Its configuration must pool the tokens."
            )
        if not embedding.isfinite().all():
            raise EncoderError(
                f"{self._name} gives NaN or infinity for a black image in {self.precision}. "
                "The weights are damaged, or need --precision fp32."
            )


def trainable_parameter_names(encoder: Encoder, n_unfrozen: int) -> list[str]:
    """Names of the parameters of the last `n_unfrozen` blocks, in the tower's order.

    The final norm and the projection stay frozen: fine-tuning means the blocks.

    Parameters
    ----------
    encoder
        With a tower that can be split.
    n_unfrozen
        Blocks counted from the end, from 1 to all.

    Raises
    ------
    EncoderError
        The tower cannot be split, or has fewer blocks.
    """
    blocks = encoder._require_split(n_unfrozen).blocks[-n_unfrozen:]
    chosen = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [name for name, parameter in encoder.named_parameters() if id(parameter) in chosen]


def load_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    device: str = "cpu",
    precision: str = "auto",
    resize: str | None = None,
    normalize: str = "encoder",
    bits_stored: int | None = None,
) -> Encoder:
    """Load the vision tower that a name stands for, frozen and ready to encode.

    Neither text tower nor tokenizer is built or downloaded, the global random state is left as
    it was, and a checkpoint that could run code is refused.

    Parameters
    ----------
    name
        ``hf-hub:ORG/REPO`` or ``hf-hub:ORG/REPO@REVISION``: from the Hugging Face cache, else
        from the hub. ``local-dir:PATH``: a folder with ``open_clip_config.json`` and weights.
        ``ARCHITECTURE/TAG`` as open_clip lists them (``ViT-B-32/laion2b_s34b_b79k``).
        ``random:TIMM_NAME`` or ``random:TIMM_NAME:SEED``: seeded random weights.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"`` for the best there is.
    precision
        ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: bf16 where the processor computes it
        natively, else fp32.
    resize
        ``"squash"`` or ``"crop"`` override what the encoder's configuration says; None keeps it.
    normalize
        ``"encoder"`` for its own mean and standard deviation, ``"imagenet"`` for ImageNet's.
    bits_stored
        Bits in use in 16-bit grey files, None for all; recorded with the preprocessing.

    Returns
    -------
    Encoder
        Its ``identity`` says which weights these are.

    Raises
    ------
    EncoderError
        The name is unknown, a file is missing, damaged or of another model, the hub cannot be
        reached, or the device does not exist. The message names the file and the remedy.
    ConfigError
        `resize`, `normalize`, `precision` or `bits_stored` is out of range.

    Examples
    --------
    >>> encoder = load_encoder("random:test_vit:7", precision="fp32")
    >>> pooled, embedding = encoder.encode(torch.zeros(2, 3, 160, 160, dtype=torch.uint8))
    >>> embedding.shape, encoder.identity.is_random
    (torch.Size([2, 512]), True)
    """
    require_choice("resize", resize, (None, "squash", "crop"))
    require_choice("normalize", normalize, ("encoder", "imagenet"))
    chosen_device = resolve_device(device)
    chosen_precision = resolve_precision(precision, chosen_device)
    source = find_source(name)
    visual = _build_tower(source)
    preprocessing = _preprocessing(source, visual, resize, normalize, bits_stored)
    if source.weights is None:
        fill_with_noise(visual, source.seed)
    else:
        load_weights(visual, source.weights)
    return Encoder(visual.to(chosen_device), preprocessing, chosen_precision, source)


def _build_tower(source: Source) -> nn.Module:
    """open_clip's image tower for a configuration, with weights that mean nothing yet."""
    import timm
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    try:
        vision_cfg = CLIPVisionCfg(**source.model_cfg["vision_cfg"])
        embedding_width = int(source.model_cfg["embed_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(
            f"{source.origin} does not describe an open_clip model: {error!r}. "
            "It needs model_cfg with embed_dim and vision_cfg, as open_clip writes them."
        ) from error
    timm_name = vision_cfg.timm_model_name
    if timm_name and (":" in timm_name or not timm.is_model(timm_name)):
        raise EncoderError(
            f"{source.origin} wants the architecture '{timm_name}', which timm "
            f"{timm.__version__} does not have.{suggest(timm_name, timm.list_models())}"
        )
    vision_cfg = replace(vision_cfg, timm_model_pretrained=False)  # its weights come from us
    try:
        with torch.random.fork_rng(devices=[]):  # towers draw their initial weights
            torch.default_generator.manual_seed(source.seed)
            visual: nn.Module = _build_vision_tower(
                embedding_width, vision_cfg, quick_gelu=source.model_cfg.get("quick_gelu", False)
            )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} describes cannot be built: {error}"
        ) from error
    return visual


def _preprocessing(
    source: Source, visual: nn.Module, resize: str | None, normalize: str, bits_stored: int | None
) -> Preprocessing:
    """open_clip's defaults, overridden by the model's configuration, overridden by the caller."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = merge_preprocess_dict(PreprocessCfg(), source.preprocess_cfg)
    if normalize == "imagenet":
        cfg |= _IMAGENET
    resize = resize or _RESIZE_OF_MODE.get(cfg["resize_mode"])
    if resize is None:
        raise EncoderError(
            f"{source.origin} asks for resize_mode '{cfg['resize_mode']}', which is not offered. "
            "Choose --resize squash or --resize crop."
        )
    height, width = _pair(getattr(visual, "image_size", cfg["size"]))
    if height != width:
        raise EncoderError(f"{source.origin} asks for {height} x {width} pixels, not a square.")
    try:
        preprocessing = Preprocessing(
            image_size_px=height,
            mean=_three(cfg["mean"]),
            std=_three(cfg["std"]),
            interpolation=cfg["interpolation"],
            resize=cast(Literal["squash", "crop"], resize),
        )
    except ConfigError as error:
        raise EncoderError(f"{source.origin}: {error}") from error
    return replace(preprocessing, bits_stored=bits_stored)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _three(value: float | Sequence[float]) -> tuple[float, float, float]:
    """open_clip takes one number for all three channels, too."""
    return (value, value, value) if isinstance(value, int | float) else tuple(value)  # type: ignore[return-value]
