"""Cache chest X-ray embeddings once, and train on them from then on.

The names below are the package's public door. Each is imported when it is first used, so that
``import cxr_cache`` does not wait for torch.

A job from images to a tested model:

>>> import cxr_cache
>>> cohort = cxr_cache.load_cohort("DATA")  # doctest: +SKIP
>>> encoder = cxr_cache.load_encoder()  # doctest: +SKIP
>>> cxr_cache.extract_embeddings(cohort, "DATA/images", "features.h5", encoder)  # doctest: +SKIP
>>> result = cxr_cache.train_head("features.h5", "runs/first")  # doctest: +SKIP
>>> result.run.predictions.head()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cxr_cache.config import ExtractConfig as ExtractConfig
    from cxr_cache.config import FinetuneConfig as FinetuneConfig
    from cxr_cache.config import TrainConfig as TrainConfig
    from cxr_cache.datasets.cohort import Cohort as Cohort
    from cxr_cache.datasets.readers import load_cohort as load_cohort
    from cxr_cache.encoders.loading import load_encoder as load_encoder
    from cxr_cache.evaluation.audit import audit_store as audit_store
    from cxr_cache.evaluation.compare import compare_runs as compare_runs
    from cxr_cache.evaluation.evaluate import evaluate_predictions as evaluate_predictions
    from cxr_cache.evaluation.zero_shot import score_zero_shot as score_zero_shot
    from cxr_cache.jobs.external import evaluate_on_store as evaluate_on_store
    from cxr_cache.jobs.runs import finetune_tail as finetune_tail
    from cxr_cache.jobs.runs import train_head as train_head
    from cxr_cache.jobs.scoring import evaluate_run as evaluate_run
    from cxr_cache.models.explain import explain_images as explain_images
    from cxr_cache.models.export import export_run as export_run
    from cxr_cache.models.predict import predict_images as predict_images
    from cxr_cache.models.run import Run as Run
    from cxr_cache.report.methods import describe_methods as describe_methods
    from cxr_cache.report.report import write_report as write_report
    from cxr_cache.store.exporting import export_features as export_features
    from cxr_cache.store.extract import extract_embeddings as extract_embeddings
    from cxr_cache.store.feature_store import FeatureStore as FeatureStore
    from cxr_cache.store.importing import import_embeddings as import_embeddings
    from cxr_cache.store.verify import verify as verify
    from cxr_cache.training.ablate import run_ablation as run_ablation
    from cxr_cache.training.estimator import FocalHeadClassifier as FocalHeadClassifier
    from cxr_cache.training.estimator import GroupedMultilabelSplit as GroupedMultilabelSplit

__version__ = "0.1.0"

_HOMES: Final = {
    "Cohort": "datasets.cohort",
    "ExtractConfig": "config",
    "FeatureStore": "store.feature_store",
    "FinetuneConfig": "config",
    "FocalHeadClassifier": "training.estimator",
    "GroupedMultilabelSplit": "training.estimator",
    "Run": "models.run",
    "TrainConfig": "config",
    "audit_store": "evaluation.audit",
    "compare_runs": "evaluation.compare",
    "describe_methods": "report.methods",
    "evaluate_on_store": "jobs.external",
    "evaluate_predictions": "evaluation.evaluate",
    "evaluate_run": "jobs.scoring",
    "explain_images": "models.explain",
    "export_features": "store.exporting",
    "export_run": "models.export",
    "extract_embeddings": "store.extract",
    "finetune_tail": "jobs.runs",
    "import_embeddings": "store.importing",
    "load_cohort": "datasets.readers",
    "load_encoder": "encoders.loading",
    "predict_images": "models.predict",
    "run_ablation": "training.ablate",
    "score_zero_shot": "evaluation.zero_shot",
    "train_head": "jobs.runs",
    "verify": "store.verify",
    "write_report": "report.report",
}
"""Every public name, and the module that it is imported from."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cxr_cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cxr_cache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
