"""The epoch search, a hundred settings and the scores: against the plain way and the floor.

Everything is measured in one run, on as many processes as there are cores, one thread each:

* *plain*: a DataLoader over cached embeddings, an ``nn.Sequential``, ``torch.optim.AdamW``, one
  training per candidate and fold, scikit-learn's AUROC after every epoch. A part is timed, with
  one thread and with all of them, and the better one is extrapolated to 345 epochs x 5 folds.
  Of the hundred settings, ten are trained.
* *floor*: the bare matrix products, AdamW and gradient norm of the same steps, in every process.

    python scripts/bench_search.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from benchmarking import describe_machine, results_path, write_json
from joblib import Parallel, cpu_count, delayed
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cxr_cache.config import TrainConfig
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank
from cxr_cache.training.fit import HeadTask, PlainRows, fit_heads
from cxr_cache.training.fit_on_cores import fit_on_cores
from cxr_cache.training.losses import WeightedFocal

focal_loss = WeightedFocal(2.0, 0.25, 0.25)  # the reference's
N, D, F, K = 6000, 512, 35, 5
WIDE = 1024  # MobileNet's features
CANDIDATES = (30, 50, 75, 90, 100)


def make_rows(n: int, width: int = D, seed: int = 0) -> PlainRows:
    """Embeddings of length 1 and targets about as rare as those of the Indiana findings."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, n, width)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    prevalence = np.geomspace(0.4, 0.002, F)
    return PlainRows(x, (rng.random((n, F)) < prevalence).astype(np.float32))


def make_tasks(n: int) -> list[HeadTask]:
    """K folds of all rows; there is no test here."""
    fold = np.random.default_rng(1).permutation(n) % K
    return [HeadTask(np.flatnonzero(fold != k), np.flatnonzero(fold == k), k) for k in range(K)]


# -- the plain way ----------------------------------------------------------------------


def train_plainly(
    rows: PlainRows, task: HeadTask, batch_size: int, n_steps: int, threads: int
) -> tuple[float, float]:
    """Seconds per step, and seconds to score an epoch, as a tutorial would write it."""
    torch.set_num_threads(threads)
    x, y = torch.from_numpy(rows.embeddings[0]), torch.from_numpy(rows.targets)
    train, held_out = (torch.from_numpy(r) for r in (task.train_rows, task.held_out_rows))
    batches = DataLoader(TensorDataset(x[train], y[train]), batch_size, shuffle=True)
    model = HeadBank(1, x.shape[1], F).as_sequential(0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=1e-4)
    done, started = 0, time.perf_counter()
    while done < n_steps:
        for inputs, targets in batches:
            loss = focal_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            done += 1
            if done == n_steps:
                break
    per_step = (time.perf_counter() - started) / n_steps
    started = time.perf_counter()
    with torch.no_grad():
        probabilities = model.eval()(x[held_out]).sigmoid().numpy()
    score_plainly(rows.targets[task.held_out_rows], probabilities)
    torch.set_num_threads(1)
    return per_step, time.perf_counter() - started


def score_plainly(targets: NDArray[np.float32], probabilities: NDArray[np.float32]) -> float:
    """Macro AUROC, a call of scikit-learn per finding."""
    scores = [
        roc_auc_score(t, p)
        for t, p in zip(targets.T, probabilities.T, strict=True)
        if 0 < t.sum() < len(t)
    ]
    return float(np.mean(scores))


# -- the floor --------------------------------------------------------------------------


def step_at_the_floor(batch_size: int, n_steps: int, width: int = D) -> float:
    """Seconds for so many steps of products, AdamW and norm, and nothing else."""
    torch.set_num_threads(1)
    widths = (width, 512, 256, F)
    n_parameters = HeadBank(1, width, F).n_parameters
    weights = [torch.randn(a, b) / 30 for a, b in pairwise(widths)]
    inputs = [torch.randn(batch_size, width) for width in widths]
    gradients = [torch.randn(batch_size, width) / 30 for width in widths]
    of_weights = [torch.empty_like(weight) for weight in weights]
    flat = nn.Parameter(torch.randn(n_parameters))
    flat.grad = torch.randn(n_parameters) / 1000
    adamw = torch.optim.AdamW([flat], lr=2e-5, weight_decay=1e-4, fused=True)
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(n_steps):
            for i, weight in enumerate(weights):
                torch.mm(inputs[i], weight, out=inputs[i + 1])
            for i in (2, 1, 0):
                torch.mm(inputs[i].t(), gradients[i + 1], out=of_weights[i])
                if i:
                    torch.mm(gradients[i + 1], weights[i].t(), out=gradients[i])
            torch.linalg.vector_norm(flat.grad)
            adamw.step()
            for i in (1, 2):  # products of products would leave the range of numbers
                inputs[i].clamp_(-1, 1)
                gradients[i].clamp_(-1, 1)
    return time.perf_counter() - started


def measure_floor(pool: Parallel, batch_size: int, n_steps: int, width: int = D) -> float:
    """Seconds per step of one head, with a head on every core."""
    seconds = pool(
        delayed(step_at_the_floor)(batch_size, n_steps, width) for _ in range(cpu_count())
    )
    per_step: float = statistics.median(seconds) / n_steps / cpu_count()
    return per_step


# -- ours -------------------------------------------------------------------------------


def search(
    rows: PlainRows, config: TrainConfig, between_turns: Callable[[], None] = lambda: None
) -> float:
    """Seconds of the whole search over the folds, but for what is done between turns."""
    elsewhere = 0.0

    def pause(_n_epochs: int) -> None:
        nonlocal elsewhere
        paused = time.perf_counter()
        between_turns()
        elsewhere += time.perf_counter() - paused

    started, tasks = time.perf_counter(), make_tasks(len(rows.targets))
    options = {"n_epochs": config.epochs[-1], "keep": config.epochs, "on_epochs": pause}
    fit_on_cores(rows, tasks, config, **options)  # type: ignore[arg-type]
    return time.perf_counter() - started - elsewhere


def train_setting(
    embeddings: NDArray[np.float32], targets: NDArray[np.float32], config: TrainConfig, k: int
) -> float:
    """One setting on one fold, as ``ablate`` sends it to a worker."""
    rows = PlainRows(embeddings, targets)
    task = make_tasks(len(targets))[k]
    n_steps = len(task.train_rows) // config.batch_size
    (epochs,) = config.epochs
    fitted = fit_heads(rows, [task], config, n_epochs=epochs, n_steps=n_steps, keep=[epochs])
    return float(fitted[0].auroc_after(epochs))


def ablate(pool: Parallel, rows: PlainRows, n_settings: int, n_epochs: int) -> float:
    """Seconds of a hundred settings in all folds."""
    rates = np.geomspace(1e-5, 1e-2, n_settings)
    base = TrainConfig(batch_size=256, epochs=(n_epochs,))
    configs = [replace(base, learning_rate=float(rate)) for rate in rates]
    started = time.perf_counter()
    pool(
        delayed(train_setting)(rows.embeddings, rows.targets, config, k)
        for config in configs
        for k in range(K)
    )
    return time.perf_counter() - started


# -- together ---------------------------------------------------------------------------


def measure_search(
    pool: Parallel, rows: PlainRows, batch_size: int, epochs: tuple[int, ...], n_timed: int
) -> dict[str, float]:
    """Ours; floor and plain way are measured between its turns, and extrapolated."""
    n_steps = (len(rows.targets) - len(rows.targets) // K) // batch_size
    task, width = make_tasks(len(rows.targets))[0], rows.embeddings.shape[2]
    floors: list[float] = []
    plains: dict[int, list[float]] = {threads: [] for threads in {1, cpu_count()}}

    def sample() -> None:
        floors.append(measure_floor(pool, batch_size, max(3, n_timed // 4), width))
        for threads, seconds in plains.items():
            step, score = train_plainly(rows, task, batch_size, max(3, n_timed // 4), threads)
            seconds.append(K * sum(epochs) * (n_steps * step + score))

    seconds = search(rows, TrainConfig(batch_size=batch_size, epochs=epochs), sample)
    floor = statistics.mean(floors) * n_steps * epochs[-1] * K
    plain = min(statistics.mean(samples) for samples in plains.values())
    return {"seconds": seconds, "floor": floor, "plain": plain}


def measure_scoring(rows: PlainRows, n_repeats: int) -> dict[str, float]:
    """Macro AUROC of five folds of held-out rows."""
    tasks = make_tasks(len(rows.targets))
    scores = np.random.default_rng(2).random((len(rows.targets), F), np.float32)
    parts = [(rows.targets[t.held_out_rows], scores[t.held_out_rows]) for t in tasks]

    def best_of(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(n_repeats):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return {
        "seconds": best_of(lambda: [macro_mean(auroc(t, s)) for t, s in parts]),
        "plain": best_of(lambda: [score_plainly(t, s) for t, s in parts]),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="A thirtieth, to see that it runs.")
    parser.add_argument("--out", type=Path, default=results_path("search"))
    options = parser.parse_args()
    rows = make_rows(600 if options.quick else N)
    epochs = (1, 2) if options.quick else CANDIDATES
    n_timed = 20 if options.quick else 400
    n_settings, n_epochs = (2, 1) if options.quick else (10, 20)
    with Parallel(n_jobs=cpu_count(), mmap_mode="c") as pool:
        measure_floor(pool, 16, 5)  # processes start, torch is imported
        results = {
            "search, batch 16": measure_search(pool, rows, 16, epochs, n_timed),
            "search, batch 256": measure_search(pool, rows, 256, epochs, max(5, n_timed // 8)),
            "search, batch 16, 1,024 wide": measure_search(
                pool, make_rows(len(rows.targets), WIDE), 16, epochs, n_timed
            ),
        }
        n_steps = (len(rows.targets) - len(rows.targets) // K) // 256
        before = measure_floor(pool, 256, max(5, n_timed // 8))
        seconds = ablate(pool, rows, n_settings, n_epochs)
        after = measure_floor(pool, 256, max(5, n_timed // 8))
        floor = (before + after) / 2 * n_settings * K * n_epochs * n_steps
        share = 100 / n_settings
        results["100 settings, batch 256"] = {"seconds": share * seconds, "floor": share * floor}
    results["macro AUROC of 5 folds"] = measure_scoring(rows, 3)
    print_table(results)
    write_json(options.out, {"machine": describe_machine(), "results": results})


def print_table(results: dict[str, dict[str, float]]) -> None:
    """A line per figure: ours, and its ratios to the plain way and to the floor."""
    print(f"{'':<28}{'ours':>10}{'plain':>12}{'floor':>10}{'plain/ours':>12}{'ours/floor':>12}")
    for name, result in results.items():
        seconds, plain, floor = (result.get(key, np.nan) for key in ("seconds", "plain", "floor"))
        print(
            f"{name:<28}{seconds:>9.3g}s{plain:>11.4g}s{floor:>9.3g}s"
            f"{plain / seconds:>12.1f}{seconds / floor:>12.2f}"
        )


if __name__ == "__main__":
    main()
