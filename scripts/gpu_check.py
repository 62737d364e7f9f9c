"""What a GPU makes of the encoder, the fine-tuning and the heads: one table, and JSON.

    scripts/gpu_check.sh [--quick] [--device cpu] [--budget SECONDS]
                         [--sections NAME,NAME] [--out FILE]

Sections run one after the other, each within its own limit and all within the budget: one that no
longer fits is skipped, one that fails is reported and the others go on. Speeds are medians of
several rounds with the device synchronised before and after each. Weights are random, in the layout
of BiomedCLIP's ViT-B/16; tokens, pixels and labels are noise, which changes no speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from benchmarking import commit_tokens, describe_machine, format_table, make_cohort, write_json
from torch import Tensor

from cxr_cache.common.devices import resolve_device
from cxr_cache.common.distributed import is_main, process_group
from cxr_cache.config import FinetuneConfig, TrainConfig
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import encode_views
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import TrainingData, prepare_embeddings
from cxr_cache.store.tokens import ResidentTokens, TokenSource, open_tokens
from cxr_cache.training.fit import HeadTask, fit_heads
from cxr_cache.training.tuning import TuningData, tune

ROOT: Final = Path(__file__).resolve().parent.parent
N_UNFROZEN: Final = 2
MODES: Final = ("fp32", "tf32", "bf16")
RESERVE_S: Final = 5.0
"""Of the budget, for the end."""


@dataclass(frozen=True)
class Setup:
    """What is measured, and how long."""

    device: torch.device
    quick: bool
    n_processes: int

    @property
    def encoder_name(self) -> str:
        """Full size, or just enough to see that the script runs."""
        return "random:test_vit" if self.quick else "random:vit_base_patch16_224"

    def pick(self, full: Any, quick: Any) -> Any:
        """The one of two sizes that applies."""
        return quick if self.quick else full

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Row:
    """One figure; a value of None with a note says why there is none."""

    case: str
    value: float | None
    unit: str
    peak_mb: float | None = None
    """Device memory at its peak, over what was allocated before."""
    limit: float | None = None
    """A larger value is a failure."""
    note: str = ""


class SectionSkipped(Exception):  # noqa: N818 - not an error
    """What the section is about is not on this machine."""


# -- measuring --------------------------------------------------------------------------


@contextmanager
def computing_in(mode: str) -> Iterator[None]:
    """Let float32 products use the matrix units' tf32, or see that they do not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = mode == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast_of(mode: str) -> Any:
    """The package's name: tf32 is a way to compute fp32."""
    return "bf16" if mode == "bf16" else "fp32"


def attempt(setup: Setup, case: str, measure: Callable[[], float], unit: str = "images/s") -> Row:
    """One figure with its peak memory; running out of memory is a result, too."""
    on_gpu = setup.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)
        before = torch.cuda.memory_allocated(setup.device)
    try:
        value = measure()
    except torch.OutOfMemoryError:
        return Row(case, None, unit, note="out of memory")
    if not on_gpu:
        return Row(case, value, unit)
    peak = torch.cuda.max_memory_allocated(setup.device) - before
    return Row(case, value, unit, peak_mb=peak / 1e6)


def speed_of(setup: Setup, step: Callable[[], object], n_images: int) -> float:
    """Images/s: the median of five rounds of a third of a second."""

    def seconds(n_steps: int) -> float:
        setup.synchronize()
        started = time.perf_counter()
        for _ in range(n_steps):
            step()
        setup.synchronize()
        return time.perf_counter() - started

    seconds(setup.pick(3, 1))  # to warm up
    n_steps: int = max(1, round(setup.pick(0.3, 0.01) / seconds(1)))
    return n_images * n_steps / median(seconds(n_steps) for _ in range(setup.pick(5, 2)))


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


@cache
def encoder_in(setup: Setup, precision: Any) -> Encoder:
    """One encoder per precision for all sections; its blocks begin anew in every training."""
    return load_encoder(setup.encoder_name, device=str(setup.device), precision=precision)


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


def draw_pixels(encoder: Encoder, n_images: int) -> Tensor:
    """Noise, uint8, on the processor."""
    size_px = encoder.preprocessing.image_size_px
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (n_images, 3, size_px, size_px), dtype=torch.uint8, generator=generator
    )


def draw_tokens(encoder: Encoder, n_images: int) -> Tensor:
    """Noise, float16, ``(N, 1, T, W)`` on the encoder's device."""
    identity = encoder.identity
    generator = torch.Generator(encoder.device).manual_seed(0)
    return torch.randn(
        *(n_images, 1, int(identity.n_tokens or 0), int(identity.token_width or 0)),
        dtype=torch.float16,
        device=encoder.device,
        generator=generator,
    )


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


# -- sections ---------------------------------------------------------------------------


def check_extraction(setup: Setup) -> Iterator[Row]:
    """Pixels on the device to embeddings; and, as `extract --tokens` does, tokens to the host."""
    sizes = setup.pick((32, 128, 512), (2, 4))
    for mode in MODES:
        encoder = encoder_in(setup, autocast_of(mode))
        pixels = draw_pixels(encoder, max(sizes)).to(setup.device)
        with computing_in(mode):
            for n in sizes:
                step = partial(encoder.encode, pixels[:n])
                yield attempt(setup, f"{mode}, batch {n}", partial(speed_of, setup, step, n))
            n, on_host = sizes[1], pixels[: sizes[1]].cpu().numpy()
            extract = partial(encode_views, encoder, on_host, flip=False, n_unfrozen=N_UNFROZEN)
            case = f"{mode}, batch {n}, from host, tokens to host"
            yield attempt(setup, case, partial(speed_of, setup, extract, n))


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
                yield attempt(
                    setup,
                    f"{mode}, batch {batch_size}, from tokens",
                    partial(tuning_speed, setup, encoder, source, config, n),
                )
            for batch_size, n in setup.pick(((16, 512), (64, 1024)), ((4, 8),)):
                config = config_for(setup, mode, batch_size)
                source = ResidentPixels(encoder, draw_pixels(encoder, n).to(setup.device))
                yield attempt(
                    setup,
                    f"{mode}, batch {batch_size}, end to end",
                    partial(tuning_speed, setup, encoder, source, config, n),
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
                    yield attempt(
                        setup,
                        f"{mode}, last block for {title}",
                        partial(
                            tuning_speed,
                            *(setup, encoder, tokens, config_for(setup, mode, batch_size), n),
                        ),
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
                    yield attempt(
                        setup,
                        f"bf16, batch {batch_size}, tokens in: {place}",
                        partial(tuning_speed, setup, encoder, source, config, n),
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
                    yield attempt(
                        setup,
                        f"{mode}, batch {batch_size}, {n_unfrozen} blocks, {title}",
                        partial(tuning_speed, setup, encoder, tokens, config, n),
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


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm; zero where both are zero."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def check_distributed(setup: Setup) -> Iterator[Row]:
    """``tune`` under torchrun: one process, and one per GPU, with the same batch."""
    if setup.n_processes < 2:
        raise SectionSkipped("there are no two GPUs here")
    for n_processes in (1, setup.n_processes):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(n_processes), str(Path(__file__).resolve())),
            *("--worker", "--device", setup.device.type, *(["--quick"] if setup.quick else [])),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        images_per_s = json.loads(done.stdout.splitlines()[-1])
        yield Row(f"bf16, {n_processes} processes", images_per_s, "images/s")


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


def check_tests(setup: Setup) -> Iterator[Row]:
    """The repository's own tests that need a GPU."""
    if setup.device.type != "cuda":
        raise SectionSkipped("they need a GPU")
    if importlib.util.find_spec("pytest") is None:
        raise SectionSkipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=150, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-1000:])
    summary = done.stdout.strip().splitlines()[-1].strip("= ")
    yield Row(summary, time.perf_counter() - started, "s")


# -- all of them ------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Figures that belong together, and the time they may take on a GPU."""

    check: Callable[[Setup], Iterator[Row]]
    least_s: float
    """With less left of the budget, it does not begin."""
    limit_s: float
    """After this, it ends with the figures that it has."""


SECTIONS: Final = {
    "exactness": Section(check_exactness, 15, 60),
    "extraction": Section(check_extraction, 15, 60),
    "tuning": Section(check_tuning, 20, 80),
    "class_token": Section(check_class_token, 15, 40),
    "places": Section(check_places, 20, 60),
    "memory": Section(check_memory, 20, 60),
    "heads": Section(check_heads, 15, 60),
    "tests": Section(check_tests, 60, 150),
    "distributed": Section(check_distributed, 60, 120),
}


def run_section(section: Section, setup: Setup, left_s: float) -> dict[str, Any]:
    """Its figures, and whether they are all: done, or stopped, skipped or failed, and why."""
    if left_s < section.least_s:
        status = f"skipped: {max(left_s, 0):.0f} s are left of the budget"
        return {"status": status, "elapsed_s": 0.0, "rows": []}
    started, limit_s, rows, status = time.perf_counter(), min(section.limit_s, left_s), [], "done"
    try:
        for row in section.check(setup):
            rows.append(row)
            if time.perf_counter() - started > limit_s:
                status = f"stopped: it took more than {limit_s:.0f} s"
                break
    except SectionSkipped as reason:
        status = f"skipped: {reason}"
    except Exception as error:  # whatever it is, the other sections go on
        traceback.print_exc()
        status = f"failed: {type(error).__name__}: {error}".replace(str(ROOT), ".")
    wrong = [row.case for row in rows if not is_within_limit(row)]
    if wrong and not status.startswith("failed"):
        status = f"failed: too far apart: {'; '.join(wrong)}"
    elapsed_s = time.perf_counter() - started
    return {"status": status, "elapsed_s": elapsed_s, "rows": [asdict(row) for row in rows]}


def is_within_limit(row: Row) -> bool:
    """NaN is not."""
    return row.limit is None or (row.value is not None and row.value <= row.limit)


def tabulate(results: dict[str, dict[str, Any]]) -> str:
    """One line per figure, under a line per section."""
    lines = [["", "value", "unit", "peak MB", "limit"]]
    for name, result in results.items():
        lines.append([f"{name} ({result['elapsed_s']:.0f} s)", "", "", "", ""])
        for row in result["rows"]:
            numbers = [row[key] for key in ("value", "peak_mb", "limit")]
            value, peak, limit = ("" if x is None else _in_digits(x) for x in numbers)
            lines.append([f"  {row['case']}", value or "-", row["unit"], peak, limit])
    return format_table(lines)


def _in_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tell(results: dict[str, dict[str, Any]]) -> str:
    """What is to be said about single figures, and about sections that have not all of them."""
    notes = [
        f"{name}, {row['case']}: {row['note']}"
        for name, result in results.items()
        for row in result["rows"]
        if row["note"]
    ]
    statuses = [f"{name}: {r['status']}" for name, r in results.items() if r["status"] != "done"]
    return "\n".join(notes + statuses)


def main() -> None:
    """Run the sections, print, and write the figures down after each of them."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run at all?")
    parser.add_argument("--budget", type=float, default=420, help="seconds, for all sections")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="names, with commas")
    out = Path(os.environ.get("OUT") or "benchmarks") / "gpu_check.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--processes", type=int, help="for torchrun; one per GPU by default")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    started = time.perf_counter()
    device = resolve_device(options.device)
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    setup = Setup(device, options.quick, options.processes or n_gpus)
    if options.worker:
        work_along(setup)
        return
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"there is no section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    settings = {"device": str(device), "quick": setup.quick, "encoder": setup.encoder_name}
    machine, results = describe_machine(), {}
    for name in names:
        left_s = options.budget - RESERVE_S - (time.perf_counter() - started)
        results[name] = run_section(SECTIONS[name], setup, left_s)
        print(f"{name}: {results[name]['status']}", flush=True)
        write_json(
            options.out,
            {"machine": machine, "settings": settings, "sections": results}
            | {"elapsed_s": time.perf_counter() - started},
        )
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    print(f"{setup.encoder_name} on {device} ({gpus}), torch {machine['torch']}")
    print(tabulate(results))
    print(tell(results))
    if any(result["status"].startswith("failed") for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
