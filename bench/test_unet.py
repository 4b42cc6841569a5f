"""Whole networks: inference to logits and labels, and a training step."""

from bench.workloads import selection


def workloads(device, full):
    return selection.networks(device, full)


def test_unet(workload, variant, compare):
    compare(workload, variant)
