"""2×2 max-pool alone; inside a network the convolution before it writes the pooled image."""

from bench.workloads import selection


def workloads(device, full):
    return selection.operators(["max_pool2d"], device, full)


def test_max_pool(workload, variant, compare):
    compare(workload, variant)
