"""What a frozen run gives to the fine-tuning that begins where it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from cxr_cache.common.wording import describe_differences, find_differences
from cxr_cache.config import FinetuneConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import TEST, Split
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.errors import RunError
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import LabelledRows

_OF_THE_RUN: Final = (
    *("n_folds", "test_fraction", "split_by", "seed"),
    *("hidden", "dropout", "norm", "input_norm"),
    *("loss", "alpha", "gamma"),
)
"""Options that a fine-tuning takes from the frozen run that it starts from."""

_DECIDED_BY_THE_RUN: Final = (
    *("findings", "hidden", "norm", "input_norm"),
    *("n_folds", "split_by", "test_fraction"),
)
"""What cannot be chosen again after the frozen run: the shape of its heads, and its split."""


@dataclass(frozen=True)
class Start:
    """What a frozen run gives to the fine-tuning that begins where it ended."""

    split: Split
    fold_heads: tuple[dict[str, Tensor], ...]
    """The head of each fold, which has not seen that fold: the final one has."""
    final_head: dict[str, Tensor]


def config_from_run(run: Run, **given: Any) -> FinetuneConfig:
    """Options for fine-tuning on from a frozen run: its folds, head, epochs, rule and calibration.

    Parameters
    ----------
    run
        A run of ``train``.
    given
        Options that the user chose; they go before the run's.
    """
    _require_frozen(run)
    own = {name: run.config["train"][name] for name in _OF_THE_RUN if name in run.config["train"]}
    if own["input_norm"] == "standard":
        own["input_norm"] = "none"  # mean and spread are in the head's first layer
    own["epochs"] = (run.config["chosen_epochs"],)
    own["threshold_rule"] = run.threshold_rule  # of the model: `evaluate` may have chosen anew
    own["calibration"] = run.calibration.method
    return FinetuneConfig(**(own | given))


def _require_frozen(run: Run) -> None:
    if run.config["kind"] != "train":
        raise RunError(
            f"{run.path} is a run of `cxr-cache {run.config['kind']}`; --from-run starts from one "
            "of `cxr-cache train`."
        )
    if (features := run.config["train"].get("features", "projected")) != "projected":
        raise RunError(
            f"{run.path} was trained with --features {features}, and fine-tuning ends in the "
            "projected embedding. Start from a run with --features projected."
        )


def load_start(run: Run, found: LabelledRows, store: FeatureStore, config: FinetuneConfig) -> Start:
    """Read split and heads of a frozen run, and raise unless they fit the rows and options.

    Raises
    ------
    RunError
        The run is of another store, other images, labels or options; both values are named.
    """
    _require_frozen(run)
    model, cohort = run.load_model(), found.cohort
    recorded = run.config["train"] | model.head | {"findings": list(model.findings)}
    given = asdict(config) | {"findings": list(cohort.findings), "hidden": list(config.hidden)}
    before, now = (
        {name: values[name] for name in _DECIDED_BY_THE_RUN} for values in (recorded, given)
    )
    differences = find_differences(before, now) | _encoder_differences(model.encoder, store)
    if differences:
        raise RunError(
            f"{run.path} cannot be the start of a fine-tuning on {store.path}:\n"
            + describe_differences(differences, "in the run", "now")
            + "\nStart from a run that was trained on this store, with the same options."
        )
    split = _read_split(run, cohort, config)
    heads = run.load_fold_heads()
    fold_heads = ({name: t[k : k + 1] for name, t in heads.items()} for k in range(config.n_folds))
    # Of an ensemble any member will do: none has seen test.
    final_head = {name: tensor[:1] for name, tensor in model.head_tensors.items()}
    return Start(split, tuple(fold_heads), final_head)


def _encoder_differences(recorded: dict[str, Any], store: FeatureStore) -> dict[str, Any]:
    if recorded.get("imported"):
        return {"encoder": (recorded["name"], store.header.encoder["name"])}
    stored = EncoderIdentity.from_dict(store.header.encoder)
    return dict(EncoderIdentity.from_dict(recorded).differences(stored))


def _read_split(run: Run, cohort: Cohort, config: FinetuneConfig) -> Split:
    """The run's split in the order of the cohort's rows."""
    table = run.read_table("splits").set_index("image_id")
    targets = run.read_table("targets").set_index("image_id")
    same_images = set(table.index) == set(cohort.image_ids.tolist())
    if not same_images:
        raise RunError(
            f"{run.path} was trained on {len(table):,} images, {len(cohort):,} can be trained on "
            "here, and they are not the same. Train it again on this store."
        )
    before = targets.loc[cohort.image_ids, list(cohort.findings)].to_numpy(np.float32)
    if not np.array_equal(before, cohort.targets, equal_nan=True):
        n_other = int((~np.isclose(before, cohort.targets, equal_nan=True)).any(axis=1).sum())
        raise RunError(
            f"{run.path} was trained on other targets for {n_other:,} of {len(cohort):,} images. "
            "Give the same --labels, or train it again."
        )
    table = table.loc[cohort.image_ids]
    fold = table["fold"].fillna(TEST + 1).to_numpy(np.int64) - 1
    return Split((table["split"] == "test").to_numpy(), fold, config.split_by)
