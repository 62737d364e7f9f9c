"""Cache chest X-ray embeddings once, train on them from then on.

The names below are the package's door; each is imported when it is first used, so that
``import cxr_cache`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cxr_cache.config import ExtractConfig, TrainConfig
    from cxr_cache.datasets.cohort import Cohort
    from cxr_cache.datasets.readers import load_cohort
    from cxr_cache.encoders.loading import load_encoder
    from cxr_cache.jobs.runs import evaluate_run, train_head
    from cxr_cache.models.predict import predict_images
    from cxr_cache.models.run import Run
    from cxr_cache.report.report import write_report
    from cxr_cache.store.extract import extract_embeddings
    from cxr_cache.store.feature_store import FeatureStore
    from cxr_cache.store.importing import import_embeddings
    from cxr_cache.training.estimator import FocalHeadClassifier, GroupedMultilabelSplit

__version__ = "0.1.0"

_HOMES = {
    "Cohort": "datasets.cohort",
    "ExtractConfig": "config",
    "FeatureStore": "store.feature_store",
    "FocalHeadClassifier": "training.estimator",
    "GroupedMultilabelSplit": "training.estimator",
    "Run": "models.run",
    "TrainConfig": "config",
    "evaluate_run": "jobs.runs",
    "extract_embeddings": "store.extract",
    "import_embeddings": "store.importing",
    "load_cohort": "datasets.readers",
    "load_encoder": "encoders.loading",
    "predict_images": "models.predict",
    "train_head": "jobs.runs",
    "write_report": "report.report",
}

__all__ = [
    "Cohort",
    "ExtractConfig",
    "FeatureStore",
    "FocalHeadClassifier",
    "GroupedMultilabelSplit",
    "Run",
    "TrainConfig",
    "evaluate_run",
    "extract_embeddings",
    "import_embeddings",
    "load_cohort",
    "load_encoder",
    "predict_images",
    "train_head",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cxr_cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cxr_cache.{_HOMES[name]}"), name)
