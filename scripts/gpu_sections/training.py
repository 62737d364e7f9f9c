"""Sections on training: blocks from tokens and from pixels, heads, and several processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarking import RESULTS, commit_tokens, make_cohort
from torch import Tensor

from cxr_cache.common.distributed import is_main, process_group
from cxr_cache.config import FinetuneConfig, TrainConfig
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import TrainingData, prepare_embeddings
from cxr_cache.store.tokens import ResidentTokens, TokenSource, open_tokens
from cxr_cache.training.fit import HeadTask, fit_heads
from cxr_cache.training.tuning import TuningData, tune
from gpu_sections.measuring import (
    MODES,
    N_UNFROZEN,
    Row,
    Setup,
    attempt,
    autocast_of,
    computing_in,
    draw_pixels,
    draw_tokens,
    encoder_in,
)


def config_for(setup: Setup, mode: str, batch_size: int, **more: Any) -> FinetuneConfig:
    """The recipe."""
    return FinetuneConfig.of_recipe(
        "reference",
        device=str(setup.device),
        precision=autocast_of(mode),
        batch_size=batch_size,
        unfreeze_layers=N_UNFROZEN,
        **more,
    )


def tuning_speed(
    setup: Setup, encoder: Encoder, source: TokenSource, config: FinetuneConfig, n_rows: int
) -> float:
    """Images/s of :func:`tune`, everything it does in an epoch included; the first is not counted.

    Each epoch ends with a copy of the weights to the host, so the clock needs no other wait.
    """
    marks: list[float] = []

    def mark() -> None:
        setup.synchronize()
        marks.append(time.perf_counter())

    n_epochs = setup.pick(4, 2)
    data = TuningData(
        encoder, source, make_cohort(n_rows).targets, copy_tail(encoder, config.unfreeze_layers)
    )
    task = HeadTask(np.arange(n_rows), np.empty(0, np.int64), seed=0)
    tune(data, task, config, n_epochs=n_epochs, keep=[], keep_weights=False, on_epoch=mark)
    n_seen = n_rows // config.batch_size * config.batch_size
    seconds: float = median(np.diff(marks).tolist())
    return n_seen / seconds


def time_tuning(
    setup: Setup,
    case: str,
    encoder: Encoder,
    source: TokenSource,
    config: FinetuneConfig,
    n_rows: int,
) -> Row:
    """A row of :func:`tuning_speed`."""
    return attempt(setup, case, partial(tuning_speed, setup, encoder, source, config, n_rows))


class ResidentPixels:
    """Decoded images on the device, through the frozen stem for every batch."""

    def __init__(self, encoder: Encoder, pixels: Tensor) -> None:
        self.encoder, self.pixels, self.n_views = encoder, pixels, 1
        self.description = "pixels on the device"

    def batches(
        self, rows: Tensor, views: Tensor, batch_size: int, *, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See :class:`TokenSource`."""
        for chosen in torch.split(rows.to(self.pixels.device), batch_size):
            with torch.no_grad():
                pixels = self.encoder.prepare(self.pixels[chosen])
                tokens = self.encoder.stem(pixels, N_UNFROZEN)
            yield tokens


def check_tuning(setup: Setup) -> Iterator[Row]:
    """``tune`` from tokens on the device, and from pixels on the device through stem and tail."""
    sizes = setup.pick(((16, 2048), (64, 4096), (256, 8192)), ((4, 16),))
    tokens = draw_tokens(encoder_in(setup, "fp32"), max(n for _, n in sizes))
    for mode in MODES:
        encoder = encoder_in(setup, autocast_of(mode))
        with computing_in(mode):
            for batch_size, n in sizes:
                config = config_for(setup, mode, batch_size)
                source: TokenSource = ResidentTokens(tokens[:n])
                yield time_tuning(
                    setup, f"{mode}, batch {batch_size}, from tokens", encoder, source, config, n
                )
            for batch_size, n in setup.pick(((16, 512), (64, 1024)), ((4, 8),)):
                config = config_for(setup, mode, batch_size)
                source = ResidentPixels(encoder, draw_pixels(encoder, n).to(setup.device))
                yield time_tuning(
                    setup, f"{mode}, batch {batch_size}, end to end", encoder, source, config, n
                )


def check_class_token(setup: Setup) -> Iterator[Row]:
    """The last block for the class token only, and for all tokens."""
    n, batch_size = setup.pick((4096, 64), (16, 4))
    tokens = ResidentTokens(draw_tokens(encoder_in(setup, "fp32"), n))
    for mode in MODES:
        encoder = encoder_in(setup, autocast_of(mode))
        split: Any = encoder._split
        with computing_in(mode):
            for only, title in ((True, "class token only"), (False, "all tokens")):
                split.reads_class_token_only = only
                try:
                    yield time_tuning(
                        setup,
                        f"{mode}, last block for {title}",
                        encoder,
                        tokens,
                        config_for(setup, mode, batch_size),
                        n,
                    )
                finally:
                    split.reads_class_token_only = True


def check_places(setup: Setup) -> Iterator[Row]:
    """Tokens of a real store on the device, in memory, and in the file (which is cached)."""
    n, at_once = setup.pick((2048, 64), (16, 8))
    encoder = encoder_in(setup, "bf16")
    identity, tokens = encoder.identity, draw_tokens(encoder, n).cpu().numpy()
    shapes = {"embeddings": (1, identity.embedding_width), "tokens": tokens.shape[1:]}
    with tempfile.TemporaryDirectory() as folder:
        with FeatureStore.create(
            Path(folder) / "store.h5",
            make_cohort(n),
            encoder=identity.to_dict(),
            features=shapes,
            boundary_block=int(identity.n_blocks or 0) - N_UNFROZEN,
        ) as store:
            for start in range(0, n, at_once):
                rows = np.arange(start, start + at_once)
                commit_tokens(store, rows, tokens[rows])
        with FeatureStore.open(Path(folder) / "store.h5") as store, computing_in("bf16"):
            for batch_size in setup.pick((16, 64), (4,)):
                config = config_for(setup, "bf16", batch_size)
                for place in ("device", "ram", "disk"):
                    source = open_tokens(store, np.arange(n), setup.device, place)
                    yield time_tuning(
                        setup,
                        f"bf16, batch {batch_size}, tokens in: {place}",
                        encoder,
                        source,
                        config,
                        n,
                    )


def check_memory(setup: Setup) -> Iterator[Row]:
    """Peak memory of a training step, with and without gradient checkpointing."""
    batch_size, n_batches = setup.pick((256, 8), (4, 2))
    n = batch_size * n_batches
    tokens = ResidentTokens(draw_tokens(encoder_in(setup, "fp32"), n))
    n_blocks = int(encoder_in(setup, "fp32").identity.n_blocks or 0)
    for mode in ("fp32", "bf16"):
        encoder = encoder_in(setup, autocast_of(mode))
        with computing_in(mode):
            for n_unfrozen in (N_UNFROZEN, n_blocks):
                for checkpointing in (False, True):
                    config = config_for(setup, mode, batch_size, grad_checkpointing=checkpointing)
                    config = replace(config, unfreeze_layers=n_unfrozen)
                    title = "checkpointed" if checkpointing else "activations kept"
                    yield time_tuning(
                        setup,
                        f"{mode}, batch {batch_size}, {n_unfrozen} blocks, {title}",
                        encoder,
                        tokens,
                        config,
                        n,
                    )


def check_heads(setup: Setup) -> Iterator[Row]:
    """Five folds of heads in one bank on the device, one after the other, and the processor."""
    n, n_epochs, n_folds = setup.pick((6000, 3, 5), (200, 1, 5))
    rng = np.random.default_rng(0)
    embeddings = prepare_embeddings(rng.standard_normal((1, n, 512), np.float32), "l2")
    data = TrainingData(embeddings, make_cohort(n))
    fold = rng.permutation(n) % n_folds
    tasks = [HeadTask(np.flatnonzero(fold != k), np.flatnonzero(fold == k), k) for k in range(5)]

    def seconds(device: str, *, together: bool) -> float:
        config = TrainConfig(device=device, n_folds=n_folds)
        n_steps = min(len(task.train_rows) for task in tasks) // config.batch_size
        fit = partial(fit_heads, data, config=config, n_steps=n_steps, keep=[])
        groups = [tasks] if together else [[task] for task in tasks]
        fit(tasks=groups[0], n_epochs=1)  # to warm up
        setup.synchronize()
        started = time.perf_counter()
        for group in groups:
            fit(tasks=group, n_epochs=n_epochs)
        setup.synchronize()
        elapsed: float = (time.perf_counter() - started) / n_epochs
        return elapsed

    for device in dict.fromkeys((str(setup.device), "cpu")):
        for together in (True, False):
            title = "in one bank" if together else "one after the other"
            case = f"{n_folds} folds {title}, {device}"
            yield attempt(setup, case, partial(seconds, device, together=together), "s/epoch")


def check_distributed(setup: Setup) -> Iterator[Row]:
    """``tune`` under torchrun: one process, and one per GPU, with the same batch."""
    for n_processes in sorted({1, setup.n_processes}):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(
                "--nproc-per-node",
                str(n_processes),
                str(RESULTS.parent / "scripts" / "gpu_check.py"),
            ),
            *("--worker", "--device", setup.device.type, *(["--quick"] if setup.quick else [])),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        images_per_s = json.loads(done.stdout.splitlines()[-1])
        note = "" if setup.n_processes > 1 else "there are no two GPUs here"
        yield Row(f"bf16, {n_processes} processes", images_per_s, "images/s", note=note)


def work_along(setup: Setup) -> None:
    """One of the processes of :func:`check_distributed`; the first prints the speed."""
    with process_group(setup.device) as device:
        own = replace(setup, device=device)
        encoder = encoder_in(own, "bf16")
        n, batch_size = setup.pick((4096, 256), (16, 4))
        config = config_for(own, "bf16", batch_size)
        source = ResidentTokens(draw_tokens(encoder, n))
        images_per_s = tuning_speed(own, encoder, source, config, n)
        if is_main():
            print(json.dumps(images_per_s))
