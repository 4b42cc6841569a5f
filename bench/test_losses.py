"""Dice + cross-entropy of logits and integer labels, with the gradient."""

from bench.workloads import selection


def workloads(device, full):
    return selection.losses(device, full)


def test_losses(workload, variant, compare):
    compare(workload, variant)
