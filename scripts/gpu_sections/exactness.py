"""Sections on what must agree: the device with the processor, and the repository's own tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from benchmarking import RESULTS, make_cohort
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.tokens import ResidentTokens
from cxr_cache.training.fit import HeadTask
from cxr_cache.training.tuning import TuningData, tune
from gpu_sections.measuring import (
    N_UNFROZEN,
    Row,
    SectionSkipped,
    Setup,
    computing_in,
    draw_pixels,
    encoder_in,
    relative_difference,
)
from gpu_sections.training import config_for

ROOT = RESULTS.parent


def check_exactness(setup: Setup) -> Iterator[Row]:
    """The device against the processor, and against itself: embeddings, and epochs of ``tune``."""
    n, batch_size, n_epochs = setup.pick((32, 8, 2), (8, 4, 1))
    on_device, on_cpu = (
        load_encoder(setup.encoder_name, device=device, precision="fp32")
        for device in (str(setup.device), "cpu")
    )
    pixels = draw_pixels(on_cpu, n)
    expected = on_cpu.encode(pixels)[1]

    def embeddings_apart(case: str, encoder: Encoder, limit: float) -> Row:
        once, again = (encoder.encode(pixels)[1].cpu() for _ in range(2))
        note = "the same twice" if once.equal(again) else "another value when repeated"
        difference = relative_difference(once, expected)
        return Row(f"embeddings, {case}", difference, "relative", limit=limit, note=note)

    with computing_in("fp32"):
        yield embeddings_apart("fp32", on_device, 1e-4)
    yield embeddings_apart("fp32, torch's own settings", on_device, 1e-3)
    with computing_in("tf32"):
        yield embeddings_apart("tf32", on_device, 1e-2)
    yield embeddings_apart("bf16", encoder_in(setup, "bf16"), 5e-2)

    with torch.no_grad():
        tokens = on_cpu.stem(on_cpu.prepare(pixels), N_UNFROZEN)[:, None].half()

    def train(encoder: Encoder, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        config = config_for(setup, mode, batch_size, dropout=0.0)  # devices draw differently
        source, tail = ResidentTokens(tokens.to(encoder.device)), copy_tail(encoder, N_UNFROZEN)
        data = TuningData(encoder, source, make_cohort(n).targets, tail)
        task = HeadTask(np.arange(n), np.empty(0, np.int64), seed=0)
        done = tune(data, task, config, n_epochs=n_epochs, keep=[n_epochs], keep_weights=True)
        with torch.no_grad():
            for name, tensor in tail.items():
                encoder.get_parameter(name).copy_(tensor)
        losses = torch.tensor([row["train_loss"] for row in done.history], dtype=torch.float64)
        return losses, done.weights[n_epochs]

    with computing_in("fp32"):
        expected, _ = train(on_cpu, "fp32")
        for mode, limit in (("fp32", 1e-4), ("bf16", 1e-2)):
            (once, weights), (again, same_weights) = (train(on_device, mode) for _ in range(2))
            unequal = sum(not weights[name].equal(same_weights[name]) for name in weights)
            yield Row(
                f"losses of {n_epochs} epochs, {mode}",
                relative_difference(once, expected),
                "relative",
                limit=limit,
                note=f"repeated, losses differ by {relative_difference(again, once):.0e}, "
                f"{unequal} of {len(weights)} weight tensors in some bit",
            )


def check_tests(setup: Setup) -> Iterator[Row]:
    """The repository's own tests that need a GPU."""
    if setup.device.type != "cuda":
        raise SectionSkipped("they need a GPU")
    if importlib.util.find_spec("pytest") is None:
        raise SectionSkipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=110, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-1000:])
    summary = done.stdout.strip().splitlines()[-1].strip("= ")
    yield Row(summary, time.perf_counter() - started, "s")
