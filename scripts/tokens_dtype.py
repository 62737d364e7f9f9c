"""What the number format of cached tokens costs: the same trainings from tokens rounded otherwise.

    python scripts/tokens_dtype.py DATA --model local-dir:TOWER --images 1500 --seeds 3 --epochs 4

The tokens of the first images of a data set are computed once, in float32. Then the last two blocks
and a head are trained from them, from the same rounded to bfloat16 and to float16, and once more
from float32 on another number of threads, which changes nothing but the order of sums: that is how
far rounding alone drives two trainings apart. Every seed has its own split; scores are those of its
held-out fold.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import format_table, write_json
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.config import FinetuneConfig
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.locate import default_image_dir
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ImageError
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.tokens import ResidentTokens
from cxr_cache.training.fit import Trajectory
from cxr_cache.training.search import fold_tasks, split_cohort
from cxr_cache.training.tuning import TuningData, tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_tokens(encoder: Encoder, image_dir: Path, image_ids: NDArray[Any]) -> tuple[Tensor, Any]:
    """Tokens ``(N, 1, T, W)`` of the images that can be read, and which these are."""
    parts, found = [], []
    for i, image_id in enumerate(image_ids):
        try:
            pixels = read_image(image_dir, str(image_id), encoder.preprocessing).pixels
        except ImageError:
            continue
        found.append(i)
        with torch.inference_mode():
            parts.append(encoder.stem(encoder.prepare(torch.from_numpy(pixels)[None]), 2))
    return torch.stack(parts), np.array(found)


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    encoder = load_encoder(given.model, precision=given.precision)
    image_dir = default_image_dir(given.data)
    cohort = load_cohort(given.data).take(slice(given.images))
    tokens, found = read_tokens(encoder, image_dir, cohort.image_ids)
    cohort = cohort.take(found)
    tail = copy_tail(encoder, 2)
    rows = []
    for seed in range(given.seeds):
        config = FinetuneConfig(
            epochs=(given.epochs,),
            seed=seed,
            precision=encoder.precision,
            batch_size=16,
            warmup_steps=10,
            patch_dropout=0.5,
        )
        task = fold_tasks(split_cohort(cohort, config), seed)[0]
        held_out = cohort.targets[task.held_out_rows]

        def train(source: Any, config: FinetuneConfig = config, task: Any = task) -> Trajectory:
            data = TuningData(encoder, source, cohort.targets, tail)
            return tune(
                data, task, config, n_epochs=given.epochs, keep=[given.epochs], keep_weights=False
            )

        sources = {
            **{name: ResidentTokens(tokens.to(dtype)) for name, dtype in DTYPES.items()},
            "float32, other threads": ResidentTokens(tokens),
        }
        exact = None
        for name, source in sources.items():
            started, n_threads = time.perf_counter(), torch.get_num_threads()
            if "threads" in name:
                torch.set_num_threads(1 if n_threads > 1 else 2)
            trajectory = train(source)
            torch.set_num_threads(n_threads)
            exact = exact or trajectory
            rows.append(
                {
                    "tokens": name,
                    "seed": seed,
                    "auroc": float(
                        macro_mean(auroc(held_out, trajectory.probabilities[given.epochs]))
                    ),
                    "loss": _largest_drift(trajectory, exact),
                    "probability": float(
                        np.abs(
                            trajectory.probabilities[given.epochs]
                            - exact.probabilities[given.epochs]
                        ).max()
                    ),
                    "seconds": time.perf_counter() - started,
                }
            )
            print(rows[-1], flush=True)
    print(format_rows(rows))
    if given.out:
        write_json(
            given.out, {"options": {k: str(v) for k, v in vars(given).items()}, "rows": rows}
        )


def _largest_drift(ours: Trajectory, theirs: Trajectory) -> float:
    """Largest relative difference between the held-out losses of two trainings."""
    return max(
        abs(a["val_loss"] / b["val_loss"] - 1)
        for a, b in zip(ours.history, theirs.history, strict=True)
    )


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A line per number format: mean difference in AUROC over seeds, and largest drifts."""
    lines = [["tokens", "macro AUROC", "difference", "± over seeds", "loss", "probability"]]
    names = list(dict.fromkeys(row["tokens"] for row in rows))
    base = np.array([row["auroc"] for row in rows if row["tokens"] == names[0]])
    for name in names:
        own = [row for row in rows if row["tokens"] == name]
        aurocs = np.array([row["auroc"] for row in own])
        spread = float((aurocs - base).std(ddof=1)) if len(own) > 1 else float("nan")
        lines.append(
            [
                name,
                f"{aurocs.mean():.4f}",
                f"{(aurocs - base).mean():+.4f}",
                f"{spread:.4f}",
                f"{max(row['loss'] for row in own):.2%}",
                f"{max(row['probability'] for row in own):.3f}",
            ]
        )
    return format_table(lines)


if __name__ == "__main__":
    main()
