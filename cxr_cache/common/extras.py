"""Optional parts: what each extra of the package gives, and which packages it consists of."""

from __future__ import annotations

from typing import Final, NamedTuple

from cxr_cache.common.wording import package_versions
from cxr_cache.errors import ConfigError


class Extra(NamedTuple):
    """One of ``pip install 'cxr-cache[NAME]'``."""

    packages: tuple[str, ...]
    """As pip names them."""
    gives: str
    """What works with them and not without, after the word "for"."""


EXTRAS: Final = {
    "dask": Extra(("dask", "distributed"), "--backend dask, on one or several machines"),
    "dicom": Extra(
        ("pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg"), "DICOM files"
    ),
    "excel": Extra(("openpyxl",), "label tables in .xlsx files"),
    "fast": Extra(
        ("numba", "kornia-rs"),
        "compiled training steps on a CPU, and PNG files in half the time",
    ),
    "mlflow": Extra(("mlflow-skinny",), "--log-to mlflow"),
    "onnx": Extra(("onnx", "onnxruntime", "onnxscript"), "export --format onnx"),
    "parquet": Extra(("pyarrow",), "tables in .parquet files"),
    "ray": Extra(("ray",), "--backend ray, on one or several machines"),
    "tensorboard": Extra(("tensorboard",), "--log-to tensorboard"),
    "text": Extra(("transformers",), "zero-shot with BiomedCLIP"),
    "umap": Extra(("umap-learn",), "browse --method umap"),
    "wandb": Extra(("wandb",), "--log-to wandb"),
}
"""By name, as in pyproject.toml, which a test compares. Other packages do for some: the whole
mlflow, which holds mlflow-skinny."""

_INSTEAD: Final = {"mlflow-skinny": "mlflow"}


def missing_packages(extra: str) -> list[str]:
    """Packages of an extra that are not installed."""
    return [
        package
        for package in EXTRAS[extra].packages
        if not package_versions(package, _INSTEAD.get(package, package))
    ]


def require_extra(extra: str, what: str) -> None:
    """Raise ConfigError, with the pip line, unless the packages of an extra are installed."""
    if missing := missing_packages(extra):
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which cxr-cache does without otherwise. "
            f"Install with: {pip_line(extra)}"
        )


def pip_line(extra: str) -> str:
    """What to type for an extra."""
    return f"pip install 'cxr-cache[{extra}]'"
