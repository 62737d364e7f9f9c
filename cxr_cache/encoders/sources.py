"""Where an encoder's name leads: configuration and weights, on disk, on the hub or random.

open_clip, timm and huggingface_hub are imported by the functions that need them: they take
seconds, and a command that only reads features should not wait for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_cache.common.wording import first_line, list_names
from cxr_cache.errors import EncoderError

CONFIG_FILE = "open_clip_config.json"


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


def fetch_from_hub(repo: str, files: Sequence[str], revision: str | None) -> Path:
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
