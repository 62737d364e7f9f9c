"""Sections on encoding: every kind of encoder, and what limits the speed of an extraction."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from benchmarking import make_cohort
from PIL import Image
from torch import Tensor

from cxr_cache.common.devices import Precision
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.phantoms.dataset import draw_phantom
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import cosines, encode_views
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.tokens import ResidentTokens
from gpu_sections.encoders import KINDS, Kind, load_kind
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
    failure,
    speed_of,
)
from gpu_sections.training import config_for, time_tuning

COMPILED: Final = ("BiomedCLIP, ViT-B/16, 224 px", "DINOv3 ViT-B/16, rotary positions, 256 px")
"""Of all kinds; each takes half a minute."""
LIMITS: Final[dict[Precision, float]] = {"fp32": 1e-5, "bf16": 1e-3}
"""Of one minus the cosine to what the processor computes in fp32."""


def check_encoders(setup: Setup) -> Iterator[Row]:
    """Every kind of encoder: the same as on the processor, how fast, in how much memory."""
    for name, kind in KINDS.items():
        try:
            yield from _check_kind(setup, name, kind)
        except Exception as error:  # whatever it is, the other kinds go on
            yield failure(name, error)


def _check_kind(setup: Setup, name: str, kind: Kind) -> Iterator[Row]:
    n, batch_size = setup.pick((512, 128), (8, 4))
    on_cpu, encoder = load_kind(kind, "cpu", str(setup.device), quick=setup.quick)
    pixels = draw_pixels(on_cpu, 4)
    expected = on_cpu.encode(pixels)[1]
    del on_cpu
    with computing_in("fp32"):
        for precision, limit in LIMITS.items():
            encoder.precision = precision
            apart = distance(encoder.encode(pixels)[1], expected)
            case = f"{name}: {precision} from the processor's fp32"
            yield Row(case, apart, "1 - cosine", limit=limit)
    pixels = draw_pixels(encoder, batch_size).to(setup.device)
    with encoder.cast_weights():
        encode = partial(encoder.encode, pixels)
        case = f"{name}: bf16, batch {batch_size}"
        yield attempt(setup, case, partial(speed_of, setup, encode, batch_size))
    config = config_for(setup, "bf16", batch_size // 2)
    source = ResidentTokens(draw_tokens(encoder, n))
    case = f"{name}: bf16, batch {config.batch_size}, fine-tuning from tokens"
    yield time_tuning(setup, case, encoder, source, config, n)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """One minus the smallest cosine between embeddings of the same images, ``(B, D)``."""
    return 1 - float(cosines(ours.cpu().numpy(), theirs.cpu().numpy()).min())


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


def check_launching(setup: Setup) -> Iterator[Row]:
    """The forward pass as it is, as one CUDA graph, and compiled: what launching kernels costs."""
    on_gpu = setup.device.type == "cuda"
    for name in COMPILED:
        (encoder,) = load_kind(KINDS[name], str(setup.device), quick=setup.quick)
        encoder.precision = "bf16"

        @torch.no_grad()  # inductor cannot compile in inference mode
        def run(inputs: Tensor, encoder: Encoder = encoder) -> Tensor:
            return encoder.tail(encoder.stem(inputs, 1), 1)[1]

        sizes = setup.pick((1, 16, 128), (1, 2))
        inputs = encoder.prepare(draw_pixels(encoder, max(sizes)))
        with encoder.cast_weights():
            expected = run(inputs)
            for n in sizes:
                step = partial(run, inputs[:n])
                yield attempt(setup, f"{name}: batch {n}", partial(speed_of, setup, step, n))
                case = f"{name}: batch {n}, {'CUDA graph' if on_gpu else 'no CUDA graph here'}"
                yield attempt(setup, case, partial(graphed_speed, setup, step, n))
            yield from _check_compiled(setup, name, run, inputs, expected)


def graphed_speed(setup: Setup, step: Callable[[], Tensor], n_images: int) -> float:
    """Images/s of a step whose kernels are recorded once and launched together."""
    if setup.device.type != "cuda":
        return speed_of(setup, step, n_images)
    aside = torch.cuda.Stream(setup.device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(setup.device))
    with torch.cuda.stream(aside):  # what is made at a first call must not be recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream(setup.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    expected = step()
    graph.replay()
    if not (apart := distance(recorded, expected)) <= 1e-4:
        raise ValueError(f"the graph computes something else: 1 - cosine is {apart:.1e}")
    return speed_of(setup, graph.replay, n_images)


def _check_compiled(
    setup: Setup, name: str, run: Callable[[Tensor], Tensor], inputs: Tensor, expected: Tensor
) -> Iterator[Row]:
    """Compile for one size of batches: seconds, speed, and how far it is from what it was."""
    n, case = len(inputs), f"{name}: batch {len(inputs)}, compiled"
    backend = setup.pick("inductor", "aot_eager")
    if backend == "inductor" and not (shutil.which("cc") or shutil.which("gcc")):
        yield Row(case, None, "images/s", note="there is no C compiler here")
        return
    torch.compiler.reset()
    compiled = torch.compile(run, backend=backend, dynamic=False)

    def first_s() -> float:
        started = time.perf_counter()
        compiled(inputs)
        setup.synchronize()
        return time.perf_counter() - started

    first = attempt(setup, f"{case}: the first batch", first_s, "s")
    yield first
    if not first.failed:
        yield attempt(setup, case, partial(speed_of, setup, partial(compiled, inputs), n))
        apart = distance(compiled(inputs), expected)
        yield Row(f"{case}: from what it was", apart, "1 - cosine", limit=1e-3)


def check_copies(setup: Setup) -> Iterator[Row]:
    """Decoded images to the device: from pageable memory, by a pinned copy, from pinned memory."""
    n = setup.pick(256, 4)
    pixels = draw_pixels(encoder_in(setup, "bf16"), n)
    on_gpu = setup.device.type == "cuda"  # nothing can be pinned, and need be, for a processor

    def pin(images: Tensor) -> Tensor:
        return images.pin_memory() if on_gpu else images.clone()

    pinned = pin(pixels)
    for title, step in (
        ("pageable memory", lambda: pixels.to(setup.device, copy=True)),
        ("pinned at the time", lambda: pin(pixels).to(setup.device, non_blocking=True, copy=True)),
        ("pinned before", lambda: pinned.to(setup.device, non_blocking=True, copy=True)),
    ):
        case = f"copies of {n} images, {title}"
        yield attempt(setup, case, partial(speed_of, setup, step, n))


def check_files(setup: Setup) -> Iterator[Row]:
    """`extract` from PNG files, beside its two halves: decoding on one core, and the encoder."""
    n, n_files, size_px = setup.pick((2048, 16, 1024), (8, 2, 64))
    encoder, config = encoder_in(setup, "bf16"), ExtractConfig()
    n_cores, notes = os.cpu_count() or 1, list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder, cohort = Path(name), make_cohort(n)
        for i, image_id in enumerate(map(str, cohort.image_ids)):
            if i < n_files:
                picture, _ = draw_phantom([], "Frontal", np.random.default_rng(i), size_px)
                Image.fromarray(picture).save(folder / image_id)
            else:
                os.link(folder / str(cohort.image_ids[i % n_files]), folder / image_id)

        def decode() -> None:
            for image_id in cohort.image_ids[:n_files]:
                read_image(folder, image_id, encoder.preprocessing)

        def extract() -> float:
            summary = extract_embeddings(cohort, folder, folder / "s.h5", encoder, config)
            notes.append(summary.to_text().splitlines()[-1].strip())
            return summary.n_computed / summary.elapsed_s

        yield attempt(
            setup,
            f"decoding PNG of {size_px} px, one core",
            partial(speed_of, setup, decode, n_files),
        )
        pixels = draw_pixels(encoder, setup.pick(256, 4)).numpy()
        with encoder.cast_weights():
            encode = partial(encode_views, encoder, pixels, flip=False)
            case = f"bf16, batch {len(pixels)}, decoded in memory"
            yield attempt(setup, case, partial(speed_of, setup, encode, len(pixels)))
        row = attempt(setup, f"extract of {n:,} files, {n_cores} cores", extract)
        yield replace(row, note=row.note or notes[-1])
