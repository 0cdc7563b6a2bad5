# SPDX-License-Identifier: Apache-2.0
"""SMAR's equations in NumPy, float64, token by token, written only from the paper."""

import math

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """Eq. 4."""
    e = np.exp(x - x.max())
    return e / e.sum()


def topk_weights(probabilities: np.ndarray, k: int) -> np.ndarray:
    """Eq. 5 for one token: renormalized over the K chosen experts, 0 elsewhere."""
    chosen = np.argsort(-probabilities, kind="stable")[:k]
    weights = np.zeros_like(probabilities)
    weights[chosen] = probabilities[chosen] / probabilities[chosen].sum()
    return weights


def distribution(weights: np.ndarray, chosen: np.ndarray, k: int, eps: float) -> np.ndarray:
    """Eq. 6 to 9 for the tokens of one modality, smoothed so that the KL divergence stays finite."""
    tokens, experts = weights.shape
    q = np.zeros(experts)
    for e in range(experts):
        frequency = sum(1.0 for i in range(tokens) if chosen[i, e]) / (k * tokens)  # Eq. 6
        expected = sum(weights[i, e] for i in range(tokens)) / tokens  # Eq. 7
        q[e] = frequency * expected
    q = q / q.sum()  # Eq. 8, 9
    return np.array([(value + eps) / (1 + experts * eps) for value in q])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Eq. 11 and 12."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def distance(distributions: list[np.ndarray]) -> float:
    """Eq. 10; for more than two modalities, the mean over the unordered pairs."""
    pairs = [(p, q) for i, p in enumerate(distributions) for q in distributions[i + 1 :]]
    if not pairs:
        return 0.0
    return sum(0.5 * (kl(p, q) + kl(q, p)) for p, q in pairs) / len(pairs)


def band(d: float, d_min: float, d_max: float) -> float:
    """Eq. 13."""
    if d < d_min:
        return d_min - d
    if d > d_max:
        return d - d_max
    return 0.0


def layer(
    weights: np.ndarray,
    chosen: np.ndarray,
    ids: np.ndarray,
    modalities: int,
    k: int,
    eps: float,
    d_min: float,
    d_max: float,
) -> tuple[float, float]:
    """Returns distance and loss of one layer; modalities without tokens and padding (-1) are left out."""
    present = [m for m in range(modalities) if (ids == m).any()]
    if len(present) < 2:
        return 0.0, 0.0
    d = distance([distribution(weights[ids == m], chosen[ids == m], k, eps) for m in present])
    return d, band(d, d_min, d_max)
