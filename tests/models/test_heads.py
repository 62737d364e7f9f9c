"""A bank of heads is a row of nn.Sequentials that do not notice each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cxr_cache.models.heads import HeadBank, predict_probabilities

H, B, D, N_FINDINGS = 3, 16, 8, 5


@pytest.fixture
def in_float64():
    """Rounding of 1e-16 leaves no doubt about what is equal; float32 would need excuses."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_bank(seeds=(1, 2, 3), **options) -> HeadBank:
    return HeadBank(len(seeds), D, N_FINDINGS, **{"hidden": (12, 6), "seeds": seeds, **options})


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train_a_little(bank: HeadBank, n_steps: int = 4, rate: float = 0.1) -> None:
    """Gradient descent towards noise: weights and running statistics leave their first values."""
    bank.train()
    for step in range(n_steps):
        logits = bank(2 + draw(step, bank.n_heads, B, D))
        bank.backward((logits - draw(100 + step, *logits.shape)).square().mean(dim=(1, 2)))
        with torch.no_grad():
            bank.flat -= rate * bank.flat_grad
    bank.eval()


# --- Equal to nn.Sequential -----------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(12, 6), (7,), ()])
def test_every_head_is_the_sequential_it_says_through_several_steps(in_float64, hidden):
    """Logits, gradients, running statistics and, in the end, evaluation: all as torch has them."""
    bank = make_bank(hidden=hidden, dropout=0.0)
    sequentials = [bank.as_sequential(h) for h in range(H)]
    optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in sequentials]

    for step in range(5):
        x, y = draw(step, H, B, D), draw(10 + step, H, B, N_FINDINGS)
        logits = bank(x)
        bank.backward((logits - y).square().mean(dim=(1, 2)))
        for h, (sequential, optimizer) in enumerate(zip(sequentials, optimizers, strict=True)):
            expected = sequential(x[h])
            torch.testing.assert_close(logits[h], expected)
            optimizer.zero_grad()
            (expected - y[h]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            bank.flat -= 0.1 * bank.flat_grad

    for h, sequential in enumerate(sequentials):
        ours = bank.as_sequential(h).state_dict()
        for name, theirs in sequential.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(ours[name], theirs, msg=f"head {h}, {name}")
    x = draw(99, 7, D)
    bank.eval()
    for h, sequential in enumerate(sequentials):
        torch.testing.assert_close(bank(x)[h], sequential.eval()(x))
        torch.testing.assert_close(bank.as_sequential(h)(x), sequential(x))


def test_the_references_head_has_its_layers_and_404515_parameters():
    bank = HeadBank(1, 512, 35)
    sequential = bank.as_sequential(0)

    assert bank.n_parameters == 404_515
    assert sum(p.numel() for p in sequential.parameters()) == 404_515
    assert [type(layer) for layer in sequential] == [
        *(nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout),
        *(nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout),
        nn.Linear,
    ]
    assert [layer.p for layer in sequential if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    norms, default = [sequential[1], sequential[5]], nn.BatchNorm1d(1)
    assert {(n.eps, n.momentum) for n in norms} == {(default.eps, default.momentum)}


def test_weights_are_xavier_uniform_and_biases_zero():
    sequential = HeadBank(2, 512, 35, seeds=[7, 8]).as_sequential(1)

    for linear in (layer for layer in sequential if isinstance(layer, nn.Linear)):
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        largest, spread = linear.weight.abs().max().item(), linear.weight.std().item()
        assert 0.999 * bound < largest <= bound
        assert spread == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform variable
        assert (linear.bias == 0).all()
    for norm in (layer for layer in sequential if isinstance(layer, nn.BatchNorm1d)):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


# --- Independent of each other --------------------------------------------------------------------


def test_the_seed_decides_the_initial_weights():
    first, again, other = (make_bank(seeds).flat for seeds in [(1, 2), (1, 2), (3, 1)])

    assert torch.equal(first, again)
    assert torch.equal(first[0], other[1]), "the place in the bank does not matter"
    assert not torch.allclose(first[0], first[1])


def test_a_head_does_not_depend_on_its_neighbours(in_float64):
    """With dropout on, and after steps of training: neither luck nor statistics are shared."""
    together, alone = make_bank((1, 2, 3)), make_bank((2,))
    others = make_bank((2, 9))

    for step in range(3):
        x = draw(step, H, B, D)
        y = draw(10 + step, B, N_FINDINGS)
        for bank, batches, h in [
            (together, x, 1),
            (alone, x[1:2], 0),
            (others, torch.stack([x[1], 50 * x[0]]), 0),
        ]:
            logits = bank(batches)
            bank.backward((logits - y).square().mean(dim=(1, 2)))
            with torch.no_grad():
                bank.flat -= 0.1 * bank.flat_grad
            if bank is together:
                expected = logits[h].detach()
            torch.testing.assert_close(logits[h], expected, msg=f"step {step}")
    for bank, h in [(alone, 0), (others, 0)]:
        for name, tensor in bank.snapshot([h]).items():
            torch.testing.assert_close(tensor, together.snapshot([1])[name], msg=name)


def test_heads_do_not_share_their_dropout():
    twins, strangers = make_bank((4, 4)), make_bank((4, 5))
    strangers.flat[1] = strangers.flat[0]
    x = draw(0, B, D)

    assert torch.equal(*strangers.eval()(x)), "no dropout in evaluation"
    assert not torch.allclose(*strangers.train()(x))
    assert torch.equal(*twins(x))


def test_dropout_keeps_the_expected_logits():
    """Kept units are scaled up by 1 / (1 - p), so that evaluation needs no correction."""
    options = {"hidden": (12,), "seeds": [1] * 4000}
    x = draw(0, B, D)

    dropped = HeadBank(4000, D, N_FINDINGS, dropout=0.3, **options)
    dropped.generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    expected = HeadBank(4000, D, N_FINDINGS, dropout=0.0, **options)(x)[0]

    logits = dropped(x).detach()
    standard_error = logits.std(dim=0) / math.sqrt(4000)
    assert ((logits.mean(dim=0) - expected).abs() < 5 * standard_error + 1e-6).all()
    assert (logits.std(dim=0) > 0.01).all()


def test_every_head_needs_its_own_seed():
    with pytest.raises(ValueError, match="3 heads need as many seeds, not 2"):
        HeadBank(3, D, N_FINDINGS, seeds=[1, 2])


# --- One row of numbers per head ------------------------------------------------------------------


def test_parameters_are_views_of_the_heads_rows():
    """Every number of a row belongs to exactly one parameter of that head, at the same head."""
    bank = make_bank()
    numbers = torch.arange(bank.flat.numel(), dtype=torch.float32).view(H, -1)
    bank.flat.copy_(numbers)

    for h in range(H):
        held = torch.cat([parameter[h].flatten() for parameter in bank.parameters()])
        assert torch.equal(held.sort().values, numbers[h])


def test_backward_writes_the_gradient_to_the_places_of_the_parameters():
    bank = make_bank(dropout=0.0)
    x = draw(0, H, B, D)
    losses = bank(x).square().mean(dim=(1, 2))
    expected = torch.autograd.grad(losses.sum(), list(bank.parameters()), retain_graph=True)

    bank.backward(losses)

    bank.flat.copy_(bank.flat_grad)
    for (name, parameter), gradient in zip(bank.named_parameters(), expected, strict=True):
        if name not in ("bias_0", "bias_1"):
            assert torch.equal(parameter, gradient), name


def test_a_bias_before_a_batch_norm_does_not_move():
    """Its gradient is zero but for rounding, of which AdamW would make full steps."""
    bank = make_bank()
    losses = bank(draw(0, H, B, D)).square().mean(dim=(1, 2))
    found = torch.autograd.grad(losses.sum(), [bank.bias_0, bank.bias_1], retain_graph=True)

    bank.backward(losses)

    scale = bank.flat_grad.abs().max()
    assert all(gradient.abs().max() < 1e-6 * scale for gradient in found)
    bank.flat.copy_(bank.flat_grad)
    assert (bank.bias_0 == 0).all()
    assert (bank.bias_1 == 0).all()
    assert (bank.bias_2 != 0).all()


def test_a_snapshot_comes_back_as_the_same_heads():
    bank = make_bank()
    train_a_little(bank)
    x = draw(0, 7, D)

    restored = HeadBank.from_snapshot(bank.snapshot([2, 0]))

    assert not restored.training
    assert (restored.n_heads, restored.widths) == (2, bank.widths)
    assert torch.equal(restored(x), bank(x)[[2, 0]])
    assert torch.equal(HeadBank.from_snapshot(bank.snapshot())(x), bank(x))


def test_a_snapshot_does_not_change_when_training_goes_on():
    bank = make_bank()
    snapshot = bank.snapshot([1])
    before = {name: tensor.clone() for name, tensor in snapshot.items()}

    train_a_little(bank)

    for name, tensor in snapshot.items():
        assert torch.equal(tensor, before[name]), name
        if name not in ("bias_0", "bias_1"):
            assert not torch.equal(bank.snapshot([1])[name], before[name]), f"{name} never learnt"


# --- Probabilities --------------------------------------------------------------------------------


def test_probabilities_are_the_evaluated_sigmoid_in_any_batch_size():
    bank = make_bank()
    train_a_little(bank)
    x = draw(0, 11, D)
    expected = torch.stack([bank.as_sequential(h)(x).sigmoid() for h in range(H)]).mean(dim=0)

    for batch_size in (1, 4, 11, 100):
        probabilities = predict_probabilities(bank, x, batch_size=batch_size)
        torch.testing.assert_close(probabilities, expected)


def test_predicting_leaves_a_bank_in_training_as_it_was():
    bank = make_bank()
    before = bank.snapshot()

    predict_probabilities(bank, draw(0, 11, D))

    assert bank.training
    for name, tensor in bank.snapshot().items():
        assert torch.equal(tensor, before[name]), name


def test_an_empty_batch_gives_empty_logits():
    bank = make_bank().eval()

    assert bank(torch.empty(H, 0, D)).shape == (H, 0, N_FINDINGS)
    assert predict_probabilities(bank, torch.empty(0, D)).shape == (0, N_FINDINGS)


def test_a_row_of_nan_stays_alone():
    """An image that could not be read must not touch the others of its batch."""
    bank = make_bank()
    train_a_little(bank)
    x = draw(0, 4, D)
    broken = x.clone()
    broken[2] = torch.nan

    probabilities = predict_probabilities(bank, broken)

    assert probabilities[2].isnan().all()
    rest = [0, 1, 3]
    assert torch.equal(probabilities[rest], predict_probabilities(bank, x)[rest])


def test_the_reference_head_in_float32_equals_torchs():
    """At full width, in the precision that is used: one pass differs by rounding alone."""
    bank = HeadBank(2, 512, 35, dropout=0.0)
    x = F.normalize(draw(0, 2, 16, 512), dim=-1)

    for h in range(2):
        torch.testing.assert_close(bank(x)[h], bank.as_sequential(h)(x[h]), rtol=1e-4, atol=1e-5)
