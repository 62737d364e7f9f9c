"""What is in a feature store, on one screen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from cxr_cache.common.wording import count
from cxr_cache.store.feature_store import FAILED, FeatureStore


def summarise_store(store: FeatureStore) -> dict[str, Any]:
    """Everything about a store that fits a screen, JSON-able.

    Digests are checked, so that ``damaged`` counts rows whose bytes have changed.
    """
    counts = store.count_rows()
    failed = np.flatnonzero(store.status == FAILED)
    cohort = store.cohort
    sample = store.embeddings[store.embedded_rows[:2000]]  # (n, V, D)
    norms = np.linalg.norm(sample, axis=-1)
    return {
        "path": str(store.path),
        "bytes": store.path.stat().st_size,
        "format_version": store.header.format_version,
        "versions": store.header.versions,
        "encoder": store.header.encoder,
        "cohort": store.header.cohort,
        "part": store.header.part,
        "images": counts.n_images,
        "image_columns": cohort.images.columns.tolist(),
        "studies": len(np.unique(cohort.study_uids)),
        "findings": len(store.findings),
        "positives": int((cohort.targets == 1).sum()),
        "done": counts.n_done,
        "failed": counts.n_failed,
        "pending": counts.n_pending,
        "without_tokens": counts.n_without_tokens,
        "boundary_block": store.header.boundary_block,
        "tokens_dtype": store.header.tokens_dtype,
        "damaged": len(store.find_damaged()),
        "reasons": dict(Counter(store.read_errors(failed)).most_common(5)),
        "columns": {
            name: {"shape": [column.n_rows, *column.shape], "dtype": column.dtype.name}
            for name, column in store.columns.items()
        },
        "norm": [float(norms.min()), float(norms.mean()), float(norms.max())]
        if len(sample)
        else [],
    }


def format_store(summary: dict[str, Any]) -> str:
    """Text of :func:`summarise_store` for a terminal."""
    encoder = summary["encoder"]
    lines = [
        f"{summary['path']}  ({summary['bytes'] / 1e6:,.1f} MB, "
        f"format version {summary['format_version']})",
        "",
        f"images    {summary['images']:,} of {count(summary['studies'], 'study')} = "
        f"{summary['done']:,} done + {summary['failed']:,} failed + {summary['pending']:,} pending",
    ]
    if n_rows := summary["without_tokens"]:
        lines.append(f"          {n_rows:,} pending rows lack nothing but their tokens")
    if part := summary["part"]:
        lines.append(f"          part {part['number']} of {part['of']}, to be merged")
    lines += [f"          {n:,} failed: {why}" for why, n in summary["reasons"].items()]
    damaged = summary["damaged"]
    digests = "all finished rows match" if not damaged else f"{count(damaged, 'damaged row')}"
    lines += [
        f"digests   {digests}",
        f"table     {', '.join(summary['image_columns'])}",
        f"targets   {count(summary['findings'], 'finding')}, "
        f"{count(summary['positives'], 'positive')}",
        "",
        f"encoder   {encoder['name']}"
        + ("  (RANDOM WEIGHTS: no medical meaning)" if encoder.get("is_random") else ""),
        f"  weights sha256  {encoder['weights_sha256'][:16]}…",
        *(f"  Note: {note}" for note in encoder.get("notes", ())),
    ]
    details = {k: v for k, v in encoder.items() if isinstance(v, str | int | float)}
    counts = ("n_blocks", "n_tokens", "pooled_width", "embedding_width")
    for key in ("revision", "precision", *counts, "pool", "positions_from_px"):
        if key in details:
            lines.append(f"  {key.replace('_', ' '):<15} {details[key]}")
    for key, value in dict(encoder.get("preprocessing", {})).items():
        if key != "decode_rule":
            lines.append(f"  {key.replace('_', ' '):<15} {value}")
    if (block := summary["boundary_block"]) is not None:
        lines.append(
            f"  tokens enter    block {block}, counted from 0, in {summary['tokens_dtype']}"
        )
    lines += ["", "columns"]
    for name, column in summary["columns"].items():
        shape = " x ".join(f"{n:,}" for n in column["shape"])
        lines.append(f"  {name:<14} {column['dtype']:<9} {shape}")
    if summary["norm"]:
        low, mean, high = summary["norm"]
        lines.append(f"  Euclidean norm of embeddings: {low:.3g} to {high:.3g}, mean {mean:.3g}")
    versions = ", ".join(f"{k} {v}" for k, v in (summary["versions"] or {}).items())
    sources = ", ".join(f"{name} ({digest[:8]}…)" for name, digest in summary["cohort"].items())
    return "\n".join([*lines, "", f"made by   {versions}", f"from      {sources}"])
