"""Where an encoder's name leads: configuration and weights, on disk, on the hub or random.

open_clip, timm and huggingface_hub are imported by the functions that need them: they take
seconds, and a command that only reads features should not wait for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cxr_cache.common.wording import first_line
from cxr_cache.errors import EncoderError

if TYPE_CHECKING:
    from torch import nn

    from cxr_cache.datasets.preprocessing import Preprocessing
    from cxr_cache.encoders.towers import SplitTower

CONFIG_FILE = "open_clip_config.json"
HUGGING_FACE_CONFIG = "config.json"
"""Of transformers and of timm; open_clip's repositories may hold one, too."""
ADAPTER_CONFIG = "adapter_config.json"
"""Of peft, whose adapters are no model by themselves."""
CONFIG_FILES: Final = (CONFIG_FILE, HUGGING_FACE_CONFIG, ADAPTER_CONFIG)
IMAGENET: Final = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Statistics of the pixels that ``--normalize imagenet`` stands for."""


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
    img_size: int | None = None
    """Side of the images, in pixels, where a name asks for another than the tower's own."""
    notes: tuple[str, ...] = ()
    """Sentences on what had to be assumed."""

    @property
    def is_bare(self) -> bool:
        """Whether the weights come without a configuration, so that they say what to build."""
        return self.weights is not None and self.origin == str(self.weights)


@dataclass(frozen=True)
class Place:
    """A folder, or a repository of the Hugging Face hub at one revision, that holds an encoder."""

    name: str
    folder: Path | None = None
    repo: str = ""
    revision: str | None = None
    weights: Path | None = None
    """The file of weights in the folder that a name asks for; None takes the one of usual name."""

    def find(self, files: Sequence[str]) -> Path | None:
        """Give the first of `files` that is here; None where there is none.

        Raises
        ------
        EncoderError
            The hub cannot be asked, or gives nothing out.
        """
        if self.folder is None:
            return find_on_hub(self.repo, files, self.revision)
        return first_file(self.folder, files)

    def fetch(self, files: Sequence[str], lack: str) -> Path:
        """Give the first of `files` that is here.

        Raises
        ------
        EncoderError
            There is none. For a folder the message is its path and `lack`.
        """
        if self.folder is None:
            return fetch_from_hub(self.repo, files, self.revision)
        found = self.find(files)
        if found is None:
            raise EncoderError(f"{self.folder} {lack}")
        return found

    def fetch_weights(self, files: Sequence[str], lack: str) -> Path:
        """Give the file of weights that was asked for, or else what :meth:`fetch` gives."""
        return self.weights or self.fetch(files, lack)

    def list_files(self, *, is_cached: bool = False) -> list[str]:
        """List the names of the files here; of a repository, those in the cache if `is_cached`."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file())
        if not is_cached:
            return list_on_hub(self.repo, self.revision)
        root = _find_snapshot(self.repo, self.revision)
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def pin(self, file: Path) -> Place:
        """Give the same place at the commit that `file` is from, .../snapshots/COMMIT/FILE."""
        return self if self.folder else replace(self, revision=file.parent.name)


def open_place(scheme: str, identifier: str) -> Place | None:
    """Give the folder or repository that a name leads to; None where it leads to none.

    A file of weights leads to its folder if a configuration lies beside it.

    Raises
    ------
    EncoderError
        There is no such folder.
    """
    if scheme == "local-file":
        file = keep_links(identifier)
        if not file.is_file() or first_file(file.parent, CONFIG_FILES) is None:
            return None
        return Place(f"local-file:{file}", file.parent, weights=file)
    if scheme == "hf-hub":
        repo, _, revision = identifier.partition("@")
        return Place(f"hf-hub:{identifier}", None, repo, revision or None)
    if scheme != "local-dir":
        return None
    folder = Path(identifier).expanduser().resolve()
    if not folder.is_dir():
        raise EncoderError(
            f"{folder} is not a folder. local-dir: takes the folder that holds {CONFIG_FILE} "
            f"or {HUGGING_FACE_CONFIG} and the weights, for example a copy of the model's "
            "Hugging Face repository."
        )
    return Place(f"local-dir:{folder}", folder)


def keep_links(identifier: str) -> Path:
    """Give the absolute path of a file, of which links are kept.

    In a cache of the hub they lead to files without endings or neighbours.
    """
    return Path(os.path.abspath(Path(identifier).expanduser()))  # noqa: PTH100


def find_in_places(find: Callable[[Place], Source | None]) -> dict[str, Callable[[str], Any]]:
    """Give :attr:`Family.find` of a family whose folders and repositories hold the same files.

    A file of weights is found by the configuration beside it, which a note then says.
    """

    def find_by(scheme: str, identifier: str) -> Source | None:
        place = open_place(scheme, identifier)
        source = None if place is None else find(place)
        if source is None or place is None or place.weights is None:
            return source
        note = (
            f"{place.weights.name} was named by its path; {Path(source.origin).name} beside it "
            "says what encoder it is."
        )
        return replace(source, notes=(*source.notes, note))

    return {scheme: partial(find_by, scheme) for scheme in ("hf-hub", "local-dir", "local-file")}


@dataclass(frozen=True)
class Family:
    """How the encoders of one library are found, built, filled and taken apart."""

    find: Mapping[str, Callable[[str], Source | None]]
    """By the scheme of a name, ``"hf-hub"`` of ``"hf-hub:ORG/REPO"`` or ``""`` where it has none:
    what reads the rest of the name. It gives None for the encoder of another family."""
    build: Callable[[Source], nn.Module]
    """Makes the image tower, as :func:`cxr_cache.encoders.towers.run_whole` takes it; its weights
    mean nothing yet."""
    fill: Callable[[nn.Module, Source], None]
    """Puts the weights into it."""
    read_preprocessing: Callable[[Source, nn.Module, str | None, str, int | None], Preprocessing]
    """Reads what it expects of images, given `resize`, `normalize` and `bits_stored` as
    :func:`cxr_cache.encoders.loading.load_encoder` takes them."""
    split: Callable[[nn.Module], SplitTower | None]
    """Takes the tower apart; None where that cannot be done."""


def split_query(name: str) -> tuple[str, dict[str, str]]:
    """Split what a name asks for off it: ``NAME?file=WEIGHTS&img_size=224``.

    Paths may hold a question mark, too.

    Raises
    ------
    EncoderError
        Something else is asked for.

    Examples
    --------
    >>> split_query("hf-hub:org/repo@main?file=vit.pt&img_size=224")
    ('hf-hub:org/repo@main', {'file': 'vit.pt', 'img_size': '224'})
    """
    plain, _, query = name.rpartition("?")
    asked = dict(part.partition("=")[::2] for part in query.split("&"))
    is_known = asked.keys() <= {"file", "img_size"} and all(asked.values())
    if plain and is_known and re.fullmatch(r"[1-9]\d{0,4}", asked.get("img_size", "1")):
        return plain, asked
    if plain and (query.startswith(("img_size", "file=")) or not name.startswith("local-")):
        raise EncoderError(f"'?{query}' in {name} is not of the form ?img_size=224 or ?file=NAME.")
    return name, {}


def join_query(plain: str, asked: Mapping[str, str]) -> str:
    """Put what a name asks for behind it again."""
    return plain + "?" * bool(asked) + "&".join(f"{key}={value}" for key, value in asked.items())


def require_whole_patches(source: Source, patch: Sequence[int], own_px: int) -> None:
    """Raise EncoderError where a name asks for a size that patches do not fill.

    What is left over would be cut off without a word. The encoder's own size is its own affair.
    """
    px, side = source.img_size, lcm(*patch)
    if px is None or px == own_px or not side or px % side == 0:
        return
    nearest = [size for size in (px // side * side, (px // side + 1) * side) if size]
    raise EncoderError(
        f"{source.name} asks for images of {px} x {px} pixels, which the encoder's patches of "
        f"{patch[0]} x {patch[-1]} pixels do not fill: ask for the nearest size that they do, "
        f"{' or '.join(f'?img_size={size}' for size in nearest)}."
    )


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the files `names` that a folder holds."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def fetch_from_hub(repo: str, files: Sequence[str], revision: str | None) -> Path:
    """The first of `files` that the repository has, as :func:`find_on_hub` finds it.

    Raises
    ------
    EncoderError
        It has none of them, or the hub cannot be asked.
    """
    found = find_on_hub(repo, files, revision)
    if found is None:
        raise EncoderError(
            f"{repo} on the Hugging Face hub has none of {', '.join(files)}, so it cannot be "
            "loaded. Check the name; it must be a repository in the format of open_clip, "
            "transformers or timm."
        )
    return found


def find_on_hub(repo: str, files: Sequence[str], revision: str | None) -> Path | None:
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
        raise _hub_error(repo, files, revision, error) from error
    return None


def list_on_hub(repo: str, revision: str | None) -> list[str]:
    """List the names of a repository's files.

    Raises
    ------
    EncoderError
        The hub cannot be asked, or does not answer.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # as in find_on_hub
        raise _hub_error(repo, ("the list of files",), revision, error) from error
    return sorted(file.rfilename for file in info.siblings or ())


def _find_snapshot(repo: str, revision: str | None) -> Path:
    """Give the folder of the cache with a repository's files, which may not be there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    ref = root / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    return root / "snapshots" / (commit or "main")


def _hub_error(
    repo: str, files: Sequence[str], revision: str | None, error: Exception
) -> EncoderError:
    """Say which file of which repository is missing, why, and what to do."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return EncoderError(f"'{repo}' is not the name of a repository, which is ORG/REPO.")
    if isinstance(error, GatedRepoError):
        return EncoderError(
            f"{repo} is gated: sign in on https://huggingface.co/{repo}, accept its terms there, "
            "and set HF_TOKEN to a token of the account that was given access."
        )
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return EncoderError(
            f"The Hugging Face hub does not give out {repo}: {first_line(error)} Check the name "
            f"and the revision on https://huggingface.co/{repo}; for a private model set HF_TOKEN."
        )
    offline = isinstance(error, OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if offline else first_line(error)
    snapshots = Path(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    others = sorted({path.name for path in snapshots.glob("*")} - {revision})
    where, hint = repo, ""
    if revision is not None:
        where = f"{repo}@{revision}"
        if others:
            hint = f"It holds hf-hub:{repo}@{others[-1]}, whose weights may be others.\n"
    return EncoderError(
        f"{' or '.join(files[:2])} of {where} is not in the Hugging Face cache {HF_HUB_CACHE}, and "
        f"cannot be downloaded: {reason}\n{hint}"
        "Either connect to the network once, or set HF_HOME to a cache that holds the model, or "
        f"copy the files of https://huggingface.co/{repo} into a folder and name it local-dir:PATH."
    )
