"""Extraction against a plain open_clip script, and against the bare forward pass: images/s.

    python scripts/bench_extract.py [--precision fp32 bf16] [--compile] [--images 32] [--rounds 5]

The encoder is ViT-B/16 at full size with random weights, the images are JPEG files of 256 pixels.

1. plain: what a researcher would write. open_clip's transform after `.convert("RGB")`, a DataLoader
   with one worker per core, open_clip's image tower under `torch.no_grad()`, batches of 32; in bf16
   under autocast;
2. bare, shared: the encoder's own forward pass on pixels in memory, every batch on all cores;
3. bare, alone: the same, one batch per core;
4. the product: `extract_embeddings` into a new store, as `cxr-cache extract` calls it;
5. products: as many multiplications and additions as 3, all in matrix products of one good shape
   and nothing else. This is what the processor can do; no exact forward pass is faster;
6. with `--compile`, 3 after `torch.compile`, as `cxr-cache extract --compile` calls it.

All are measured in each precision: fp32, and bf16 where the processor computes it natively, unless
`--precision` says otherwise. What the product does once per run, whatever the number of images
(eight canaries to begin with), is shown apart. All take turns in one process, so that a busy
machine slows all alike; medians over the turns. Processor seconds per image (decoding processes
included) are distorted less by other work. Embeddings of 4 must agree with those of 1 in fp32, or
the status is 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarking import describe_machine, format_table, make_cohort, results_path, write_json
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from cxr_cache.common.devices import resolve_device, resolve_precision
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.phantoms.dataset import draw_phantom
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import MIN_COSINE, compiled, cosines, encoding_threads
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.store.extract import ExtractSummary, extract_embeddings, resolve_for
from cxr_cache.store.feature_store import FeatureStore

IMAGE_SIZE_PX, PLAIN_BATCH_SIZE = 256, 32
GOALS = {"fp32": {"plain": 2.0, "floor": 0.9}, "bf16": {"plain": 2.0, "products": 0.65}}
"""How many times the speed of these the product should have, the floor being the faster of 2 and 3.
"""


class Turn(NamedTuple):
    """What a turn took."""

    seconds: float
    processor_s: float


def _now() -> Turn:
    """The clock, and processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Turn(time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used))


def _since(mark: Turn) -> Turn:
    now = _now()
    return Turn(now.seconds - mark.seconds, now.processor_s - mark.processor_s)


class Bench:
    """The same images and weights for everybody, in one precision."""

    def __init__(self, folder: Path, encoder: Encoder, cohort: Cohort) -> None:
        self.folder, self.encoder, self.cohort = folder, encoder, cohort
        self.config = resolve_for(ExtractConfig(), encoder.device)
        pixels = [
            read_image(folder, image_id, encoder.preprocessing).pixels
            for image_id in self.cohort.image_ids
        ]
        self.pixels = torch.from_numpy(np.stack(pixels))
        self.summaries: list[ExtractSummary] = []
        self.start_s: list[float] = []
        self.compile_s = 0.0
        self.embeddings: NDArray[np.float32]

    def contestants(self) -> dict[str, Callable[[], tuple[Turn, Any]]]:
        """Who takes turns, by name; the compiled pass only where there is one."""
        ways: dict[str, Callable[[], tuple[Turn, Any]]] = {
            "plain": self.run_plain,
            "shared": self.run_shared,
            "alone": self.run_alone,
            "product": self.run_product,
            "products": self.run_products,
        }
        return ways | ({"compiled": self.run_compiled} if self.compile_s else {})

    def run_plain(self) -> tuple[Turn, NDArray[np.float32]]:
        """Seconds and embeddings of the plain script, under autocast where that is in bf16."""
        loader = DataLoader(
            _PlainImages(self.folder, self.cohort.image_ids.tolist(), self.encoder),
            batch_size=PLAIN_BATCH_SIZE,
            num_workers=os.cpu_count() or 1,
        )
        device, embeddings = self.encoder.device, []
        in_bf16 = self.encoder.precision == "bf16"
        mark = _now()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            for batch in loader:
                embeddings.append(self.encoder.visual(batch.to(device)).float().cpu().numpy())
        return _since(mark), np.concatenate(embeddings)

    def run_shared(self) -> tuple[Turn, None]:
        """Seconds of the forward pass, every batch on all cores."""
        with self.encoder.cast_weights():
            mark = _now()
            for batch in torch.split(self.pixels, PLAIN_BATCH_SIZE):
                self.encoder.encode(batch)[1].cpu()
            return _since(mark), None

    def run_alone(self) -> tuple[Turn, None]:
        """Seconds of the forward pass, one batch per core."""
        with self.encoder.cast_weights(), encoding_threads(self.encoder.device) as (threads, _):
            return self._encode_on(threads)

    def run_compiled(self) -> tuple[Turn, None]:
        """The same, compiled."""
        return self._encode_on(self._threads, self._compiled)

    def _encode_on(
        self, threads: ThreadPoolExecutor, encoder: Encoder | None = None
    ) -> tuple[Turn, None]:
        assert self.config.batch_size is not None
        encode = (encoder or self.encoder).encode
        mark = _now()
        batches = torch.split(self.pixels, self.config.batch_size)
        for result in [threads.submit(encode, batch) for batch in batches]:
            result.result()[1].cpu()
        return _since(mark), None

    @contextmanager
    def compiling(self, encoder: Encoder) -> Iterator[None]:
        """Compile `encoder`, another of the same weights, for as long as the block runs."""
        assert self.config.batch_size is not None
        self._compiled = encoder
        with (
            encoder.cast_weights(),
            encoding_threads(encoder.device) as (self._threads, _),
            compiled(encoder, self._threads, self.config.batch_size, None) as self.compile_s,
        ):
            yield

    def run_products(self) -> tuple[Turn, None]:
        """Seconds of the bare matrix products, one at a time per core."""
        assert self.config.batch_size is not None
        M, K, N = self.config.batch_size * 197, 768, 3072  # of a block's first wide layer
        n_products = round(self._count_flops() * len(self.pixels) / (2 * M * K * N))
        dtype = torch.bfloat16 if self.encoder.precision == "bf16" else torch.float32
        device = self.encoder.device
        a, b = (torch.randn(shape, dtype=dtype, device=device) for shape in ((M, K), (K, N)))

        def multiply(_: int) -> None:
            torch.mm(a, b)[0, 0].cpu()

        with encoding_threads(device) as (threads, _):
            mark = _now()
            list(threads.map(multiply, range(n_products)))
            return _since(mark), None

    def _count_flops(self) -> int:
        """Multiplications and additions of one image.

        Not in inference mode, where the counter takes products apart below autocast, which has no
        chance to cast their inputs: in bf16 they would not fit together.
        """
        pixels = self.encoder.prepare(self.pixels[:1])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.encoder.tail(self.encoder.stem(pixels, 1), 1)
        n_flops: int = counter.get_total_flops()
        return n_flops

    def run_product(self) -> tuple[Turn, NDArray[np.float32]]:
        """Seconds and embeddings of an extraction, from the moment the store is planned."""
        store_path, marks = self.folder / "store.h5", [_now()]
        summary = extract_embeddings(
            self.cohort,
            self.folder,
            store_path,
            self.encoder,
            self.config,
            on_space=lambda _: marks.append(_now()),
        )
        turn = _since(marks[1])
        self.summaries.append(summary)
        self.start_s.append(marks[1].seconds - marks[0].seconds)
        with FeatureStore.open(store_path) as store:
            embeddings = np.array(store.embeddings[:, 0])
        store_path.unlink()
        return turn, embeddings


class _PlainImages(Dataset[Tensor]):
    """Files through open_clip's own transform."""

    def __init__(self, folder: Path, names: list[str], encoder: Encoder) -> None:
        from open_clip.transform import image_transform

        given = encoder.preprocessing
        self._paths = [folder / name for name in names]
        self._transform = image_transform(
            given.image_size_px,
            is_train=False,
            mean=given.mean,
            std=given.std,
            resize_mode="shortest",
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Tensor:
        transformed: Tensor = self._transform(Image.open(self._paths[i]).convert("RGB"))
        return transformed


def _write_images(folder: Path, n_images: int) -> Cohort:
    cohort = make_cohort(n_images)
    for i, image_id in enumerate(cohort.image_ids):
        picture, _ = draw_phantom([], "Frontal", np.random.default_rng(i), IMAGE_SIZE_PX)
        Image.fromarray(picture).save(folder / str(image_id), format="JPEG", quality=90)
    return cohort


def run_rounds(benches: dict[str, Bench], n_rounds: int) -> dict[str, dict[str, list[Turn]]]:
    """Every turn but the first, by precision and contestant; embeddings are left in the benches."""
    ways = [(p, name, run) for p, b in benches.items() for name, run in b.contestants().items()]
    turns: dict[str, dict[str, list[Turn]]] = {precision: {} for precision in benches}
    for n in range(n_rounds + 1):
        for precision, name, run in ways:
            turn, embeddings = run()
            if n:
                turns[precision].setdefault(name, []).append(turn)
            if name == "product":
                benches[precision].embeddings = embeddings
    return turns


def summarise(turns: dict[str, list[Turn]], n_images: int) -> dict[str, dict[str, float]]:
    """Images per second: median, slowest and fastest turn; processor seconds per image."""
    return {
        name: {
            "images_per_s": n_images / median(turn.seconds for turn in taken),
            "slowest_turn": n_images / max(turn.seconds for turn in taken),
            "fastest_turn": n_images / min(turn.seconds for turn in taken),
            "processor_s": median(turn.processor_s for turn in taken) / n_images,
        }
        for name, taken in turns.items()
    }


def _find_baselines(results: dict[str, dict[str, float]]) -> dict[str, float]:
    speeds = {name: result["images_per_s"] for name, result in results.items()}
    return speeds | {"floor": max(speeds["shared"], speeds["alone"])}


def judge(results: dict[str, dict[str, float]], precision: str) -> list[dict[str, Any]]:
    """The product against the plain script and a floor."""
    speeds = _find_baselines(results)
    ratios = {name: speeds["product"] / speeds[name] for name in GOALS[precision]}
    return [
        {"against": name, "ratio": ratio, "goal": goal, "met": ratio >= goal}
        for (name, goal), ratio in zip(GOALS[precision].items(), ratios.values(), strict=True)
    ]


def tabulate(results: dict[str, dict[str, float]], precision: str, batch_size: int) -> str:
    """One line per contestant."""
    how = "bf16 autocast" if precision == "bf16" else precision
    titles = {
        "plain": f"(1) plain open_clip + DataLoader, {how}, batches of {PLAIN_BATCH_SIZE}",
        "shared": f"(2) bare, {precision}, batches of {PLAIN_BATCH_SIZE} on all cores",
        "alone": f"(3) bare, {precision}, batches of {batch_size}, one per core",
        "product": f"(4) extract_embeddings, {precision}",
        "products": f"(5) its multiplications as bare matrix products, {precision}",
        "compiled": f"(6) bare, compiled, {precision}, batches of {batch_size}, one per core",
    }
    speeds = _find_baselines(results)
    against = {"plain": "÷ (1)", "floor": "÷ floor", "products": "÷ (5)"}
    rows = [["", "images/s", "slowest", "fastest", "cpu s", *against.values()]]
    for name, result in results.items():
        figures = [*result.values(), *(result["images_per_s"] / speeds[of] for of in against)]
        rows.append([titles[name], *(f"{figure:.2f}" for figure in figures)])
    goals = (GOALS[precision].get(name) for name in against)
    rows.append(["goal for (4)", *[""] * 4, *("" if g is None else f"{g:.2f}" for g in goals)])
    return format_table(rows)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        nargs="+",
        help="default: fp32, and what extract chooses on this device",
    )
    parser.add_argument("--compile", action="store_true", help="measure the compiled pass, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help="per core (default: as in extract)")
    parser.add_argument("--images", type=int, default=32, help="images per turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run at all?")
    parser.add_argument("--out", type=Path, default=results_path("extract"))
    options = parser.parse_args()
    auto = resolve_precision("auto", resolve_device(options.device))
    options.precision = list(dict.fromkeys(options.precision or ("fp32", auto)))
    return options


def measure(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Bench]]:
    """What is to be written down, by precision, and the benches that it was measured on."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cohort = _write_images(folder, options.images)
        load = partial(load_encoder, name, device=options.device)
        reference = Bench(folder, load(precision="fp32"), cohort).run_plain()[1]
        benches = {p: Bench(folder, load(precision=p), cohort) for p in options.precision}
        for precision, bench in benches.items():
            if options.batch_size is not None:
                bench.config = replace(bench.config, batch_size=options.batch_size)
            if options.compile:
                stack.enter_context(bench.compiling(load(precision=precision)))
        turns = run_rounds(benches, options.rounds)
    measured = {}
    for precision, bench in benches.items():
        results = summarise(turns[precision], options.images)
        measured[precision] = {
            "results": results,
            "goals": judge(results, precision),
            "start_s": median(bench.start_s),
            "compile_s": bench.compile_s,
            "disagreement": float(np.abs(reference - bench.embeddings).max()),
            "min_cosine": float(cosines(reference, bench.embeddings).min()),
        }
    return measured, benches


def main() -> None:
    """Measure, print, and write the figures down."""
    options, started = parse_options(), time.perf_counter()
    name = f"random:{'test_vit' if options.quick else 'vit_base_patch16_224'}"
    measured, benches = measure(name, options)
    machine, elapsed_s = describe_machine(), time.perf_counter() - started
    one = next(iter(benches.values()))
    settings = {
        "encoder": name,
        "device": str(one.encoder.device),
        "images": options.images,
        "rounds": options.rounds,
        "batch_size": one.config.batch_size,
        "num_workers": one.config.num_workers,
    }
    print(
        f"{name} on {settings['device']}, {options.images} images a turn, {options.rounds} turns "
        f"each, {machine['threads']} threads on {machine['cores']} cores, {elapsed_s:.0f} s in all"
    )
    for precision, figures in measured.items():
        bench = benches[precision]
        print(tabulate(figures["results"], precision, bench.config.batch_size or 0))
        print(f"Once per run: {figures['start_s']:.2f} s before the first image (canaries).")
        if figures["compile_s"]:
            print(f"Compiling took {figures['compile_s']:.0f} s.")
        print(
            f"Embeddings of (4) agree with (1) in fp32 to {figures['disagreement']:.1e}, "
            f"cosine {figures['min_cosine']:.6f}."
        )
        print(bench.summaries[-1].to_text().splitlines()[-1].strip() + "\n")
    write_json(
        options.out,
        {"machine": machine, "settings": settings, "precisions": measured}
        | {"elapsed_s": elapsed_s},
    )
    for precision, figures in measured.items():
        is_exact = precision != "fp32" or figures["disagreement"] <= 1e-5
        if not (is_exact and figures["min_cosine"] >= MIN_COSINE):
            raise SystemExit("The embeddings differ, so these are not the speeds of equal work.")


if __name__ == "__main__":
    main()
