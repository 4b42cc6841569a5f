"""How training would scale over many GPUs: a model of the gradient exchange from published link speeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

GPUS_A_NODE = 8


@dataclass(frozen=True)
class Link:
    """A connection of one GPU: GB/s in one direction, and microseconds of latency a step of the exchange."""

    name: str
    gbs: float
    latency_us: float


NVLINK = Link("NVLink 4, 18 links of 25 GB/s", 450.0, 3.0)
INFINIBAND = Link("InfiniBand NDR, 400 Gbit/s for each GPU", 50.0, 8.0)
"""Speeds as published by the vendor for an HGX H100 node; the latencies are assumptions, of the size that is common."""


def exchange_seconds(gpus: int, gradient_bytes: int) -> float:
    """All-reduce of ``gradient_bytes`` over ``gpus``, in nodes of eight.

    Inside a node, reduce-scatter and all-gather on a ring of n GPUs move ``2 (n-1)/n`` of the bytes over NVLink in
    ``2 (n-1)`` steps. Between m nodes every GPU reduces its n-th of them over its own InfiniBand link: ``2 (m-1)/m`` of
    that part, in ``2 ceil(log2 m)`` steps of a tree.
    """
    n = min(gpus, GPUS_A_NODE)
    nodes = math.ceil(gpus / GPUS_A_NODE)
    inside = 2 * (n - 1) / n * gradient_bytes / (NVLINK.gbs * 1e9) + 2 * (n - 1) * NVLINK.latency_us * 1e-6
    if nodes == 1:
        return inside
    steps = 2 * math.ceil(math.log2(nodes))
    between = 2 * (nodes - 1) / nodes * gradient_bytes / n / (INFINIBAND.gbs * 1e9)
    return inside + between + steps * INFINIBAND.latency_us * 1e-6


def step_seconds(gpus: int, compute: float, gradient_bytes: int, *, overlapped: bool) -> float:
    """A training step: ``compute`` seconds on each GPU, then the exchange.

    If ``overlapped``, it hides behind the backward pass (two thirds of ``compute``) except for its last eighth, the
    gradients of the first layers, which exist only at the end.
    """
    exchange = exchange_seconds(gpus, gradient_bytes) if gpus > 1 else 0.0
    if not overlapped:
        return compute + exchange
    return compute + max(exchange / 8, exchange - compute * 2 / 3)


def strong_scaling_limit(batch: int, compute_of: Callable[[float], float], gradient_bytes: int) -> int:
    """The power of two of GPUs from which on twice as many no longer make ``batch`` images 1.25 times as fast.

    ``compute_of(images)`` is the measured time of a step of so many images on one GPU. At most ``batch`` GPUs.
    """
    gpus = 1
    while 2 * gpus <= batch:
        now, then = (step_seconds(g, compute_of(batch / g), gradient_bytes, overlapped=True) for g in (gpus, 2 * gpus))
        if now < 1.25 * then:
            break
        gpus *= 2
    return gpus
