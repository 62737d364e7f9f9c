"""Cache chest X-ray embeddings once, train on them from then on.

The names below are the package's door; each is imported when it is first used, so that
``import cxr_cache`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cxr_cache.cohort import Cohort, load_cohort
    from cxr_cache.config import TrainConfig
    from cxr_cache.encoder import load_encoder
    from cxr_cache.estimator import FocalHeadClassifier
    from cxr_cache.evaluate import evaluate_run
    from cxr_cache.extract import ExtractConfig, extract_embeddings
    from cxr_cache.importing import import_embeddings
    from cxr_cache.predict import predict_images
    from cxr_cache.report import write_report
    from cxr_cache.run import Run
    from cxr_cache.splitter import GroupedMultilabelSplit
    from cxr_cache.store import FeatureStore
    from cxr_cache.train import train_head

__version__ = "0.1.0"

_HOMES = {
    "Cohort": "cohort",
    "ExtractConfig": "extract",
    "FeatureStore": "store",
    "FocalHeadClassifier": "estimator",
    "GroupedMultilabelSplit": "splitter",
    "Run": "run",
    "TrainConfig": "config",
    "evaluate_run": "evaluate",
    "extract_embeddings": "extract",
    "import_embeddings": "importing",
    "load_cohort": "cohort",
    "load_encoder": "encoder",
    "predict_images": "predict",
    "train_head": "train",
    "write_report": "report",
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
