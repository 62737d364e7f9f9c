"""Where an encoder's name leads: configuration and weights, on disk, on the hub or random.

open_clip, timm and huggingface_hub are imported by the functions that need them: they take
seconds, and a command that only reads features should not wait for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_cache.errors import EncoderError, suggest

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


@dataclass(frozen=True)
class Source:
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


def find_source(name: str) -> Source:
    """Read what a name stands for: configuration, and where the weights are."""
    finders: dict[str, Callable[[str], Source]] = {
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


def _find_in_folder(identifier: str) -> Source:
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


def _find_on_hub(identifier: str) -> Source:
    repo, _, revision = identifier.partition("@")
    config = _fetch_from_hub(repo, (CONFIG_FILE,), revision or None)
    commit = config.parent.name  # .../snapshots/COMMIT/open_clip_config.json
    weights = _fetch_from_hub(repo, WEIGHTS_FILES, commit)
    return _describe(f"hf-hub:{identifier}", config, weights, commit)


def _describe(name: str, config_path: Path, weights: Path, revision: str | None = None) -> Source:
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
    return Source(name, str(config_path), config["model_cfg"], preprocess_cfg, weights, revision)


def _find_in_open_clip(name: str) -> Source:
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
    return Source(f"{architecture}/{tag}", name, model_cfg, tag_cfg, weights, revision)


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
            f"{suggest(architecture or name, list_models())} A model of the Hugging Face hub is "
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


def _find_random(identifier: str) -> Source:
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
            f"The Hugging Face hub does not give out {repo}: {first_line(error)} Check the name "
            "and the revision; for a private or gated model accept its terms and set HF_TOKEN."
        )
    offline = isinstance(error, OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if offline else first_line(error)
    return EncoderError(
        f"{list_names(files, 1)} of {repo} is not in the Hugging Face cache {HF_HUB_CACHE}, and "
        f"cannot be downloaded: {reason}\n"
        "Either connect to the network once, or set HF_HOME to a cache that holds the model, or "
        f"copy {CONFIG_FILE} and the weights from {repo} into a folder and name it local-dir:PATH."
    )


def list_names(names: Sequence[str], n_shown: int) -> str:
    """The first `n_shown` names, and how many more there are."""
    more = len(names) - n_shown
    return ", ".join(names[:n_shown]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """What an exception says, without the rest."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
