"""Is every row of a store what it should be?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from cxr_cache.common.manifest import mark_written
from cxr_cache.common.wording import count
from cxr_cache.datasets.images import require_any_image
from cxr_cache.errors import ImageError, StoreMismatchError
from cxr_cache.store.feature_store import (
    DONE,
    EMBEDDED,
    FAILED,
    FeatureStore,
    RowCounts,
    are_finite,
)

if TYPE_CHECKING:
    from cxr_cache.encoders.encoder import Encoder

WHOLE, INCOMPLETE, CORRUPT, MISMATCH = 0, 1, 3, 4
"""Exit statuses of ``cxr-cache verify``."""

_IMAGES_AT_ONCE: Final = 16


@dataclass(frozen=True)
class BadRow:
    """A row that must not be used, and why."""

    row: int
    image_id: str
    reason: str


@dataclass(kw_only=True)
class Verification(RowCounts):
    """What a check of a store found, and how many of its rows are in which state."""

    path: Path
    bad_rows: list[BadRow] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of images with equal embeddings though their files differ."""
    n_compared: int = 0
    """Rows whose image was run through the encoder again."""
    mismatch: str = ""
    """Why the given encoder is not the store's; empty where it is, or where none was given."""
    is_repaired: bool = False
    """Bad rows have been marked pending."""
    redo: str = "cxr-cache extract"
    """Command that computes rows of this store."""

    @property
    def exit_status(self) -> int:
        """0 whole, 1 incomplete, 3 corrupt, 4 the encoder is not the store's.

        Rows that failed do not make a store incomplete, unless there are no others: `extract`
        succeeds with them, and training leaves them out.
        """
        if self.bad_rows and not self.is_repaired:
            return CORRUPT
        if self.mismatch:
            return MISMATCH
        return INCOMPLETE if self.n_pending or self.n_failed == self.n_images else WHOLE

    def to_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_text`, JSON-able."""
        words = {WHOLE: "whole", INCOMPLETE: "incomplete", CORRUPT: "corrupt", MISMATCH: "mismatch"}
        but_for_failed = self.exit_status == WHOLE and self.n_failed > 0
        return {
            "path": str(self.path),
            "result": "whole but for failed rows" if but_for_failed else words[self.exit_status],
            "images": self.n_images,
            "done": self.n_done,
            "failed": self.n_failed,
            "pending": self.n_pending,
            "without_tokens": self.n_without_tokens,
            "bad_rows": [vars(bad) for bad in self.bad_rows],
            "repaired": self.is_repaired,
            "duplicates": [list(pair) for pair in self.duplicates],
            "compared": self.n_compared,
            "mismatch": self.mismatch,
        }

    def to_text(self) -> str:
        """Counts, every bad row, and what to do, for a terminal."""
        lines = self.describe(self.path)
        lines += [f"  row {bad.row}, {bad.image_id}: {bad.reason}" for bad in self.bad_rows]
        for first, second in self.duplicates[:10]:
            lines.append(f"  note: {first} and {second} are different files of equal embeddings")
        if len(self.duplicates) > 10:
            lines.append(f"  note: {count(len(self.duplicates) - 10, 'more such pair')}")
        if self.n_compared:
            lines.append(f"  {count(self.n_compared, 'image')} encoded again for comparison")
        return "\n".join([*lines, self._conclude()])

    def _conclude(self) -> str:
        n_bad, redo = len(self.bad_rows), self.redo
        if self.bad_rows and not self.is_repaired:
            return (
                f"CORRUPT: {count(n_bad, 'bad row')}. `cxr-cache verify --repair` marks such rows "
                f"pending, and `{redo}` then writes them anew."
            )
        if self.mismatch:
            return f"MISMATCH: {self.mismatch}"
        if self.is_repaired:
            return f"REPAIRED: {count(n_bad, 'bad row')} marked pending; run `{redo}` again."
        failed = count(self.n_failed, "failed row")
        if self.n_failed:
            failed += f" ({self.n_failed / self.n_images:.0%} of all)"
        if self.n_failed == self.n_images:
            return f"INCOMPLETE: no row holds an embedding; {failed}. `cxr-cache inspect` says why."
        if self.n_pending:
            others = f"; {failed}" if self.n_failed else ""
            return f"INCOMPLETE: every finished row is sound; `{redo}` does the others{others}."
        if self.n_failed:
            return (
                f"WHOLE BUT FOR {failed}: every other row is sound, and training leaves the failed "
                f"ones out. `cxr-cache inspect` says why they failed, and `{redo}` tries again."
            )
        return "WHOLE: every row is sound."


def verify(
    store_path: str | Path,
    *,
    image_dir: str | Path | None = None,
    encoder: Encoder | None = None,
    n_sampled: int = 0,
    seed: int = 0,
    repair: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check structure, digests and values of a store, and a sample of it against the images.

    Parameters
    ----------
    store_path
        The store; it may still be growing.
    image_dir
        Folder of the images, for the sample.
    encoder
        What the sample is encoded with.
    n_sampled
        Embedded rows, chosen at random by `seed`, whose image is encoded again; their features
        must agree with the stored ones to a cosine of 0.9999.
    repair
        Mark bad rows pending, so that the next extraction computes them.
    on_progress
        Called with (rows checked, rows to check).

    Raises
    ------
    StoreNotFoundError, StoreFormatError
        There is no file, or its structure, description or image table is damaged.
    StoreBusyError
        `repair` while another process writes.
    ConfigError
        `image_dir` holds none of the images.

    Examples
    --------
    >>> found = verify("features.h5", repair=True)  # doctest: +SKIP
    >>> print(found.to_text())  # doctest: +SKIP
    """
    with FeatureStore.open(store_path, "r+" if repair else "r") as store:
        found = Verification(path=store.path)
        if store.header.encoder.get("imported"):
            found.redo = "cxr-cache import --overwrite"
        if image_dir is not None:  # else sound rows would be called bad, and forgotten by repair
            require_any_image(image_dir, store.image_ids[store.embedded_rows])
        found.bad_rows = _check_values(store, found, on_progress)
        if image_dir is not None and encoder is not None:
            bad = {row.row for row in found.bad_rows}
            good = np.setdiff1d(store.embedded_rows, list(bad))
            rng = np.random.default_rng(seed)
            sample = np.sort(rng.permutation(good)[:n_sampled])
            found.bad_rows += _compare(store, sample, Path(image_dir), encoder, found)
        if repair and found.bad_rows:
            store.mark_pending(np.array(sorted({bad.row for bad in found.bad_rows})))
            found.is_repaired = True
            mark_written(store.path)
        vars(found).update(vars(store.count_rows()))
    return found


def _check_values(
    store: FeatureStore, found: Verification, on_progress: Callable[[int, int], None] | None
) -> list[BadRow]:
    status = store.status
    reasons: dict[int, str] = {
        int(row): f"its status is {status[row]}, which means nothing"
        for row in np.flatnonzero(~np.isin(status, store.states))
    }
    for row in store.find_damaged(np.flatnonzero(status == FAILED)):
        reasons[int(row)] = "the bytes of its failure do not match their digest"
    embedded = np.flatnonzero(np.isin(status, EMBEDDED))
    fingerprints, n_checked = np.zeros(len(store), np.uint64), 0
    for state in EMBEDDED:
        for chunk, values, intact in store.check_rows(np.flatnonzero(status == state), state):
            features = {name: values[name] for name in store.features_of(state)}
            for row, reason in _find_bad_values(chunk, features, intact):
                reasons.setdefault(row, reason)
            embeddings = features["embeddings"].reshape(len(chunk), -1)
            fingerprints[chunk] = [xxhash.xxh3_64_intdigest(row.data) for row in embeddings]
            n_checked += len(chunk)
            if on_progress is not None:
                on_progress(n_checked, len(embedded))
    sound = embedded[~np.isin(embedded, list(reasons))]
    found.duplicates = _find_duplicates(store, sound, fingerprints[sound])
    return [BadRow(row, str(store.image_ids[row]), reasons[row]) for row in sorted(reasons)]


def _find_bad_values(
    rows: NDArray[np.intp], features: dict[str, NDArray[Any]], intact: NDArray[np.bool_]
) -> list[tuple[int, str]]:
    bad = [(int(row), "its bytes do not match their digest") for row in rows[~intact]]
    for name, column in features.items():
        bad += [(int(row), f"its {name} hold NaN or infinity") for row in rows[~are_finite(column)]]
        if name != "tokens":
            constant = (column == column[..., :1]).all(axis=-1).any(axis=-1)  # in any view
            bad += [(int(row), f"its {name} are one number repeated") for row in rows[constant]]
    return bad


def _find_duplicates(
    store: FeatureStore, rows: NDArray[np.intp], fingerprints: NDArray[np.uint64]
) -> list[tuple[str, str]]:
    """Images of equal embeddings whose files differ: a copy saved anew, or a mix-up."""
    _, first, group = np.unique(fingerprints, return_index=True, return_inverse=True)
    sha256 = store.read_column("image_sha256")
    pairs = zip(rows, rows[first[group]], strict=True)
    return [
        (str(store.image_ids[other]), str(store.image_ids[row]))
        for row, other in pairs
        if row != other and (sha256[row] != sha256[other]).any()
    ]


# -- against the images -----------------------------------------------------------------


def _compare(
    store: FeatureStore,
    rows: NDArray[np.intp],
    image_dir: Path,
    encoder: Encoder,
    found: Verification,
) -> list[BadRow]:
    from cxr_cache.store.resume import require_continuable

    try:
        require_continuable(store, encoder)
    except StoreMismatchError as error:
        found.mismatch = str(error)
        return []
    found.n_compared = len(rows)
    return [
        BadRow(row, str(store.image_ids[row]), reason)
        for start in range(0, len(rows), _IMAGES_AT_ONCE)
        for row, reason in _compare_batch(
            store, rows[start : start + _IMAGES_AT_ONCE], image_dir, encoder
        )
    ]


def _compare_batch(
    store: FeatureStore, rows: NDArray[np.intp], image_dir: Path, encoder: Encoder
) -> list[tuple[int, str]]:
    from cxr_cache.datasets.images import read_image
    from cxr_cache.encoders.encoding import MIN_COSINE, cosines, decode_tokens, encode_views

    bad, pixels = [], {}
    for row in map(int, rows):
        try:
            image = read_image(image_dir, str(store.image_ids[row]), encoder.preprocessing)
        except ImageError as error:
            bad.append((row, f"its image cannot be read any more: {error}"))
            continue
        stored = store.read_column("image_sha256")[row].tobytes()
        if image.sha256 == stored:
            pixels[row] = image.pixels
        else:
            digests = f"{stored.hex()[:12]}… in the store, {image.sha256.hex()[:12]}… now"
            bad.append((row, f"its image has changed: sha256 {digests}"))
    if not pixels:
        return bad
    features = encode_views(
        encoder,
        np.stack(list(pixels.values())),
        flip=store.columns["embeddings"].shape[0] == 2,
        n_unfrozen=store.header.n_unfrozen,
        tokens_dtype=store.header.tokens_dtype,
    )
    chosen = np.array(list(pixels))
    has_tokens = store.read_rows("status", chosen) == DONE
    for name, values in features.items():
        held = has_tokens if name == "tokens" else np.full(len(chosen), True)
        now, stored = values[held], store.read_rows(name, chosen[held])
        if name == "tokens":
            now, stored = (decode_tokens(part).float().numpy() for part in (now, stored))
        flat = (*now.shape[:2], -1)  # one vector per view, whatever a feature's shape
        worst = cosines(now.reshape(flat), stored.reshape(flat)).min(axis=1)  # (B, V) -> (B,)
        bad += [
            (int(row), f"its {name} have cosine {value:.6f} with those encoded now")
            for row, value in zip(chosen[held], worst, strict=True)
            if not value >= MIN_COSINE
        ]
    return bad
