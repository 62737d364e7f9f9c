"""An image -> those images of a store whose embeddings are nearest to its own."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.wording import count, suggest
from cxr_cache.config import SimilarConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.images import decode_image, find_unused_bits, read_bytes
from cxr_cache.encoders.identity import require_same_encoder
from cxr_cache.errors import ConfigError, ImageError, StoreIncompleteError
from cxr_cache.evaluation.embedding_map import require_embedded, require_finite
from cxr_cache.store.feature_store import FAILED, FeatureStore
from cxr_cache.store.rows import to_unit_length

if TYPE_CHECKING:  # an image that is in the store needs no torch
    from cxr_cache.encoders.encoder import Encoder

logger = logging.getLogger(__name__)

_COLUMNS = ("image_id", "study_uid", "patient_id", "projection")


@dataclass(frozen=True, eq=False)
class EncodedFile:
    """An image file that need not be in the store."""

    name: str
    embedding: NDArray[np.float32]
    """``(D,)``, in the encoder's scale."""
    sha256: bytes
    """Of the file."""


@dataclass(frozen=True, eq=False)
class Similar:
    """The neighbours of an image, the nearest first."""

    store: str
    image: str
    is_file: bool
    """Whether the image is a file, and not one of the store's."""
    described: dict[str, Any]
    """What the store says of the image: study_uid, patient_id, projection, findings; empty for a
    file."""
    n_compared: int
    """Images of the store that it was compared with."""
    neighbours: pd.DataFrame
    """similarity, image_id, study_uid, patient_id, projection, relation (``"same file"``, ``"same
    study"``, ``"same patient"`` or blank) and findings (a list)."""

    def to_text(self) -> str:
        """For a terminal."""
        known = self.described
        about = [known.get("projection") or "projection unknown", f"study {known.get('study_uid')}"]
        about += [f"patient {known['patient_id']}"] if known.get("patient_id") else []
        about.append(", ".join(known.get("findings", ())) or "no finding labelled present")
        of = (
            "a file, of which study and patient are not known" if self.is_file else "; ".join(about)
        )
        lines = [
            f"{self.image} ({of})",
            f"compared with {count(self.n_compared, 'image')} of {self.store}",
            "",
        ]
        shown = self.neighbours.assign(
            similarity=self.neighbours["similarity"].map("{:.4f}".format),
            findings=self.neighbours["findings"].map(", ".join),
        )
        if not (self.neighbours["patient_id"] != "").any():
            shown = shown.drop(columns="patient_id")
        lines.append(_align(shown))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "store": self.store,
            "image": self.image,
            "is_file": self.is_file,
            "described": self.described,
            "n_compared": self.n_compared,
            "neighbours": self.neighbours.to_dict("records"),
        }


def is_file_of(store: FeatureStore, image: str, config: SimilarConfig) -> bool:
    """Tell whether `image` is an image file, and not the id of an image of the store.

    Raises
    ------
    ConfigError
        It is neither; or it is a file, of which no projection is known, and the config asks for its
        projection.
    """
    if (store.image_ids == image).any():
        return False
    if not Path(image).is_file():
        raise ConfigError(
            f"{store.path} has no image {image!r}, and there is no such file."
            f"{suggest(image, store.image_ids.tolist())}"
        )
    if config.same_projection:
        raise ConfigError(
            f"--same-projection needs the projection of {image}, and that of a file is not known. "
            "Leave it out, or give the id of an image in the store."
        )
    return True


def encode_file(store: FeatureStore, path: str, encoder: Encoder) -> EncodedFile:
    """Encode an image file as the images of the store were.

    Raises
    ------
    StoreMismatchError
        The encoder is not the one that made the store.
    ImageError
        The file cannot be used.
    """
    import torch

    require_same_encoder(
        store.header.encoder,
        encoder.identity.to_dict(),
        "in the store",
        f"in {encoder.identity.name}",
        "Embeddings of the two cannot be compared. Give the store's own encoder with --model.",
        problem=f"{store.path} was made by another encoder",
    )
    if unused := find_unused_bits(None, [path], encoder.preprocessing):
        logger.warning("%s: the image looks nearly black to the encoder", unused[1])
    try:
        data = read_bytes(None, path)
        pixels = decode_image(data, encoder.preprocessing).pixels
    except ImageError as error:
        raise ImageError(f"{path} cannot be used: {error}.") from error
    with encoder.cast_weights():  # what is in the store was computed so
        _, embedding = encoder.encode(torch.from_numpy(pixels[None]))
    return EncodedFile(path, embedding[0].cpu().numpy(), hashlib.sha256(data).digest())


def find_similar(
    store: FeatureStore, image: str | EncodedFile, config: SimilarConfig | None = None
) -> Similar:
    """List the images of a store that are most like one, by the cosine of their embeddings.

    Every embedding is read once, and few are in memory at a time. Of equal similarities the
    earlier row comes first. An image of the store is not its own neighbour.

    Parameters
    ----------
    store
        An open store.
    image
        Id of an image in the store, or a file as :func:`encode_file` gives it.
    config
        How many neighbours, and of which projection.

    Raises
    ------
    ConfigError
        The store has no such image, or its projection is wanted and unknown.
    StoreIncompleteError
        It has no embedding, or no other image has.
    StoreFormatError
        An embedding is not finite.
    """
    config = config or SimilarConfig()
    rows = require_embedded(store, 1 if isinstance(image, EncodedFile) else 2, "a comparison")
    cohort = store.cohort
    own = None
    if isinstance(image, EncodedFile):
        name, query, sha256 = image.name, image.embedding, image.sha256
    else:
        own = _find_row(store, image)
        name, query = image, store.read_views("embeddings", np.array([own]), np.zeros(1, int))[0]
        require_finite(store, np.array([own]), query[None])
        sha256 = bytes(store.read_column("image_sha256")[own])
        rows = rows[rows != own]
    if config.same_projection:
        rows = _keep_projection(store, cohort, rows, own)
    similarities = _compare(store, rows, to_unit_length(query))
    nearest = np.argsort(-similarities, kind="stable")[: config.count]
    found = rows[nearest]
    table = cohort.take(found).images[list(_COLUMNS)]
    table.insert(0, "similarity", similarities[nearest].astype(float))
    files = [bytes(digest) for digest in store.read_column("image_sha256")[found]]
    table["relation"] = _relate(cohort, found, own, [any(f) and f == sha256 for f in files])
    table["findings"] = [name_findings(cohort, row) for row in found.tolist()]
    return Similar(
        store=str(store.path),
        image=name,
        is_file=own is None,
        described={} if own is None else _describe(cohort, own),
        n_compared=len(rows),
        neighbours=table,
    )


def _find_row(store: FeatureStore, image: str) -> int:
    """Row of an image that has an embedding."""
    places = np.flatnonzero(store.image_ids == image)
    if not len(places):
        raise ConfigError(
            f"{store.path} has no image {image!r}.{suggest(image, store.image_ids.tolist())}"
        )
    row = int(places[0])
    if row not in store.embedded_rows:
        failed = store.status[row] == FAILED
        why = f"it failed: {store.read_errors(places[:1])[0]}" if failed else "it is pending"
        raise StoreIncompleteError(
            f"{image} of {store.path} has no embedding ({why}). Give another image."
        )
    return row


def _keep_projection(
    store: FeatureStore, cohort: Cohort, rows: NDArray[np.intp], own: int | None
) -> NDArray[np.intp]:
    projection = "" if own is None else str(cohort.projections[own])
    if not projection:
        raise ConfigError(
            "--same-projection needs the projection of the image, which is not known. Leave it out."
        )
    kept: NDArray[np.intp] = rows[cohort.projections[rows] == projection]
    if not len(kept):
        raise StoreIncompleteError(
            f"{store.path} has no other image of the projection {projection} with an embedding. "
            "Leave out --same-projection."
        )
    return kept


def _compare(
    store: FeatureStore, rows: NDArray[np.intp], query: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Cosine of each row's embedding with a vector of length 1, ``(n,)``."""
    if len(query) != (width := store.feature_shapes["embeddings"][1]):
        raise ConfigError(f"the embedding has {len(query)} numbers, those of the store {width}")
    parts = []
    for chunk in store.split_rows(rows, ["embeddings"]):
        block = store.read_views("embeddings", chunk, np.zeros_like(chunk))
        require_finite(store, chunk, block)
        parts.append(to_unit_length(block) @ query)
    return np.concatenate(parts)


def _relate(
    cohort: Cohort, found: NDArray[np.intp], own: int | None, is_same_file: list[bool]
) -> list[str]:
    """What each image found has in common with the image looked for."""
    said = []
    for row, is_same in zip(found.tolist(), is_same_file, strict=True):
        parts = ["same file"] if is_same else []
        if own is not None and cohort.study_uids[row] == cohort.study_uids[own]:
            parts.append("same study")
        elif own is not None and cohort.patient_ids[own] == cohort.patient_ids[row] != "":
            parts.append("same patient")
        said.append(", ".join(parts))
    return said


def name_findings(images: Cohort, row: int) -> list[str]:
    """Findings that are labelled present on an image."""
    labels = zip(images.findings, images.targets[row], strict=True)
    return [name for name, value in labels if value == 1]


def _describe(cohort: Cohort, row: int) -> dict[str, Any]:
    known = {name: str(cohort.images[name].iloc[row]) for name in _COLUMNS[1:]}
    return {**known, "findings": name_findings(cohort, row)}


def _align(table: pd.DataFrame) -> str:
    """Columns side by side, all text, the last one as long as it is."""
    rows = [[str(name).replace("_uid", "").replace("_id", "") for name in table], *table.to_numpy()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
