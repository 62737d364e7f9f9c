"""Extraction against a plain open_clip script, and against the bare forward pass: images/s.

    python scripts/bench_extract.py [--precision auto] [--images 32] [--rounds 5] [--quick]

The encoder is ViT-B/16 at full size with random weights, the images are JPEG files of 256 pixels.

1. plain: what a researcher would write. open_clip's transform after `.convert("RGB")`, a DataLoader
   with one worker per core, open_clip's image tower under `torch.no_grad()`, fp32, batches of 32;
2. bare, shared: the encoder's own forward pass on pixels in memory, every batch on all cores;
3. bare, alone: the same, one batch per core;
4. the product: `extract_embeddings` into a new store, as `cxr-cache extract` calls it;
5. products: as many multiplications and additions as 3, all in matrix products of one good shape
   and nothing else. This is what the processor can do; no exact forward pass is faster.

2 to 5 compute in the same precision. The floor is the faster of 2 and 3. What the product does
once per run, whatever the number of images (eight canaries to begin with), is shown apart. All take
turns in one process, so that a busy machine slows all alike; medians over the turns. Processor
seconds per image (decoding processes included) are distorted less by other work. Embeddings of 1
and 4 must agree, or the status is 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
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

from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.phantoms.dataset import draw_phantom
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import cosines, encoding_threads
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.store.extract import ExtractSummary, extract_embeddings, resolve_for
from cxr_cache.store.feature_store import FeatureStore

IMAGE_SIZE_PX, PLAIN_BATCH_SIZE = 256, 32
GOALS = {"plain": 2.0, "floor": 0.9}
"""How many times the speed of these the product should have."""


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
    """The same images and weights for everybody."""

    def __init__(self, folder: Path, encoder: Encoder, n_images: int) -> None:
        self.folder, self.encoder, self.cohort = folder, encoder, _write_images(folder, n_images)
        self.config = resolve_for(ExtractConfig(), encoder.device)
        pixels = [
            read_image(folder, image_id, encoder.preprocessing).pixels
            for image_id in self.cohort.image_ids
        ]
        self.pixels = torch.from_numpy(np.stack(pixels))
        self.summaries: list[ExtractSummary] = []
        self.start_s: list[float] = []

    def run_plain(self) -> tuple[Turn, NDArray[np.float32]]:
        """Seconds and embeddings of the plain script."""
        loader = DataLoader(
            _PlainImages(self.folder, self.cohort.image_ids.tolist(), self.encoder),
            batch_size=PLAIN_BATCH_SIZE,
            num_workers=os.cpu_count() or 1,
        )
        device, embeddings = self.encoder.device, []
        mark = _now()
        with torch.no_grad():
            for batch in loader:
                embeddings.append(self.encoder.visual(batch.to(device)).cpu().numpy())
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
        assert self.config.batch_size is not None
        with self.encoder.cast_weights(), encoding_threads(self.encoder.device) as (threads, _):
            mark = _now()
            batches = torch.split(self.pixels, self.config.batch_size)
            for result in [threads.submit(self.encoder.encode, batch) for batch in batches]:
                result.result()[1].cpu()
            return _since(mark), None

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


def run_rounds(bench: Bench, n_rounds: int) -> tuple[dict[str, list[Turn]], float, float]:
    """Every turn but the first; largest difference and smallest cosine of 1 and 4."""
    contestants: dict[str, Callable[[], tuple[Turn, Any]]] = {
        "plain": bench.run_plain,
        "shared": bench.run_shared,
        "alone": bench.run_alone,
        "product": bench.run_product,
        "products": bench.run_products,
    }
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    embeddings: dict[str, Any] = {}
    for _ in range(n_rounds + 1):
        for name, run in contestants.items():
            turn, embeddings[name] = run()
            turns[name].append(turn)
    plain, product = embeddings["plain"], embeddings["product"]
    apart = float(np.abs(plain - product).max())
    return {k: v[1:] for k, v in turns.items()}, apart, float(cosines(plain, product).min())


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


def judge(results: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The product against the plain script and the floor."""
    speeds = {name: result["images_per_s"] for name, result in results.items()}
    baselines = {"plain": speeds["plain"], "floor": max(speeds["shared"], speeds["alone"])}
    judged = []
    for against, goal in GOALS.items():
        ratio = speeds["product"] / baselines[against]
        judged.append({"against": against, "ratio": ratio, "goal": goal, "met": ratio >= goal})
    return judged


def tabulate(results: dict[str, dict[str, float]], precision: str, batch_size: int) -> str:
    """One line per contestant."""
    titles = {
        "plain": f"(1) plain open_clip + DataLoader, fp32, batches of {PLAIN_BATCH_SIZE}",
        "shared": f"(2) bare, {precision}, batches of {PLAIN_BATCH_SIZE} on all cores",
        "alone": f"(3) bare, {precision}, batches of {batch_size}, one per core",
        "product": f"(4) extract_embeddings, {precision}",
        "products": f"(5) its multiplications as bare matrix products, {precision}",
    }
    floor = max(results[name]["images_per_s"] for name in ("shared", "alone"))
    plain = results["plain"]["images_per_s"]
    rows = [["", "images/s", "slowest", "fastest", "cpu s", "÷ (1)", "÷ floor"]]
    for name, result in results.items():
        speed = result["images_per_s"]
        figures = [*result.values(), speed / plain, speed / floor]
        rows.append([titles[name], *(f"{figure:.2f}" for figure in figures)])
    rows.append(["goal for (4)", *[""] * 4, *(f"{goal:.2f}" for goal in GOALS.values())])
    return format_table(rows)


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=32, help="images per turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run at all?")
    parser.add_argument("--out", type=Path, default=results_path("extract"))
    options = parser.parse_args()
    name = f"random:{'test_vit' if options.quick else 'vit_base_patch16_224'}"
    encoder = load_encoder(name, device=options.device, precision=options.precision)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), encoder, options.images)
        turns, apart, cosine = run_rounds(bench, options.rounds)
    results, machine = summarise(turns, options.images), describe_machine()
    judged, batch_size = judge(results), bench.config.batch_size or 0
    settings = {
        "encoder": name,
        "device": str(encoder.device),
        "precision": encoder.precision,
        "images": options.images,
        "rounds": options.rounds,
        "batch_size": batch_size,
        "num_workers": bench.config.num_workers,
    }
    elapsed_s, start_s = time.perf_counter() - started, median(bench.start_s)
    print(
        f"{name} on {encoder.device}, {encoder.precision}, {options.images} images a turn, "
        f"{options.rounds} turns each, {machine['threads']} threads on {machine['cores']} cores, "
        f"{elapsed_s:.0f} s in all"
    )
    print(tabulate(results, encoder.precision, batch_size))
    print(f"Once per run: {start_s:.2f} s before the first image (canaries).")
    print(f"Embeddings of (1) and (4) agree to {apart:.1e}, cosine {cosine:.6f}.")
    print(bench.summaries[-1].to_text().splitlines()[-1].strip())
    write_json(
        options.out,
        {"machine": machine, "settings": settings, "results": results, "goals": judged}
        | {"start_s": start_s, "disagreement": apart, "min_cosine": cosine}
        | {"elapsed_s": elapsed_s},
    )
    if not (apart <= 1e-5 if encoder.precision == "fp32" else cosine >= 0.999):
        raise SystemExit("The embeddings differ, so these are not the speeds of equal work.")


if __name__ == "__main__":
    main()
