"""The weights that keep touching objects apart, after Ronneberger et al. 2015 (arXiv:1505.04597, equation 2)."""

from __future__ import annotations

import numpy as np

from fastunet.data.labels import IGNORED

W0, SIGMA = 10.0, 5.0
"""The source's choice; ``SIGMA`` in pixels."""
_REACH = 25  # pixels: of d1 + d2 above that the term is below 4e-5


def border_term(classes: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """``w0 · exp(-(d1 + d2)² / (2 σ²))`` at background pixels, float32 (H, W); 0 inside objects and far from two.

    d1 and d2 are the distances, between the centres of pixels, to the nearest and the second nearest object; w0 = 10,
    σ = 5 pixels. Objects are pixels of foreground joined by their sides, or of one number. The source's whole weight is
    ``w(x) = w_c(x) + w0 · exp(-(d1 + d2)² / (2 σ²))``, where w_c balances the classes: ``--class-weights``.
    Distances are exact as far as they matter.

    Args:
        classes: (H, W) class indices; 0 is background, 255 counts nowhere and is no object.
        numbers: (H, W), that of the object that a pixel belongs to, where they are known; 0 is none.
    """
    if numbers is None:
        objects, count = components((classes != 0) & (classes != IGNORED))
    else:
        known, places = np.unique(np.append(0, numbers), return_inverse=True)
        objects, count = places.ravel()[1:].reshape(classes.shape), len(known) - 1
    first, second = np.full((2, *classes.shape), np.inf, np.float32)
    for number, (rows, columns) in enumerate(_boxes(objects, count), 1):
        squared = _squared_distances(objects[rows, columns] == number)
        nearest, next_nearest = first[rows, columns], second[rows, columns]
        next_nearest[:] = np.minimum(next_nearest, np.maximum(nearest, squared))
        nearest[:] = np.minimum(nearest, squared)
    term = W0 * np.exp(-((np.sqrt(first) + np.sqrt(second)) ** 2) / (2 * SIGMA**2))
    return np.where(classes == 0, term, 0).astype(np.float32)


def components(foreground: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers from 1 on for the parts of ``foreground`` (H, W) that hang together by sides of pixels, 0 elsewhere.

    Every pixel starts with a number of its own. Neighbours hand the least number on, and a number then jumps to the
    one that its own pixel has reached, so that chains of any length close in a few rounds.
    """
    least = np.arange(foreground.size, dtype=np.int64)
    place = least.reshape(foreground.shape)
    pairs = [
        (here[joined], there[joined])
        for here, there, joined in (
            (place[1:], place[:-1], foreground[1:] & foreground[:-1]),
            (place[:, 1:], place[:, :-1], foreground[:, 1:] & foreground[:, :-1]),
        )
    ]
    here, there = map(np.concatenate, zip(*pairs))
    while (differ := least[here] != least[there]).any():
        here, there = here[differ], there[differ]
        low, high = np.minimum(least[here], least[there]), np.maximum(least[here], least[there])
        np.minimum.at(least, high, low)
        while (jumped := least[least] != least).any():
            least[jumped] = least[least[jumped]]
    roots, numbers = np.unique(least[foreground.ravel()], return_inverse=True)
    result = np.zeros(foreground.shape, np.int64)
    result[foreground] = numbers.ravel() + 1
    return result, len(roots)


def _boxes(objects: np.ndarray, count: int) -> list[tuple[slice, slice]]:
    """Of each object, the rows and columns within reach."""
    edges = []
    for places in np.nonzero(objects):
        first, last = np.full(count + 1, objects.size), np.zeros(count + 1, int)
        numbers = objects[objects > 0]
        np.minimum.at(first, numbers, places)
        np.maximum.at(last, numbers, places)
        edges.append([slice(max(a - _REACH, 0), b + _REACH + 1) for a, b in zip(first[1:], last[1:])])
    return list(zip(*edges))


def _squared_distances(inside: np.ndarray) -> np.ndarray:
    """Squared distances to the nearest true pixel, float32 (H, W), infinite beyond reach.

    The transform of parabolas of Felzenszwalb and Huttenlocher (2012), one axis after the other.
    """
    squared = np.where(inside, np.float32(0), np.float32(np.inf))
    for _ in range(2):
        padded = np.pad(squared, ((_REACH, _REACH), (0, 0)), constant_values=np.inf)
        for shift in range(2 * _REACH + 1):
            there = padded[shift : shift + len(squared)] + np.float32((shift - _REACH) ** 2)
            np.minimum(squared, there, out=squared)
        squared = squared.T
    return squared
