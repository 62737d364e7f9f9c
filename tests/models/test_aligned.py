"""A run is looked up among the images of a store by their ids, whatever their order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.errors import RunError
from cxr_cache.models.aligned import align_run
from cxr_cache.models.run import Run
from cxr_cache.training.train import fit_run
from tests.synthetic import QUICK, make_cohort, make_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Run, Cohort]:
    """A run on all but the last ten images, and all of them with other targets."""
    folder, cohort = tmp_path_factory.mktemp("aligned"), make_cohort(60)
    store = make_store(folder / "s.h5", cohort.take(slice(110)))
    run = fit_run(store, folder / "run", replace(QUICK, epochs=(1,))).run
    return run, replace(cohort, targets=np.zeros_like(cohort.targets)).assign(sex="F")


def test_images_come_in_the_store_s_order_with_the_run_s_targets_and_folds(trained, tmp_path):
    run, cohort = trained
    shuffled = cohort.take(np.random.default_rng(0).permutation(len(cohort)))

    aligned = align_run(run, shuffled, tmp_path / "s.h5")

    assert (np.diff(aligned.places) > 0).all()
    assert aligned.cohort.image_ids.tolist() == shuffled.image_ids[aligned.places].tolist()
    assert len(aligned.cohort) == 110
    assert set(aligned.cohort.images["sex"]) == {"F"}  # the store describes them
    targets = run.read_table("targets").set_index("image_id").loc[aligned.cohort.image_ids]
    np.testing.assert_array_equal(aligned.cohort.targets, targets.to_numpy(np.float32))
    split = run.read_table("splits").set_index("image_id").loc[aligned.cohort.image_ids]
    assert (split["split"] == "test").tolist() == aligned.is_test.tolist()
    assert set(aligned.fold[aligned.is_test]) == {-1}
    assert split["fold"][~aligned.is_test].tolist() == (aligned.fold[~aligned.is_test] + 1).tolist()


def test_only_the_test_images_need_to_be_there_where_only_these_are_asked_for(trained, tmp_path):
    run, cohort = trained
    split = run.read_table("splits")
    test = cohort.take(np.isin(cohort.image_ids, split["image_id"][split["split"] == "test"]))

    aligned = align_run(run, test, tmp_path / "s.h5", only_test=True)

    assert aligned.places.tolist() == list(range(len(test)))
    assert aligned.is_test.all()
    with pytest.raises(
        RunError, match=rf"of the 110 images of .*run are not among the {len(test)}"
    ):
        align_run(run, test, tmp_path / "s.h5")
    with pytest.raises(RunError, match=r"1 of the \d+ test images.*s\.h5.*the first is '\d+\.png'"):
        align_run(run, test.take(slice(1, None)), tmp_path / "s.h5", only_test=True)
