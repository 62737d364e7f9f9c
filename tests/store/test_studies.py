"""What a head reads of a study, and the tokens of a batch of studies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.studies import Studies, group_by_study
from cxr_cache.store.studies import StudyTokens, average_views, head_width
from cxr_cache.store.tokens import ResidentTokens


def make_studies(n_images: int, seed: int) -> Studies:
    rng = np.random.default_rng(seed)
    images = pd.DataFrame(
        {
            "image_id": np.arange(n_images).astype(str),
            "study_uid": rng.integers(0, n_images // 2, n_images).astype(str),
            "projection": rng.choice(["Frontal", "Lateral", ""], n_images),
        }
    )
    return group_by_study(Cohort(images, np.zeros((n_images, 1), np.float32), ("Mass",)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_head_reads_the_mean_of_each_projection_and_which_there_are(seed):
    studies = make_studies(24, seed)
    features = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(seed))
    rows, slots = studies.pick(np.arange(len(studies.cohort)))
    averaged = average_views(features[:, rows], torch.from_numpy(slots))
    assert averaged.shape == (2, len(studies.cohort), head_width(5, "study"))
    is_lateral = studies.images.projections == "Lateral"
    for view in range(2):
        for k in range(len(studies.cohort)):
            sides = [(studies.study_of == k) & (is_lateral == side) for side in (False, True)]
            means = [
                features[view, torch.from_numpy(side)].mean(dim=0) if side.any() else torch.zeros(5)
                for side in sides
            ]
            there = torch.tensor([float(side.any()) for side in sides])
            torch.testing.assert_close(averaged[view, k], torch.cat([*means, there]))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_a_batch_has_the_tokens_of_all_images_of_its_studies(batch_size):
    studies = make_studies(24, 0)
    tokens = torch.randn(24, 2, 3, 4)
    chosen = torch.tensor([5, 0, 2, 6, 1, 3, 4])
    views = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    source = StudyTokens(ResidentTokens(tokens), studies)
    batches = list(source.batches(chosen, views, batch_size))
    assert len(batches) == -(-len(chosen) // batch_size)
    for k, batch in enumerate(batches):
        part = slice(k * batch_size, (k + 1) * batch_size)
        rows, slots = studies.pick(chosen[part].numpy())
        seen = views[part][torch.from_numpy(slots // 2)]
        assert batch.slots.tolist() == slots.tolist()
        torch.testing.assert_close(batch.tokens, tokens[torch.from_numpy(rows), seen])


def test_no_two_views_of_a_study_are_changed_by_the_same_draw():
    studies = make_studies(24, 0)
    seen = {}

    class Source(ResidentTokens):
        def batches(self, rows, views, batch_size, *, seeds=None):
            seen.update(zip(rows.tolist(), seeds.tolist(), strict=True))
            return super().batches(rows, views, batch_size)

    chosen = torch.arange(len(studies.cohort))
    source = StudyTokens(Source(torch.zeros(24, 1, 3, 4)), studies)
    list(source.batches(chosen, torch.zeros_like(chosen), 4, seeds=1000 * chosen))
    assert len(set(seen.values())) == 24
