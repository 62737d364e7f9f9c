"""The store that an extraction writes to: a new one, or the one that is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.wording import describe_differences, find_differences
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.images import read_bytes
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import MIN_COSINE, cosines, encode_canaries
from cxr_cache.encoders.identity import EncoderIdentity, require_not_imported, require_same_encoder
from cxr_cache.errors import ConfigError, ImageError, StoreMismatchError
from cxr_cache.store.feature_store import FeatureStore, Space


@dataclass(frozen=True)
class Resumed:
    """A store open for writing, and what became of the rows that it held."""

    store: FeatureStore
    n_taken_over: int = 0
    """Rows that moved over because the image table is another one."""
    n_damaged: int = 0
    """Rows whose bytes did not match their digest; computed again."""
    changed: tuple[str, ...] = ()
    """Images whose file has changed since, with both digests; computed again."""


def open_or_create(
    path: Path,
    cohort: Cohort,
    image_dir: Path,
    encoder: Encoder,
    *,
    n_views: int,
    n_unfrozen: int | None,
    tokens_dtype: str,
    part: Mapping[str, int] | None,
    recheck_images: bool,
    on_space: Callable[[Space], None] | None,
) -> Resumed:
    """Open the store at `path` to continue it, or create it.

    Embedded rows stay if their images' bytes are unchanged; every other row is pending then. Rows
    of another image table are taken over by the same rule, and where the store has no tokens yet
    but `n_unfrozen` asks for them, as rows that lack only these.

    Raises
    ------
    StoreMismatchError
        The store there holds other features; every difference is named with both values.
    DiskFullError
        There is no room for the store, or for the one that takes its place.
    """
    wanted = _plan_features(encoder.identity, n_views, n_unfrozen, tokens_dtype)
    if not path.exists():
        try:
            store = FeatureStore.create(
                path,
                cohort,
                encoder=encoder.identity.to_dict(),
                features=wanted.shapes,
                canary=encode_canaries(encoder),
                boundary_block=wanted.boundary_block,
                tokens_dtype=wanted.tokens_dtype,
                part=part,
                on_space=on_space,
                overwrite=False,
            )
            return Resumed(store)
        except ConfigError:
            if not path.exists():  # else another process has made it in the meantime
                raise
    store = FeatureStore.open(path, "r+")
    try:
        require_continuable(store, encoder)
        _require_same_shape(store, wanted, part)
        return _continue(
            store,
            cohort,
            image_dir,
            wanted,
            part,
            recheck_images=recheck_images,
            on_space=on_space,
        )
    except BaseException:
        store.close()
        raise


@dataclass(frozen=True)
class _Features:
    """What an extraction computes of each image."""

    shapes: Mapping[str, tuple[int, ...]]
    n_unfrozen: int | None = None
    boundary_block: int | None = None
    tokens_dtype: str = "float16"


def _plan_features(
    identity: EncoderIdentity, n_views: int, n_unfrozen: int | None, tokens_dtype: str
) -> _Features:
    D, P = identity.embedding_width, identity.pooled_width or identity.embedding_width
    shapes: dict[str, tuple[int, ...]] = {"embeddings": (n_views, D), "pooled": (n_views, P)}
    if n_unfrozen is None:
        return _Features(shapes)
    T, W, L = identity.n_tokens, identity.token_width, identity.n_blocks
    assert T is not None  # a tower that cannot be split was refused before
    assert W is not None
    assert L is not None
    shapes["tokens"] = (n_views, T, W)
    return _Features(shapes, n_unfrozen, L - n_unfrozen, tokens_dtype)


def require_continuable(store: FeatureStore, encoder: Encoder) -> None:
    """Raise unless features of `encoder` may stand beside those in `store`.

    The canaries are encoded and compared as well, since equal weights may still compute
    something else (a driver, a library).

    Raises
    ------
    StoreMismatchError
        With every differing field and both its values.
    """
    recorded = store.header.encoder
    require_not_imported(
        recorded,
        f"{store.path} holds",
        "no encoder here can continue them. Extract to another file.",
    )
    require_same_encoder(
        recorded,
        encoder.identity.to_dict(),
        "in the store",
        "in this run",
        "The two are not comparable. Write to another file, or use the store's encoder.",
        problem=f"{store.path} holds embeddings from another encoder",
    )
    if store.canary is None:
        return
    worst = float(cosines(store.canary, encode_canaries(encoder)).min())
    if not worst >= MIN_COSINE:
        raise StoreMismatchError(
            f"{store.path}: the encoder computes other embeddings than when the store "
            f"was made: cosine {worst:.6f} on the worst of {len(store.canary)} test images, "
            f"at least {MIN_COSINE} expected. Weights are the same, so compare the versions: "
            f"{store.header.versions}. Write to another file, or restore those versions."
        )


def _require_same_shape(
    store: FeatureStore, wanted: _Features, part: Mapping[str, int] | None
) -> None:
    """Raise unless the store holds what is wanted, or lacks nothing of it but the tokens."""
    there, here = (
        {
            "features": list(shapes),
            "unfreeze_layers": n_unfrozen,
            "tokens_dtype": tokens_dtype,
            "views": shapes["embeddings"][0],
            "part": (its_part or {}).get("number"),
            "parts": (its_part or {}).get("of"),
        }
        for shapes, n_unfrozen, tokens_dtype, its_part in (
            (
                store.feature_shapes,
                store.header.n_unfrozen,
                store.header.tokens_dtype,
                store.header.part,
            ),
            (wanted.shapes, wanted.n_unfrozen, wanted.tokens_dtype, part),
        )
    )
    if _lacks_tokens(store, wanted):
        there |= {name: here[name] for name in ("features", "unfreeze_layers", "tokens_dtype")}
    if differences := find_differences(there, here):
        raise StoreMismatchError(
            f"{store.path} holds other rows, views or tokens than this run makes:\n"
            + describe_differences(differences, "in the store", "in this run")
            + "\nGive the same --tokens, --unfreeze-layers, --tokens-dtype, --flip and --part as "
            "before, or write to another file."
        )


def _lacks_tokens(store: FeatureStore, wanted: _Features) -> bool:
    return [*store.features, "tokens"] == list(wanted.shapes)


def _continue(
    store: FeatureStore,
    cohort: Cohort,
    image_dir: Path,
    wanted: _Features,
    part: Mapping[str, int] | None,
    *,
    recheck_images: bool,
    on_space: Callable[[Space], None] | None,
) -> Resumed:
    same_table = store.header.part == part and _is_same_table(store.cohort, cohort)
    same_file = same_table and not _lacks_tokens(store, wanted)
    if not same_file:
        # Before the images are read.
        store.require_space(cohort, wanted.shapes, on_space, tokens_dtype=wanted.tokens_dtype)
    damaged = store.find_damaged()
    store.mark_pending(damaged)
    if same_file and not recheck_images:
        return Resumed(store, n_damaged=len(damaged))
    digests: list[bytes | None] = [None] * len(cohort)
    if recheck_images or not same_table:
        digests = _hash_images(cohort.image_ids, image_dir)
    rows, changed = _match_rows(store, cohort, digests)
    if same_file:
        embedded = store.embedded_rows
        store.mark_pending(embedded[rows[embedded] != embedded])
        return Resumed(store, n_damaged=len(damaged), changed=changed)
    _require_nothing_lost(store, cohort, rows)
    replaced = store.replace(
        cohort,
        rows,
        features=wanted.shapes,
        boundary_block=wanted.boundary_block,
        tokens_dtype=wanted.tokens_dtype,
        part=part,
    )
    return Resumed(replaced, int((rows >= 0).sum()), len(damaged), changed)


def _require_nothing_lost(store: FeatureStore, cohort: Cohort, rows: NDArray[np.intp]) -> None:
    """Refuse a table that leaves finished images out: --limit, say, on a whole store."""
    embedded = store.embedded_rows
    kept = np.isin(embedded, rows) | np.isin(store.image_ids[embedded], cohort.image_ids)
    if not kept.all():
        first = str(store.image_ids[embedded[~kept][0]])
        raise StoreMismatchError(
            f"{store.path} holds {(~kept).sum():,} finished images that this run's table of "
            f"{len(cohort):,} leaves out; the first is {first!r}. They would be lost. Write to "
            "another file, or give the whole table (without --limit)."
        )


def _is_same_table(stored: Cohort, wanted: Cohort) -> bool:
    return (
        stored.findings == wanted.findings
        and stored.images.equals(wanted.images)
        and np.array_equal(stored.targets, wanted.targets, equal_nan=True)
    )


def _match_rows(
    store: FeatureStore, cohort: Cohort, digests: list[bytes | None]
) -> tuple[NDArray[np.intp], tuple[str, ...]]:
    """For each wanted image the embedded row of the same bytes, or -1; and what has changed.

    An image whose file cannot be read now keeps its row: nothing shows that it has changed.
    """
    sha256 = store.read_column("image_sha256")
    stored = {int(row): sha256[row].tobytes() for row in store.embedded_rows}
    row_of_id = {str(store.image_ids[row]): row for row in stored}
    row_of_digest = {digest: row for row, digest in stored.items()}
    rows, changed = np.full(len(cohort), -1, np.intp), []
    for i, (image_id, now) in enumerate(zip(map(str, cohort.image_ids), digests, strict=True)):
        row = row_of_id.get(image_id, -1)
        rows[i] = row if now is None or stored.get(row) == now else row_of_digest.get(now, -1)
        if row >= 0 and now is not None and stored[row] != now:
            changed.append(
                f"{image_id}: sha256 {stored[row].hex()[:12]}… in the store, {now.hex()[:12]}… now"
            )
    return rows, tuple(changed)


def _hash_images(image_ids: NDArray[np.str_], image_dir: Path) -> list[bytes | None]:
    def hash_one(image_id: str) -> bytes | None:
        try:
            return hashlib.sha256(read_bytes(image_dir, image_id)).digest()
        except ImageError:
            return None

    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter's lock
        return list(pool.map(hash_one, map(str, image_ids)))
