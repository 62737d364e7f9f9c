"""Each published data set, laid out in small as it comes, is recognised and read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cxr_cache.datasets.images import find_missing
from cxr_cache.datasets.readers import load_cohort
from tests.datasets.collections.trees import TREES


@pytest.fixture(scope="module", params=TREES)
def laid_out(request, tmp_path_factory):
    """Format, folder, and what should be found there."""
    form, lay_out = TREES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tree = lay_out(folder)
    inner = folder / "CheXpert-v1.0-small"
    return form, inner if inner.is_dir() else folder, tree


def test_it_is_recognised_and_every_image_is_found(laid_out):
    form, folder, tree = laid_out

    cohort = load_cohort(folder, image_dir=folder)

    assert cohort.reading.format == form
    assert cohort.reading.why
    assert (len(cohort), len(cohort.findings)) == (tree.n_images, tree.n_findings)
    assert len(set(cohort.patient_ids.tolist()) - {""}) == tree.n_patients
    assert find_missing(folder, cohort.image_ids) == []


def test_its_own_split_and_findings_are_taken(laid_out):
    _, folder, tree = laid_out

    cohort = load_cohort(folder, image_dir=folder)

    given = cohort.images.get("given_split", np.full(len(cohort), ""))
    assert {side: n for side, n in Counter(given).items() if side} == tree.split
    assert bool(cohort.reading.split) == bool(tree.split)
    for finding, n_present in tree.present.items():
        assert (cohort.targets[:, cohort.findings.index(finding)] == 1).sum() == n_present, finding
