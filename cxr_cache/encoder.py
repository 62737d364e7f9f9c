"""open_clip's vision tower: load it, identify it, split it (only module that knows open_clip).

Only the image half of a model is built and read; the text tower costs more parameters than the
image tower, and a download of its own. From the top of the file to its end: what an encoder is,
how a name becomes one, where its files come from, how weights are read, how a tower is split.

open_clip, timm and huggingface_hub are imported by the functions that need them: they take
seconds, and a command that only reads features should not wait for them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_cache.errors import ConfigError, EncoderError
from cxr_cache.images import Preprocessing, normalise

DEFAULT_ENCODER = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
PRECISIONS = ("fp32", "bf16", "fp16")

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = (  # in open_clip's own order of preference
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
RANDOM_EMBEDDING_WIDTH = 512  # BiomedCLIP's, so that stores of random encoders have its shapes

_HUB_TIMEOUT_S = 10
_VISION_PREFIX = "visual."
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RESIZE_OF_MODE = {"shortest": "crop", "squash": "squash"}
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["fp32", "bf16", "fp16"]


# --- What an encoder is --------------------------------------------------------------------------


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
        self, visual: nn.Module, preprocessing: Preprocessing, precision: Precision, source: _Source
    ) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.precision = precision
        self._name = source.name
        self._split = _split_tower(visual)
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

    def tail(self, tokens: Tensor, n_unfrozen: int) -> tuple[Tensor, Tensor]:
        """The end of the tower: the last `n_unfrozen` blocks, pooling and projection.

        Gradients flow to whatever parameters ask for them. Where the tower pools its class
        token, the last block computes that token only, which changes no result.

        Parameters
        ----------
        tokens
            Output of :meth:`stem` for the same `n_unfrozen`, any float type.
        n_unfrozen
            Blocks that are left, from 1 to all.

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
        with self._autocast():
            pooled, embedding = split.tail(tokens.to(self.device, torch.float32), n_unfrozen)
        return pooled.float(), embedding.float()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled output and embedding of images, as open_clip's own tower gives them.

        Parameters
        ----------
        pixels
            Images as :func:`cxr_cache.images.read_image` gives them, uint8, shape
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
            pooled, embedding = _run_whole(self.visual, self._prepare(pixels))
        return pooled.float(), embedding.float()

    @torch.inference_mode()
    def encode_with_tokens(self, pixels: Tensor, n_unfrozen: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens before the last `n_unfrozen` blocks, pooled output and embedding, in one pass.

        Parameters and shapes are those of :meth:`encode`, :meth:`stem` and :meth:`tail`.
        """
        tokens = self.stem(self._prepare(pixels), n_unfrozen)
        return tokens, *self.tail(tokens, n_unfrozen)

    def _prepare(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8, f"pixels are {pixels.dtype}, not uint8"
        return normalise(pixels.to(self.device, non_blocking=True), self.preprocessing)

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST_DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _require_split(self, n_unfrozen: int) -> _SplitTower:
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

    def _identify(self, source: _Source) -> EncoderIdentity:
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
            weights_sha256=_hash_tensors(self.visual.state_dict()),
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


# --- From a name to an encoder -------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a name leads: what to build, what to fill it with, what it expects of images."""

    name: str
    origin: str
    """The file or repository that messages about the configuration name."""
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    weights: Path | None
    """None for random weights."""
    revision: str | None = None
    seed: int = 0


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
    _require_choice("resize", resize, (None, "squash", "crop"))
    _require_choice("normalize", normalize, ("encoder", "imagenet"))
    chosen_device = resolve_device(device)
    chosen_precision = resolve_precision(precision, chosen_device)
    source = _find_source(name)
    visual = _build_tower(source)
    preprocessing = _preprocessing(source, visual, resize, normalize, bits_stored)
    if source.weights is None:
        _fill_with_noise(visual, source.seed)
    else:
        _load_weights(visual, source.weights)
    return Encoder(visual.to(chosen_device), preprocessing, chosen_precision, source)


def resolve_device(device: str) -> torch.device:
    """The device that a name means here; ``"auto"`` prefers cuda to mps to cpu.

    Raises
    ------
    EncoderError
        The name is no device, or this machine does not have it.
    """
    n_devices = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    present = [kind for kind, count in n_devices.items() if count]
    if device == "auto":
        return torch.device(present[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")  # named, but not one to compute on
    if (chosen.index or 0) >= n_devices.get(chosen.type, 0):
        raise EncoderError(
            f"There is no device '{device}' here; torch {torch.__version__} sees "
            f"{', '.join(present)}. Use one of these, or auto."
        )
    return chosen


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """What matrix products are computed in; ``"auto"`` is bf16 where it is native, else fp32.

    Raises
    ------
    ConfigError
        The name is none of these.
    """
    _require_choice("precision", precision, ("auto", *PRECISIONS))
    if precision == "auto":
        return "bf16" if _has_native_bf16(device) else "fp32"
    return cast(Precision, precision)


def _require_choice(option: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ConfigError(f"{option} is '{value}'; choose from {', '.join(filter(None, choices))}.")


def _has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 is a speed-up: emulated, it is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # torch has no public question for this; the private ones come and go between versions
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def _find_source(name: str) -> _Source:
    """Read what a name stands for: configuration, and where the weights are."""
    finders: dict[str, Callable[[str], _Source]] = {
        "hf-hub": _find_on_hub,
        "local-dir": _find_in_folder,
        "random": _find_random,
    }
    scheme, colon, identifier = name.partition(":")
    if not colon:
        return _find_in_open_clip(name)
    if scheme not in finders or not identifier:
        raise EncoderError(
            f"'{name}' names no encoder. Names are hf-hub:ORG/REPO, local-dir:PATH, "
            "random:TIMM_NAME, or an open_clip architecture with its weights, "
            "ViT-B-32/laion2b_s34b_b79k."
        )
    return finders[scheme](identifier)


def _build_tower(source: _Source) -> nn.Module:
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
            f"{timm.__version__} does not have.{_suggest(timm_name, timm.list_models())}"
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
    source: _Source, visual: nn.Module, resize: str | None, normalize: str, bits_stored: int | None
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


# --- Where the files come from -------------------------------------------------------------------


def _find_in_folder(identifier: str) -> _Source:
    folder = Path(identifier).expanduser().resolve()
    if not folder.is_dir():
        raise EncoderError(
            f"{folder} is not a folder. local-dir: takes the folder that holds {CONFIG_FILE} and "
            "the weights, for example a copy of the model's Hugging Face repository."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise EncoderError(
            f"{folder} has no {CONFIG_FILE}. Copy it from the model's repository, beside the "
            "weights."
        )
    weights = next((folder / file for file in WEIGHTS_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise EncoderError(
            f"{folder} has no weights. Put one of these beside {CONFIG_FILE}: "
            f"{', '.join(WEIGHTS_FILES)}."
        )
    return _describe(f"local-dir:{folder}", folder / CONFIG_FILE, weights)


def _find_on_hub(identifier: str) -> _Source:
    repo, _, revision = identifier.partition("@")
    config = _fetch_from_hub(repo, (CONFIG_FILE,), revision or None)
    commit = config.parent.name  # .../snapshots/COMMIT/open_clip_config.json
    weights = _fetch_from_hub(repo, WEIGHTS_FILES, commit)
    return _describe(f"hf-hub:{identifier}", config, weights, commit)


def _describe(name: str, config_path: Path, weights: Path, revision: str | None = None) -> _Source:
    """Read open_clip_config.json."""
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EncoderError(
            f"{config_path} cannot be read as JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise EncoderError(
            f"{config_path} has no model_cfg, so it is not a configuration of open_clip. "
            "Take the file from the repository that the weights are from."
        )
    preprocess_cfg = config.get("preprocess_cfg") or {}
    return _Source(name, str(config_path), config["model_cfg"], preprocess_cfg, weights, revision)


def _find_in_open_clip(name: str) -> _Source:
    """An architecture that open_clip knows, and the tag of published weights for it."""
    from open_clip import get_model_config, get_pretrained_cfg

    architecture, tag = _parse_open_clip_name(name)
    model_cfg = get_model_config(architecture)
    tag_cfg = get_pretrained_cfg(architecture, tag)
    if "timm_model_name" not in model_cfg["vision_cfg"] and (
        tag_cfg.get("quick_gelu", False) != model_cfg.get("quick_gelu", False)
    ):
        other = architecture.removesuffix("-quickgelu")
        other += "" if other != architecture else "-quickgelu"
        raise EncoderError(
            f"The weights '{tag}' of {architecture} were trained with another activation "
            f"function than this architecture has. Use {other}/{tag}."
        )
    weights, revision = _fetch_published(tag_cfg)
    return _Source(f"{architecture}/{tag}", name, model_cfg, tag_cfg, weights, revision)


def _parse_open_clip_name(name: str) -> tuple[str, str]:
    """Split ``ARCHITECTURE/TAG``; the tag may be missing where there is only one."""
    from open_clip import is_pretrained_cfg, list_models, list_pretrained_tags_by_model

    architecture, tag = name.replace("/", "-"), ""  # ViT-B/32 means ViT-B-32
    if architecture not in list_models():
        head, _, tag = name.rpartition("/")
        architecture = head.replace("/", "-")
    if architecture not in list_models():
        raise EncoderError(
            f"open_clip has no architecture '{architecture or name}'."
            f"{_suggest(architecture or name, list_models())} A model of the Hugging Face hub is "
            "named hf-hub:ORG/REPO, a folder local-dir:PATH."
        )
    tags = list_pretrained_tags_by_model(architecture)
    if not tag and len(tags) == 1:
        return architecture, tags[0]
    if not tag or not is_pretrained_cfg(architecture, tag):
        raise EncoderError(
            f"{name} does not say which weights. Choose one of: "
            f"{', '.join(f'{architecture}/{known}' for known in tags) or '(none are published)'}."
        )
    return architecture, tag


def _fetch_published(tag_cfg: Mapping[str, Any]) -> tuple[Path, str | None]:
    """Weights of an open_clip tag, and the commit they are from where there is one."""
    from open_clip import download_pretrained

    repo, _, file = tag_cfg.get("hf_hub", "").rpartition("/")
    if repo:
        named = (f"{Path(file).stem}.safetensors", file) if file else WEIGHTS_FILES
        path = _fetch_from_hub(repo, named, None)
        return path, path.parent.name
    try:
        return Path(download_pretrained(dict(tag_cfg))), None
    except (OSError, RuntimeError) as error:
        raise EncoderError(
            f"{tag_cfg.get('url')} cannot be downloaded: {error}. Connect once, or copy the model "
            "here and name it local-dir:PATH."
        ) from error


def _find_random(identifier: str) -> _Source:
    """A timm architecture that will be filled with noise, projected as BiomedCLIP is."""
    import timm

    architecture, _, seed = identifier.partition(":")
    if not timm.is_model(architecture):
        raise EncoderError(
            f"timm {timm.__version__} has no architecture '{architecture}'."
            f"{_suggest(architecture, timm.list_models())}"
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
    return _Source(name, name, model_cfg, {}, weights=None, seed=int(seed or 0))


def _fetch_from_hub(repo: str, files: Sequence[str], revision: str | None) -> Path:
    """The first of `files` that the repository has, from the cache or else from the hub.

    What the cache holds is used without asking the hub, so a cached encoder neither needs a
    network nor changes under a user's hands.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        for file in files:
            cached = try_to_load_from_cache(repo, file, revision=revision)
            if isinstance(cached, str):
                return Path(cached)
        for file in files:
            try:
                # Asked once, since the download itself retries for half a minute without a network
                get_hf_file_metadata(
                    hf_hub_url(repo, file, revision=revision), timeout=_HUB_TIMEOUT_S
                )
                return Path(hf_hub_download(repo, file, revision=revision))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):
                    raise
    # huggingface_hub 0.x raises errors of requests and 1.x those of httpx; they share no base
    except Exception as error:
        raise _hub_error(repo, files, error) from error
    raise EncoderError(
        f"{repo} on the Hugging Face hub has none of {', '.join(files)}, so open_clip cannot load "
        "it. Check the name; it must be a repository in open_clip's format."
    )


def _hub_error(repo: str, files: Sequence[str], error: Exception) -> EncoderError:
    """Say which file of which repository is missing, why, and what to do."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return EncoderError(f"'{repo}' is not the name of a repository, which is ORG/REPO.")
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return EncoderError(
            f"The Hugging Face hub does not give out {repo}: {_first_line(error)} Check the name "
            "and the revision; for a private or gated model accept its terms and set HF_TOKEN."
        )
    offline = isinstance(error, OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if offline else _first_line(error)
    return EncoderError(
        f"{_listing(files, 1)} of {repo} is not in the Hugging Face cache {HF_HUB_CACHE}, and "
        f"cannot be downloaded: {reason}\n"
        "Either connect to the network once, or set HF_HOME to a cache that holds the model, or "
        f"copy {CONFIG_FILE} and the weights from {repo} into a folder and name it local-dir:PATH."
    )


# --- Weights -------------------------------------------------------------------------------------


def _load_weights(visual: nn.Module, path: Path) -> None:
    """Copy the checkpoint's vision tensors into the tower; every one must have its place."""
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    tensors = read(path)
    if not tensors:
        raise EncoderError(
            f"{path} holds no tensor named {_VISION_PREFIX}*, so it is not a checkpoint of "
            "open_clip. Take the file from the repository that the configuration is from."
        )
    expected = visual.state_dict()
    problems = {
        "missing in the file": sorted(expected.keys() - tensors.keys()),
        "unknown to the tower": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} ({tuple(tensors[name].shape)} in the file, "
            f"{tuple(expected[name].shape)} in the tower)"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {what}: {_listing(names, 3)}" for what, names in problems.items() if names]
        raise EncoderError(
            f"{path} does not fit the image tower that the configuration describes:\n"
            + "\n".join(lines)
            + "\nConfiguration and weights must come from the same model; copy both again."
        )
    visual.load_state_dict(tensors)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The vision tensors by their names inside the tower; no other byte is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {
                name.removeprefix(_VISION_PREFIX): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 -- the file is no mapping
                if name.startswith(_VISION_PREFIX)
            }
    except (SafetensorError, OSError) as error:
        raise EncoderError(
            f"{path} is damaged, or not a safetensors file ({error}). Copy or download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The vision tensors of a checkpoint written by torch, read without running its code."""
    try:
        checkpoint = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code "
            f"when loaded ({_refusal(error)}). Use the model's safetensors file, or download the "
            "file again."
        ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise EncoderError(
            f"{path} is damaged, or not a checkpoint of torch ({_first_line(error)}). Copy or "
            "download it again."
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    return {
        name.removeprefix(_VISION_PREFIX): value
        for name, value in named.items()
        if name.startswith(_VISION_PREFIX) and isinstance(value, Tensor)
    }


def _fill_with_noise(visual: nn.Module, seed: int) -> None:
    """Give every matrix seeded uniform noise of unit gain; leave norms and biases as built.

    Architectures differ in how they begin, some with blocks that do nothing; filled this way,
    every tower mixes its image. The bytes are the same on every processor: torch's uniform
    numbers are integers scaled by a power of two, and the bound rounds once. (Normal ones go
    through a logarithm whose last bit depends on the instruction set.)
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            if parameter.ndim >= 2:
                # Class token and positions, (1, T, W), are inputs themselves: nothing fans in
                fan_in = 1 if len(parameter) == 1 else parameter[0].numel()
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((noise * 2 - 1) * math.sqrt(3 / fan_in))  # variance 1 / fan-in
            elif name.endswith("gamma"):
                parameter.fill_(1)  # layer scale, which may begin at 1e-5


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- Splitting a tower ---------------------------------------------------------------------------


class _SplitTower(ABC):
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
        tokens = self.embed(pixels)
        for block in self.blocks[: len(self.blocks) - n_unfrozen]:
            tokens = block(tokens)
        return tokens  # (B, T, W)

    def tail(self, tokens: Tensor, n_unfrozen: int) -> tuple[Tensor, Tensor]:
        for block in self.blocks[len(self.blocks) - n_unfrozen : -1]:
            tokens = block(tokens)
        if self.reads_class_token_only:
            return self.finish(self.class_token_block(tokens))
        return self.finish(self.blocks[-1](tokens))


class _TimmTower(_SplitTower):
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


class _OpenClipTower(_SplitTower):
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


def _split_tower(visual: Any) -> _SplitTower | None:
    """Take a tower apart, or None. Subclasses may do anything, so only the exact types count."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    if type(visual) is TimmModel and type(visual.trunk) is TimmTransformer:
        return _TimmTower(visual) if visual.trunk.global_pool else None
    if type(visual) is OpenClipTransformer and visual.transformer.batch_first:
        return _OpenClipTower(visual) if visual.pool_type != "none" else None
    return None


def _run_whole(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
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


# --- Words for messages --------------------------------------------------------------------------


def _suggest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _listing(names: Sequence[str], n_shown: int) -> str:
    more = len(names) - n_shown
    return ", ".join(names[:n_shown]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refusal(error: Exception) -> str:
    """The part of torch's long message that says what was refused."""
    found = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return found[1] if found else _first_line(error)
