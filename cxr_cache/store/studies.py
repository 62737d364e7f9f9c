"""Features and tokens of images -> those of their studies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cxr_cache.datasets.studies import N_PROJECTIONS, Studies
from cxr_cache.store.tokens import TokenSource


class StudyBatch(NamedTuple):
    """Tokens of the n images of some studies."""

    tokens: Tensor
    """``(n, T, W)``."""
    slots: Tensor
    """Study and projection of each image, as :meth:`Studies.pick` gives them, ``(n,)`` int64."""


def take_tokens(batch: Tensor | StudyBatch, kept: Tensor) -> Tensor | StudyBatch:
    """The batch with some tokens of every image, by their places."""
    if isinstance(batch, StudyBatch):
        return batch._replace(tokens=batch.tokens[:, kept])
    return batch[:, kept]


def average_views(features: Tensor, slots: Tensor) -> Tensor:
    """What a head reads of S studies, ``(..., n, D)`` -> ``(..., S, 2 D + 2)``.

    First comes the mean over a study's frontal images, then that over its lateral ones, zeros where
    there are none; then a 1 for each of the two that is there, so that a missing view is not taken
    for an unremarkable one.
    """
    D = features.shape[-1]
    n_slots = N_PROJECTIONS * (int(slots.max()) // N_PROJECTIONS + 1)
    n_images = torch.bincount(slots, minlength=n_slots).to(features.device)
    total = features.new_zeros(*features.shape[:-2], n_slots, D)
    total = total.index_add(-2, slots.to(features.device), features)
    means = total / n_images.clamp(min=1)[:, None]
    is_there = (n_images > 0).to(features.dtype).expand(means.shape[:-1])
    return torch.cat(
        [x.reshape(*means.shape[:-2], n_slots // N_PROJECTIONS, -1) for x in (means, is_there)], -1
    )


def head_width(width: int, level: str) -> int:
    """How many numbers a head reads where an image has `width` features."""
    return N_PROJECTIONS * (width + 1) if level == "study" else width


class StudyTokens:
    """The tokens of S studies: those of all their images, from a source of these."""

    def __init__(self, images: TokenSource, studies: Studies) -> None:
        self._images, self._studies = images, studies
        self.n_views = images.n_views

    @property
    def description(self) -> str:
        """See :class:`cxr_cache.store.tokens.TokenSource`."""
        return f"{self._images.description}, of {len(self._studies.cohort):,} studies"

    def batches(
        self, rows: Tensor, views: Tensor, batch_size: int, *, seeds: Tensor | None = None
    ) -> Iterator[StudyBatch]:
        """Tokens of some studies, B studies at a time, of each image in the view of its study.

        Arguments are those of :meth:`cxr_cache.store.tokens.TokenSource.batches`, for studies.
        """
        places, slots = map(torch.from_numpy, self._studies.pick(rows.numpy()))
        of = slots // N_PROJECTIONS
        starts = torch.arange(0, len(rows) + batch_size, batch_size)
        ends = torch.searchsorted(of, starts)
        if seeds is not None:
            seeds = seeds[of] + places  # no two views of a study are turned alike
        tokens = self._images.batches(places, views[of], batch_size, seeds=seeds)
        sizes = ends.diff().tolist()
        for start, batch, of_images in zip(
            starts.tolist(), _cut(tokens, sizes), torch.split(slots, sizes), strict=False
        ):
            yield StudyBatch(batch, of_images - N_PROJECTIONS * start)


def _cut(batches: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Cut batches anew, into parts of these sizes."""
    rest: Tensor | None = None
    for size in sizes:
        if rest is None:
            rest = next(batches)
        taken, rest = rest[:size], rest[size:]
        while len(taken) < size:
            missing, kept = size - len(taken), taken.clone()  # the next batch may overwrite it
            rest = next(batches)
            taken, rest = torch.cat([kept, rest[:missing]]), rest[missing:]
        yield taken
