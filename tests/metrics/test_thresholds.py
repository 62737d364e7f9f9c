"""Thresholds are the best that any cut could do, and are never chosen without grounds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cxr_cache.config import THRESHOLD_RULES, TrainConfig, parse_threshold_rule
from cxr_cache.errors import ConfigError
from cxr_cache.metrics.operating_point import RULES, choose_thresholds, find_rule
from cxr_cache.metrics.scores import NEVER, UNDECIDED, confusion_counts, rates
from cxr_cache.training.search import require_trainable_folds, split_cohort
from tests.predictions import SEEDS, F, N, make_predictions
from tests.synthetic import make_cohort


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
def test_thresholds_reach_the_best_f1_of_any_cut(seed, decimals):
    targets, scores = make_predictions(seed, decimals=decimals)

    thresholds = choose_thresholds(targets, scores)

    f1 = rates(confusion_counts(targets, scores >= thresholds)).f1
    assert thresholds[1] == NEVER, "it has positives only"
    for f in (3, 4, 5, 6):
        labelled = ~np.isnan(targets[:, f])
        t, s = targets[labelled, f], scores[labelled, f]
        best = max(2 * t[s >= cut].sum() / (t.sum() + (s >= cut).sum()) for cut in np.unique(s))
        assert f1[f] == pytest.approx(best, abs=1e-12), f"finding {f}"


def test_threshold_lies_between_two_probabilities():
    """Tables round probabilities; a threshold that is one of them would let rounding decide."""
    targets = np.array([[1.0], [0.0]])

    assert choose_thresholds(targets, np.array([[0.8], [0.4]])) == pytest.approx([0.6])
    adjacent = np.array([[np.nextafter(0.5, 1)], [0.5]])
    assert (adjacent >= choose_thresholds(targets, adjacent)).tolist() == [[True], [False]]


def test_finding_without_positives_is_never_called():
    targets, scores = make_predictions(0)

    thresholds = choose_thresholds(targets, scores)

    assert thresholds[0] == thresholds[2] == NEVER
    assert json.loads(json.dumps(thresholds.tolist())) == thresholds.tolist()
    assert not (np.ones(F)[[0, 2]] >= thresholds[[0, 2]]).any()


def rates_of_all_cuts(targets, scores) -> dict[float, dict[str, float]]:
    """What every distinct score gives as a threshold, one finding, by an independent loop."""
    labelled = ~np.isnan(targets)
    t, s = targets[labelled] == 1, scores[labelled]
    found = {}
    for cut in np.unique(s):
        d = s >= cut
        found[cut] = {
            "sensitivity": (t & d).sum() / t.sum(),
            "specificity": (~t & ~d).sum() / (~t).sum(),
            "ppv": (t & d).sum() / d.sum(),
        }
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
def test_youden_is_the_best_of_any_cut(seed, decimals):
    targets, scores = make_predictions(seed, decimals=decimals)

    thresholds = choose_thresholds(targets, scores, "youden")

    chosen = rates(confusion_counts(targets, scores >= thresholds))
    for f in range(3, F):
        cuts = rates_of_all_cuts(targets[:, f], scores[:, f]).values()
        best = max(of["sensitivity"] + of["specificity"] for of in cuts)
        assert chosen.sensitivity[f] + chosen.specificity[f] == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("rule", "other"),
    [("sensitivity=0.9", "specificity"), ("specificity=0.9", "sensitivity"), ("ppv=0.4", None)],
)
def test_a_target_is_reached_at_the_least_cost(seed, decimals, rule, other):
    """Of all cuts that reach it, the one with the most of the other rate (of PPV: most calls)."""
    targets, scores = make_predictions(seed, n_rows=200, decimals=decimals)
    name, target = parse_threshold_rule(rule)

    thresholds = choose_thresholds(targets, scores, rule)

    chosen = rates(confusion_counts(targets, scores >= thresholds))._asdict()
    for f in range(3, F):
        cuts = rates_of_all_cuts(targets[:, f], scores[:, f])
        reaching = {cut: of for cut, of in cuts.items() if of[name] >= target}
        if not reaching:
            assert thresholds[f] == NEVER
            continue
        assert chosen[name][f] >= target
        best = other or "sensitivity"
        assert chosen[best][f] == pytest.approx(max(of[best] for of in reaching.values()))


def test_a_target_is_met_exactly_where_shares_are_round():
    """Nine of ten is 0.9, whatever binary fractions make of it."""
    targets = np.repeat([1.0, 0.0], 10)[:, None]
    scores = np.concatenate([np.linspace(0.5, 0.95, 10), np.linspace(0.01, 0.46, 10)])[:, None]
    scores[0] = 0.0  # one positive at the very bottom

    (cut,) = choose_thresholds(targets, scores, "sensitivity=0.9")

    assert 0.46 < cut < 0.55


def test_few_positive_studies_leave_a_finding_undecided_however_many_images_they_have():
    targets = np.repeat([1.0, 1.0, 0.0, 0.0, 0.0], 4)[:, None]  # two positive studies, eight images
    scores = np.linspace(1, 0, 20)[:, None]
    studies = np.arange(20) // 4

    for n, clusters in ((2, studies), (8, None)):
        assert choose_thresholds(targets, scores, clusters=clusters, min_positives=n) < 1
        cut = choose_thresholds(targets, scores, clusters=clusters, min_positives=n + 1)
        assert cut == UNDECIDED > NEVER


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decimals", [16, 1], ids=["distinct", "tied"])
def test_probabilities_count_as_so_many_positives(seed, decimals):
    """The best F1 of any cut, of targets and probabilities mixed, by an independent loop."""
    targets, scores = make_predictions(seed, decimals=decimals)

    thresholds = choose_thresholds(targets, scores, prior_positives=10)

    for f in range(3, F):
        labelled = ~np.isnan(targets[:, f])
        t, p = targets[labelled, f], scores[labelled, f]
        mixed = (t.sum() * t + 10 * p) / (t.sum() + 10)

        def f1(cut: float, p=p, mixed=mixed) -> float:
            return 2 * mixed[p >= cut].sum() / ((p >= cut).sum() + mixed.sum())

        assert f1(thresholds[f]) == pytest.approx(max(map(f1, np.unique(p))), abs=1e-12)


def test_a_target_out_of_reach_means_never():
    targets, scores = np.array([[1.0], [0.0], [0.0]]), np.array([[0.5], [0.5], [0.9]])

    assert choose_thresholds(targets, scores, "ppv=0.6") == [NEVER]
    assert choose_thresholds(targets, scores, "specificity=0.9") == [NEVER]
    assert choose_thresholds(targets, scores, "sensitivity=0.9") == [0.25]


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_no_rule_calls_what_it_cannot_judge(rule):
    """All negative: nothing to find. All positive: nothing to tell it from. No label: neither."""
    targets = np.array([[0.0, 1.0, np.nan], [0.0, 1.0, np.nan]])
    scores = np.array([[0.2, 0.2, 0.2], [0.7, 0.7, 0.7]])

    negative, positive, unlabelled = choose_thresholds(targets, scores, rule)

    assert negative == positive == unlabelled == NEVER
    assert choose_thresholds(targets[:1], scores[:1], rule)[0] == NEVER  # one row


def test_scores_of_a_diverged_model_are_refused():
    targets, scores = make_predictions(0)
    scores[3, 4] = np.nan

    with pytest.raises(ValueError, match=f"1 of {N * F} scores are NaN or infinite"):
        choose_thresholds(targets, scores)


@pytest.mark.parametrize("rule", ["F1", "f1=0.5", "sensitivity", "ppv=", "ppv=half", "best"])
def test_another_rule_is_refused_with_examples(rule):
    with pytest.raises(ConfigError, match=r"is no rule; it is one such as f1, youden, sensitivity"):
        find_rule(rule)
    with pytest.raises(ConfigError, match="is no rule"):
        start_training(TrainConfig(threshold_rule=rule))


@pytest.mark.parametrize("rule", ["F1", "ppv=", "ppv=half", "", "=0.5"])
def test_what_has_not_the_form_of_a_rule_is_refused_at_once(rule):
    with pytest.raises(ConfigError, match="is no rule"):
        TrainConfig(threshold_rule=rule)


def start_training(config: TrainConfig) -> None:
    """What is checked of a recipe once there are rows, before the long work."""
    cohort = make_cohort(60)
    require_trainable_folds(cohort.targets, split_cohort(cohort, config), config)


def test_the_examples_of_rules_are_rules():
    start_training(TrainConfig())
    assert [parse_threshold_rule(rule)[0] for rule in THRESHOLD_RULES] == list(RULES)
    assert [find_rule(rule)[0] for rule in THRESHOLD_RULES] == list(RULES.values())


@pytest.mark.parametrize("rule", ["ppv=0", "sensitivity=90", "specificity=nan", "ppv=-0.1"])
def test_a_target_is_a_share(rule):
    with pytest.raises(ConfigError, match=r"the target must lie in \(0, 1\]"):
        parse_threshold_rule(rule)
