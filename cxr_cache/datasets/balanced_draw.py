"""Draws of groups -> a random part of them that holds its share of every finding."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

MIN_DEMAND: Final = 10.0
"""Groups that a part is taken to want of a finding, at least, when errors are weighed. One image
too many weighs less, the more are wanted; without this bound it would weigh so much with rare
findings that the few studies of an odd number of images always had to make up for it."""
_SHARPNESS: Final = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
"""Widths of the soft threshold, in units of a draw, that lead to a sharp one step by step."""
_LEAST_GAIN: Final = 0.0025
"""Fall of the loss that is worth a move, since each move may differ after one image more."""
_OF_DISTANCE: Final = 0.025
"""Loss of a move from one end of the draws to the other."""
_OF_MISSING: Final = 2.0
"""Loss of a class that a side lacks: about that of doubling the number of images of the part."""


def hash_names(names: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Draw a number in [0, 1) for each name, which depends on it and the seed alone, ``(G,)``."""
    digests = [
        # Once the first patient of a table is known, its other groups are called "study ...".
        hashlib.blake2b(f"{seed} {str(name).removeprefix('study ')}".encode(), digest_size=8)
        for name in names
    ]
    return np.frombuffer(b"".join(one.digest() for one in digests), ">u8") / 2.0**64


def draw_groups(
    counts: NDArray[np.float64],
    classes: NDArray[np.bool_],
    draws: NDArray[np.float64],
    share: float,
) -> NDArray[np.bool_]:
    """Choose the groups whose draws lie below their thresholds, and even out what is left.

    The threshold of a group is `share`, and for each of its positive images more or less by the
    price of the finding, so that every finding gets its share. One image more changes prices, and
    so the choice, by little. Groups with the same findings have the same threshold, so that each of
    them is chosen as often as the others, over many draws. What single thresholds cannot do is left
    to :func:`_even_out`.

    Parameters
    ----------
    counts
        Positive images of each finding, and last all images, ``(G, F + 1)``.
    classes
        Whether a group has an image of a class that shall not be missing on either side, if two
        groups have it or more; one column per class, such as the positives of a finding.
    draws
        Numbers in [0, 1), ``(G,)``.
    share
        Of every finding and of the images.

    Returns
    -------
    NDArray[np.bool_]
        True for the groups that are chosen, ``(G,)``; at least one is, and one is not.
    """
    wanted = _count_wanted(counts, share)
    heights = _price_findings(counts, draws, share, wanted)
    return _even_out(counts, classes, heights, wanted)


def _count_wanted(counts: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Count the images of each finding that are to be chosen, ``(F + 1,)``.

    That is its share, but no less than an average group of it has, and no more than leaves one on
    the other side, so that rare findings are on both sides. A finding of one group alone keeps its
    share, which is nearer to none than to the group, unless more than half is to be chosen.
    """
    totals, n_groups = counts.sum(axis=0), (counts > 0).sum(axis=0)
    of_group = totals / n_groups
    bounded = np.clip(share * totals, of_group, totals - of_group)
    demanded: NDArray[np.float64] = np.where(n_groups > 1, bounded, share * totals)
    return demanded


def _even_out(
    counts: NDArray[np.float64],
    classes: NDArray[np.bool_],
    heights: NDArray[np.float64],
    wanted: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Choose the groups with positive `heights`, ``(G,)``, then move single groups.

    Each move is the one by which the following loss falls most, all in units of groups, with s as
    the mean number of images of a group:

    * Pearson's chi-square, the sum of R^2 / (s E) over findings and all images, where R is the
      number of images that are still lacking, and E the number that is wanted, at least 10 s;
    * a constant for each class that two groups have or more, and one side has not;
    * for each moved group, how far its draw lies from its threshold. Hence those are moved whose
      draws were close to the other side, and these are others with every seed.
    """
    is_below = heights > 0
    is_chosen: NDArray[np.bool_] = is_below.copy()
    is_chosen[heights.argmax()], is_chosen[heights.argmin()] = True, False  # neither side is empty
    shared = classes[:, classes.sum(axis=0) > 1].astype(np.float64)
    n_shared = shared.sum(axis=0)
    size = counts[:, -1].mean()
    weighted = counts / (size * np.maximum(wanted, MIN_DEMAND * size))
    squares = (weighted * counts).sum(axis=1)  # chi-square of a group by itself, (G,)
    distances = _OF_DISTANCE * np.minimum(np.abs(heights), 1)
    while True:
        lacking = wanted - counts[is_chosen].sum(axis=0)
        inside = shared[is_chosen].sum(axis=0)
        outside = n_shared - inside
        enters = shared @ ((inside == 0) * 1.0 - (outside == 1))  # classes gained less those lost
        leaves = shared @ ((outside == 0) * 1.0 - (inside == 1))
        gains = np.where(is_chosen, -2, 2) * (weighted @ lacking) - squares
        gains += _OF_MISSING * np.where(is_chosen, leaves, enters)
        gains += np.where(is_chosen == is_below, -distances, distances)
        for side in (is_chosen, ~is_chosen):
            if side.sum() == 1:
                gains[side] = -np.inf
        best = gains.round(9).argmax()  # ties are equal on every processor
        if gains[best] <= _LEAST_GAIN:
            return is_chosen
        is_chosen[best] ^= True


def _price_findings(
    counts: NDArray[np.float64],
    draws: NDArray[np.float64],
    share: float,
    wanted: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Tell how far each group's threshold lies above its draw, ``(G,)``.

    The prices are the minimum of a convex function of F + 1 numbers, whose gradient is what is
    chosen too much of every finding. Newton's method finds it for a soft threshold, which is made
    sharper step by step.
    """
    sizes, totals = counts[:, -1], counts.sum(axis=0)
    rates = counts / sizes[:, None]  # findings per image
    prices = np.zeros(len(totals))
    ridge = np.diag(1e-6 * totals)  # findings that always occur together share their price

    for width in _SHARPNESS:

        def excess(prices: NDArray[np.float64], width: float = width) -> float:
            softened = np.logaddexp(0, (share - draws + rates @ prices) / width)
            return float(width * (sizes @ softened) - wanted @ prices)

        for _ in range(30):
            inside = expit((share - draws + rates @ prices) / width)  # 0 to 1, (G,)
            gradient = counts.T @ inside - wanted
            if np.abs(gradient).max() < 0.02:  # images
                break
            curvature = (rates * (sizes * inside * (1 - inside) / width)[:, None]).T @ rates
            step = np.linalg.solve(curvature + ridge, gradient)
            before, length = excess(prices), 1.0
            while length > 1e-6 and excess(prices - length * step) > before:
                length /= 2
            prices -= length * step
    heights: NDArray[np.float64] = share - draws + rates @ prices
    return heights
