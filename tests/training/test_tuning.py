"""Blocks and head trained together: from tokens or images the same, and nothing else moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cxr_cache.config import FinetuneConfig
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import TrainingError
from cxr_cache.models.tuned import TailAndHead, copy_tail, name_blocks
from cxr_cache.store.tokens import ResidentTokens
from cxr_cache.training.fit import HeadTask
from cxr_cache.training.losses import make_loss
from cxr_cache.training.steps.optim import WeightAverage
from cxr_cache.training.tuning import Keeper, TuningData, build_model, group_parameters, tune
from tests.oracles import reference_focal_loss

N_IMAGES, N_FINDINGS = 44, 5
CONFIG = FinetuneConfig.of_recipe(
    "reference",
    epochs=(3,),
    batch_size=8,
    learning_rate=1e-3,
    head_learning_rate=3e-3,
    hidden=(12, 8),
    device="cpu",
    precision="fp32",
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return load_encoder("random:test_vit:3", precision="fp32")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (N_IMAGES, 3, 160, 160), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    rng = np.random.default_rng(2)
    values = (rng.random((N_IMAGES, N_FINDINGS)) < 0.4).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


@pytest.fixture(scope="module")
def tokens(encoder, pixels) -> torch.Tensor:
    """Of each image and its mirror image, float32."""
    with torch.no_grad():
        views = [encoder.stem(encoder.prepare(p), 2) for p in (pixels, pixels.flip(-1))]
    return torch.stack(views, dim=1)


@pytest.fixture
def data(encoder, tokens, targets) -> TuningData:
    fresh = copy.deepcopy(encoder)
    return TuningData(fresh, ResidentTokens(tokens), targets, copy_tail(fresh, 2))


TASK = HeadTask(np.arange(4, N_IMAGES), np.arange(4), seed=11)


def run(data, config=CONFIG, *, n_epochs=3, **options):
    return tune(
        data, TASK, config, n_epochs=n_epochs, keep=[n_epochs], keep_weights=True, **options
    )


class PixelTokens:
    """End to end: every batch goes through the stem anew, mirrored where a view says so."""

    n_views = 2

    def __init__(self, encoder, pixels):
        self.encoder, self.pixels = encoder, pixels

    def batches(self, rows, views, batch_size, *, seeds=None):
        for chosen, view in zip(rows.split(batch_size), views.split(batch_size), strict=True):
            images = self.pixels[chosen]
            images = torch.where(view[:, None, None, None] == 1, images.flip(-1), images)
            with torch.no_grad():
                tokens = self.encoder.stem(self.encoder.prepare(images), 2)
            yield tokens


# -- exactness --------------------------------------------------------------------------


def test_training_from_tokens_is_training_end_to_end(data, pixels):
    from_tokens = run(data)
    end_to_end = run(replace_source(data, PixelTokens(data.encoder, pixels)))

    losses = [[row["train_loss"] for row in t.history] for t in (from_tokens, end_to_end)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert distance(from_tokens.weights[3], end_to_end.weights[3], data.tail) <= 1e-4


def test_tokens_rounded_to_float16_change_little(data, tokens):
    exact = run(data)
    rounded = run(replace_source(data, ResidentTokens(tokens.half())))

    losses = [[row["train_loss"] for row in t.history] for t in (exact, rounded)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert distance(exact.weights[3], rounded.weights[3], data.tail) <= 5e-2


def replace_source(data: TuningData, source) -> TuningData:
    return TuningData(data.encoder, source, data.targets, data.tail)


def distance(ours, theirs, start) -> float:
    """How far two trainings ended from each other, as a share of how far they went.

    Without the biases of keys: softmax does not notice them, so what moves them is rounding.
    """
    assert ours.keys() == theirs.keys()
    apart = went = 0.0
    for name, tensor in start.items():
        a, b, c = (_without_key_bias(name, t) for t in (ours[name][0], theirs[name][0], tensor))
        apart += float((a - b).square().sum())
        went += float((a - c).square().sum())
    return (apart / went) ** 0.5


def _without_key_bias(name, tensor):
    if not name.endswith("qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def test_it_is_what_a_plain_loop_over_the_whole_encoder_does(data, pixels, targets):
    """torch's modules, autograd through all of open_clip's forward, one optimiser, no cache."""
    config = replace(CONFIG, dropout=0.0, weight_decay=0.05, max_grad_norm=0.1)
    source = _Recorded(data.source)
    ours = run(replace_source(data, source), config).weights[3]

    encoder = copy.deepcopy(data.encoder)
    head = build_model(data, config, seed=TASK.seed).bank.as_sequential(0).train()
    tail = [encoder.get_parameter(name).requires_grad_() for name in data.tail]
    for parameter, tensor in zip(tail, data.tail.values(), strict=True):
        parameter.data.copy_(tensor)
    moving = [p for i, p in enumerate(head.parameters()) if i not in (1, 5)]  # HeadBank.backward
    groups = [{"params": tail, "lr": 1e-3}, {"params": moving, "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    for rows, views in source.asked:
        images = torch.where(views[:, None, None, None] == 1, pixels[rows].flip(-1), pixels[rows])
        embeddings = encoder.visual(encoder.prepare(images))
        logits = head(F.normalize(embeddings))
        loss = reference_focal_loss(logits, torch.from_numpy(targets)[rows], gamma=2, alpha=0.25)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*tail, *moving], 0.1)
        optimizer.step()

    theirs = {name: p.detach()[None] for name, p in zip(data.tail, tail, strict=True)}
    theirs["weight_2"] = head[-1].weight.detach().T[None]
    ours = {name: ours[name] for name in theirs}
    assert len(source.asked) == 15
    assert distance(ours, theirs, data.tail) <= 2e-3
    torch.testing.assert_close(ours["weight_2"], theirs["weight_2"], rtol=1e-3, atol=1e-5)


class _Recorded:
    """Notes the rows and views that are asked for."""

    def __init__(self, source):
        self._source, self.n_views, self.asked = source, source.n_views, []

    def batches(self, rows, views, batch_size, *, seeds=None):
        if seeds is not None:  # training, not scoring
            self.asked += list(zip(rows.split(batch_size), views.split(batch_size), strict=True))
        return self._source.batches(rows, views, batch_size, seeds=seeds)


def test_every_frozen_tensor_is_bit_identical_afterwards(data):
    before = {name: tensor.clone() for name, tensor in data.encoder.state_dict().items()}

    run(data)

    after = data.encoder.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(data.tail)


@pytest.mark.parametrize(
    "name",
    [
        "test_vit2",  # pools by average over patches: the last block is computed in full
        "test_vit3",  # pools by attention
        "vit_xsmall_patch16_clip_224",  # another depth and width, a norm before the blocks
    ],
)
def test_other_towers_train_their_last_blocks_too(name):
    other = load_encoder(f"random:{name}", precision="fp32")
    size_px = other.preprocessing.image_size_px
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, size_px, size_px), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        cached = other.stem(other.prepare(images), 3)[:, None]
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    labels = (np.arange(36).reshape(12, 3) % 2).astype(np.float32)
    data = TuningData(other, ResidentTokens(cached), labels, copy_tail(other, 3))
    task = HeadTask(np.arange(12), np.empty(0, np.int64), seed=0)
    config = replace(CONFIG, unfreeze_layers=3, batch_size=6, dropout=0.0)

    trajectory = tune(data, task, config, n_epochs=4, keep=[], keep_weights=False)

    losses = [row["train_loss"] for row in trajectory.history]
    assert losses[-1] < losses[0]
    after = other.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(data.tail)


# -- recipe -----------------------------------------------------------------------------


def test_accumulated_batches_make_one_step_each_few(data):
    """Two batches of 8 per step: half as many updates, and the mean of the gradients."""
    recorded = []
    optimizer = torch.optim.AdamW

    class Counting(optimizer):
        def step(self, *args, **kwargs):
            recorded.append(1)
            return super().step(*args, **kwargs)

    torch.optim.AdamW = Counting
    try:
        run(data, replace(CONFIG, accumulate=2), n_epochs=1)
    finally:
        torch.optim.AdamW = optimizer
    assert len(recorded) == 3  # of 5 batches: two, two and one


def test_warm_up_starts_small_and_leaves_the_rates_in_the_history(data):
    still = run(data, replace(CONFIG, warmup_steps=10**9), n_epochs=1)
    moving = run(data, n_epochs=1)

    assert still.history[0]["lr"] == moving.history[0]["lr"] == CONFIG.learning_rate
    for name, tensor in data.tail.items():
        assert torch.allclose(still.weights[1][name][0], tensor, atol=1e-9)
        assert not torch.allclose(moving.weights[1][name][0], tensor, atol=1e-5)


def test_norms_and_biases_can_be_spared_from_weight_decay(data):
    model = build_model(data, CONFIG)
    assert [group["weight_decay"] for group in group_parameters(model, CONFIG)] == [1e-4, 1e-4]

    groups = group_parameters(model, replace(CONFIG, decay_norms=False))
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        *[(1e-3, 0.0), (1e-3, 1e-4)],
        *[(3e-3, 0.0), (3e-3, 1e-4)],
    ]
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in spared}
    assert all("norm" in name or "bias" in name for name in names)
    left = {name for name, p in model.named_parameters() if p.requires_grad} - names
    assert left
    assert not any("norm" in name or "bias" in name for name in left)


def test_each_block_before_the_last_moves_by_a_smaller_rate(data):
    config = replace(CONFIG, layer_decay=0.5)
    model = build_model(data, config)
    rate_of = {
        id(p): group["lr"] for group in group_parameters(model, config) for p in group["params"]
    }
    first, last = name_blocks(model.tail)
    for name, parameter in model.tail.items():
        assert rate_of[id(parameter)] == (1e-3 if name.startswith(f"{last}.") else 5e-4)
        assert name.startswith((f"{first}.", f"{last}."))
    assert {rate_of[id(p)] for p in model.bank.parameters() if p.requires_grad} == {3e-3}


def test_averaged_weights_are_torchs_own_average(data, monkeypatch):
    """Of every step's weights, by torch's AveragedModel, and they are what is scored and saved."""
    config = replace(CONFIG, ema_decay=0.9)
    reference = None

    def record(average):
        nonlocal reference
        tensors = nn.ParameterList([p.detach().clone() for p in average._tensors])
        if reference is None:
            reference = AveragedModel(
                start, multi_avg_fn=lambda ours, now, n: torch._foreach_lerp_(ours, now, 1 - d(n))
            )
            reference.n_averaged += 1  # which would else only copy
        reference.update_parameters(tensors)
        update(average)

    def d(n):
        return min(0.9, (1 + int(n)) / (10 + int(n)))

    update = WeightAverage.update
    start = nn.ParameterList(
        [p.detach().clone() for p in build_model(data, config, seed=TASK.seed).tensors()]
    )
    monkeypatch.setattr(WeightAverage, "update", record)
    averaged = run(data, config, n_epochs=2)
    expected = list(reference.module.parameters())
    for name, tensor in zip(data.tail, expected, strict=False):
        assert torch.allclose(averaged.weights[2][name][0], tensor, atol=1e-6)
    monkeypatch.setattr(WeightAverage, "update", update)
    plain = run(data, n_epochs=2)
    assert [r["train_loss"] for r in plain.history] == [r["train_loss"] for r in averaged.history]
    assert plain.history[-1]["val_loss"] != averaged.history[-1]["val_loss"]


def test_mixed_batches_have_the_mixture_of_both_losses(data, monkeypatch):
    """One step from a hand-made mixture of neighbours, and none where alpha is 0."""
    config = replace(CONFIG, mixup=0.4)
    seen = []

    class Recording(TailAndHead):
        def forward(self, tokens):
            if self.training:
                seen.append(tokens.clone())
            return super().forward(tokens)

    monkeypatch.setattr("cxr_cache.training.tuning.TailAndHead", Recording)
    run(data, n_epochs=1)
    plain = list(seen)
    seen.clear()
    run(data, config, n_epochs=1)
    for own, mixed in zip(plain, seen, strict=True):
        other = own[[i ^ 1 for i in range(len(own))]]
        share = ((mixed - other) * (own - other)).sum() / (own - other).square().sum()
        assert 0 <= share <= 1
        assert torch.allclose(mixed, share * own + (1 - share) * other, atol=1e-4)


def test_patches_are_left_out_of_training_and_of_nothing_else(data, monkeypatch):
    """Each batch another half; the class token stays; scores see every patch."""
    seen = {True: [], False: []}

    class Recording(TailAndHead):
        def forward(self, tokens):
            seen[self.training].append(tokens.clone())
            return super().forward(tokens)

    monkeypatch.setattr("cxr_cache.training.tuning.TailAndHead", Recording)
    run(data, n_epochs=1)
    whole = seen[True]
    seen[True], seen[False] = [], []
    run(data, replace(CONFIG, patch_dropout=0.5), n_epochs=1)
    assert {tokens.shape[1] for tokens in seen[False]} == {101}
    chosen = []
    for own, fewer in zip(whole, seen[True], strict=True):
        assert fewer.shape[1] == 51
        assert torch.equal(fewer[:, 0], own[:, 0])
        places = [(own[0] == token).all(dim=1).nonzero().item() for token in fewer[0]]
        assert torch.equal(fewer, own[:, places])
        assert places == sorted(places)
        chosen.append(tuple(places))
    assert len(set(chosen)) == len(chosen)


def test_activations_computed_again_change_nothing(data):
    kept = run(data)
    computed_again = run(data, replace(CONFIG, grad_checkpointing=True))
    for name, tensor in kept.weights[3].items():
        torch.testing.assert_close(tensor, computed_again.weights[3][name], msg=name)


def test_bf16_computes_the_loss_and_its_slope_to_its_precision(data, tokens, targets):
    """bf16 keeps 8 bits. Batch norm enlarges what it rounds off, in the gradient above all."""
    losses, gradients = [], []
    for precision in ("fp32", "bf16"):
        config = replace(CONFIG, precision=precision, dropout=0.0)
        model = build_model(data, config, seed=TASK.seed).train()
        labels = torch.from_numpy(targets)
        loss = make_loss(config, labels)(model(tokens[:, 0]), labels)
        moving = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, moving)
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    assert losses[1] == pytest.approx(losses[0], rel=2**-6)
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


def test_bf16_learns_as_well(data):
    """As a mean over seeds, within the spread that seeds have in fp32.

    A single training says little: fifteen steps carry each rounding on, and in bf16 processors
    round in different places. One with matrix units ended 12 % from fp32; rounding at random, to
    either neighbour, ends up to 10 % apart.
    """
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in range(4):
        task = replace(TASK, seed=seed)
        for precision in losses:
            config = replace(CONFIG, precision=precision)
            trajectory = tune(data, task, config, n_epochs=3, keep=[3], keep_weights=True)
            losses[precision].append(trajectory.history[-1]["train_loss"])
            assert all(t.dtype == torch.float32 for t in trajectory.weights[3].values())
    spread = np.std(losses["fp32"], ddof=1)
    assert abs(np.mean(losses["bf16"]) - np.mean(losses["fp32"])) <= spread


def test_early_stopping_keeps_what_the_fold_was_when_it_stopped(data):
    config = replace(CONFIG, early_stopping=1, learning_rate=0.05, head_learning_rate=0.5)
    trajectory = tune(data, TASK, config, n_epochs=30, keep=[1, 30], keep_weights=True)
    assert 1 < len(trajectory.history) < 30
    assert set(trajectory.probabilities) == {1, 30}
    assert set(trajectory.weights) == {1, 30}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_replayed_rates_replace_the_schedule(data, layer_decay):
    rates = [1e-3, 5e-4, 2.5e-4]
    config = replace(CONFIG, layer_decay=layer_decay)
    trajectory = run(data, config, learning_rates=rates)
    assert [row["lr"] for row in trajectory.history] == pytest.approx(rates)


def test_replaying_a_training_with_layer_decay_trains_the_same(data):
    """A refit follows the rates of the folds' histories, which are those of the last block."""
    config = replace(CONFIG, layer_decay=0.5, schedule="cosine")
    before = run(data, config)
    again = run(data, config, learning_rates=[row["lr"] for row in before.history])
    assert [row["train_loss"] for row in again.history] == pytest.approx(
        [row["train_loss"] for row in before.history], rel=1e-5
    )
    assert distance(before.weights[3], again.weights[3], data.tail) <= 1e-3


def test_a_loss_that_diverges_is_named(data):
    with pytest.raises(TrainingError, match=r"no longer finite in epoch 1\. Use a smaller --lr"):
        run(data, replace(CONFIG, learning_rate=1e30, max_grad_norm=None))


# -- interruption -----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "one-cycle"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(data, schedule, after, tmp_path):
    config = replace(
        CONFIG, schedule=schedule, patience=0, warmup_steps=7, ema_decay=0.9, mixup=0.2
    )
    whole = run(data, config)
    path = tmp_path / "state.pt"

    def save(state):
        torch.save(state, path)
        if len(state["trajectory"]["history"]) == after:
            raise KeyboardInterrupt

    def load():
        return torch.load(path, weights_only=True) if path.exists() else None

    with pytest.raises(KeyboardInterrupt):
        run(data, config, keeper=Keeper(load, save))
    epochs = []
    continued = run(
        data,
        config,
        keeper=Keeper(load, lambda state: torch.save(state, path)),
        on_epoch=lambda: epochs.append(1),
    )

    assert len(epochs) == 3  # those of before are counted, not trained
    for name, tensor in whole.weights[3].items():
        assert torch.equal(tensor, continued.weights[3][name]), name
    np.testing.assert_array_equal(whole.probabilities[3], continued.probabilities[3])
    for ours, theirs in zip(whole.history, continued.history, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


# -- full size --------------------------------------------------------------------------


@pytest.mark.slow
def test_at_full_size_tokens_train_the_model_that_images_train(tmp_path):
    """ViT-B/16 as in BiomedCLIP: trajectory, weights, frozen tensors, and the size of the file."""
    encoder = load_encoder("random:vit_base_patch16_224", precision="fp32")
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (16, 3, 224, 224), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        stem = [encoder.stem(encoder.prepare(p), 2) for p in (images, images.flip(-1))]
    cached = torch.stack(stem, dim=1)
    labels = (np.random.default_rng(0).random((16, 35)) < 0.2).astype(np.float32)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    config = FinetuneConfig.of_recipe(
        "reference", batch_size=4, learning_rate=1e-4, device="cpu", precision="fp32"
    )
    tail = copy_tail(encoder, 2)
    sources = {
        "tokens": ResidentTokens(cached),
        "images": PixelTokens(encoder, images),
        "float16": ResidentTokens(cached.half()),
    }
    task = HeadTask(np.arange(16), np.empty(0, np.int64), seed=3)
    ended = {
        name: tune(
            TuningData(encoder, source, labels, tail),
            task,
            config,
            n_epochs=2,
            keep=[2],
            keep_weights=True,
        )
        for name, source in sources.items()
    }
    losses = {name: [row["train_loss"] for row in t.history] for name, t in ended.items()}
    apart = {
        name: distance(ended["images"].weights[2], ended[name].weights[2], tail)
        for name in ("tokens", "float16")
    }
    print(f"losses {losses}, distance from training end to end {apart}")
    np.testing.assert_allclose(losses["tokens"], losses["images"], rtol=1e-4)
    np.testing.assert_allclose(losses["float16"], losses["images"], rtol=5e-3)
    assert apart["tokens"] <= 1e-4
    assert apart["float16"] <= 0.2  # of the way that eight steps go

    after = encoder.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(tail)
    assert sum(tensor.numel() for tensor in tail.values()) == 14_175_744
    n_bytes = sum(tensor.nbytes for tensor in ended["tokens"].weights[2].values())
    assert n_bytes == pytest.approx(58.3e6, rel=0.01)
