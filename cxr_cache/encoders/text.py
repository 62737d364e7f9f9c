"""open_clip's text tower: sentences -> embeddings beside those of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_cache.common.extras import pip_line
from cxr_cache.common.files import read_text
from cxr_cache.common.wording import first_line
from cxr_cache.encoders.loading import find_encoder
from cxr_cache.encoders.sources import Source
from cxr_cache.encoders.weights import fill_tower, read_tensors
from cxr_cache.errors import ConfigError, EncoderError

_PREFIX: Final = "text."
_UNPREFIXED: Final = (
    *("text_projection", "positional_embedding", "token_embedding."),
    *("transformer.", "ln_final."),
)
"""Where the text tower lies in checkpoints of open_clip's plain CLIP."""
_BERT_BASE: Final = ("microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",)
"""Text models whose configuration is BERT base's; BiomedCLIP's folder does not hold it."""


class TextEncoder:
    """A frozen text tower with its tokenizer, and the scale that its checkpoint gives cosines.

    Attributes
    ----------
    name
        The encoder's.
    logit_scale
        Factor from the cosine of an image and a text to a logit.
    """

    def __init__(
        self, name: str, tower: nn.Module, tokenize: Any, logit_scale: float, device: str
    ) -> None:
        self.name, self.logit_scale = name, logit_scale
        self._tower = tower.eval().requires_grad_(False).to(device)
        self._tokenize, self._device = tokenize, device

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, float32, ``(n, D)``, on the CPU."""
        tokens = self._tokenize(list(texts)).to(self._device)
        return F.normalize(self._tower(tokens).float(), dim=-1).cpu()


def load_text_encoder(name: str, *, device: str = "cpu") -> TextEncoder:
    """Load the text tower of an encoder, named as for :func:`load_encoder` of ``loading.py``.

    A folder (``local-dir:``) needs no network if it also holds the tokenizer's files, as the
    repository does. The device is as torch names it.

    Raises
    ------
    EncoderError
        The encoder has no text tower, transformers is missing, or a file is missing or does not
        fit.
    """
    _, source = find_encoder(name)
    if source.weights is None or not source.model_cfg.get("text_cfg"):
        raise EncoderError(
            f"{source.name} has no text tower in open_clip's layout: zero-shot needs a model of "
            "images and texts, such as BiomedCLIP."
        )
    tensors = _read_text_tensors(source.weights)
    scale = read_tensors(source.weights, "logit_scale").get("logit_scale")
    if scale is None:
        raise EncoderError(f"{source.weights} has no logit_scale. Copy or download it again.")
    try:
        tower = build_tower(source)
        tokenize = _load_tokenizer(source)
    except EncoderError:
        raise
    except (
        Exception
    ) as error:  # files of many kinds are read here, by libraries that raise anything
        raise EncoderError(
            f"The text tower that {source.origin} describes cannot be built: {first_line(error)}\n"
            "A local-dir: folder also needs the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json, vocab.txt, special_tokens_map.json) of the model's repository."
        ) from error
    prefix = _PREFIX if read_tensors(source.weights, _PREFIX) else ""
    fill_tower(tower, tensors, source.weights, "text", lambda name: [prefix + name])
    return TextEncoder(source.name, tower, tokenize, float(scale.exp()), device)


def _read_text_tensors(path: Path) -> dict[str, Tensor]:
    """The text tower's tensors by their names in open_clip's tower."""
    tensors = {
        name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(path, _PREFIX).items()
    }
    for prefix in () if tensors else _UNPREFIXED:
        tensors |= read_tensors(path, prefix)
    if not tensors:
        raise EncoderError(
            f"{path} holds no text tower, though its configuration names one. Take the whole "
            "checkpoint from the model's repository."
        )
    return tensors


def build_tower(source: Source) -> nn.Module:
    """open_clip's text tower for a configuration, with weights that mean nothing yet."""
    from open_clip.model import CLIPTextCfg, _build_text_tower

    cfg = CLIPTextCfg(**source.model_cfg["text_cfg"])
    width = int(source.model_cfg["embed_dim"])
    with torch.random.fork_rng(devices=[]):  # towers draw their initial weights
        if not cfg.hf_model_name:
            quick_gelu = source.model_cfg.get("quick_gelu", False)
            tower: nn.Module = _build_text_tower(width, cfg, quick_gelu=quick_gelu)
            return tower
        _require_transformers(source)
        from open_clip.hf_model import HFTextEncoder

        hf_tower: Any = HFTextEncoder(
            cfg.hf_model_name,
            output_dim=width,
            config=_find_hf_config(source, cfg.hf_model_name),
            pooler_type=cfg.hf_pooler_type,
            proj_type=cfg.hf_proj_type,
            pretrained=False,
        )
    if cfg.hf_pooler_type != "cls_pooler" and hasattr(hf_tower.transformer, "pooler"):
        hf_tower.transformer.pooler = (
            None  # given a configuration, open_clip adds what nothing reads
        )
    return hf_tower  # type: ignore[no-any-return]


def _require_transformers(source: Source) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise EncoderError(
            f"The text tower of {source.name} is a model of the transformers library, which is not "
            f"installed: {pip_line('text')}."
        ) from error


def _find_hf_config(source: Source, hf_name: str) -> Any:
    """The text model's configuration: beside the weights, known, cached or from the hub."""
    from transformers import AutoConfig, BertConfig

    assert source.weights is not None
    beside = source.weights.parent / "config.json"
    if beside.is_file() and "model_type" in json.loads(beside.read_text(encoding="utf-8")):
        return AutoConfig.from_pretrained(beside.parent)
    return BertConfig() if hf_name in _BERT_BASE else AutoConfig.from_pretrained(hf_name)


def _load_tokenizer(source: Source) -> Any:
    from open_clip import get_tokenizer
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    cfg = source.model_cfg["text_cfg"]
    options = dict(cfg.get("tokenizer_kwargs", {}))
    length = cfg.get("context_length", 77)
    if "/" in source.name and ":" not in source.name:  # open_clip's own names: ARCHITECTURE/TAG
        return get_tokenizer(source.name.partition("/")[0])
    if not cfg.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=length, **options)
    _require_transformers(source)
    is_local = source.name.startswith("local-") and source.weights is not None
    place = str(source.weights.parent) if is_local and source.weights else cfg["hf_tokenizer_name"]
    tokenize = HFTokenizer(
        place, context_length=length, tokenizer_mode=cfg.get("tokenizer_mode"), **options
    )
    # Without its files, transformers makes a tokenizer that knows no word, and says nothing.
    unknown = {tokenize.tokenizer.unk_token_id, None}
    if set(tokenize.tokenizer.encode("no effusion", add_special_tokens=False)) <= unknown:
        raise ValueError(f"the tokenizer in {place} knows no word")
    return tokenize


# -- prompts ---


@dataclass(frozen=True)
class PromptPair:
    """What may be said of an image with a finding, and of one without."""

    present: tuple[str, ...]
    absent: tuple[str, ...]


def load_prompts(path: Path | None = None) -> dict[str, PromptPair]:
    """Prompts by finding, from a JSON file or the package's own for the 35 findings.

    The file is UTF-8 and holds entries such as ``"Mass": {"present": ["a lung mass"], "absent":
    ["no lung mass"]}``. A finding may have several of each; their embeddings are averaged.

    Raises
    ------
    ConfigError
        The file cannot be read, is not UTF-8, or is not of that form.
    """
    if path is None:
        text = files("cxr_cache.encoders").joinpath("prompts35.json").read_text(encoding="utf-8")
    else:
        text = read_text(path)
    finding: str | None = None
    try:
        pairs = {}
        for finding, entry in json.loads(text).items():
            pairs[finding] = _parse_pair(entry)
        return pairs
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        where = f"the entry of {finding!r}: " if finding is not None else ""
        raise ConfigError(
            f"{path} is not a file of prompts ({where}{_describe(error)}). It needs, for every "
            'finding: {"Cardiomegaly": {"present": ["cardiomegaly"], "absent": ["no '
            'cardiomegaly"]}}.'
        ) from error


def _describe(error: Exception) -> str:
    """What is wrong, in words; exceptions of Python itself name nothing that is in the file."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, ValueError):
        return str(error)
    return "it is nested in another way"


def _parse_pair(entry: Any) -> PromptPair:
    pair = PromptPair(tuple(entry["present"]), tuple(entry["absent"]))
    for sentences in (entry["present"], entry["absent"]):
        if isinstance(sentences, str) or not sentences:
            raise ValueError("present and absent are lists of one sentence or more")
        if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise ValueError("a sentence is text")
    return pair
