"""2×2 transposed convolution with stride 2."""

from bench.workloads import selection


def workloads(device, full):
    return selection.operators(["conv_transpose2d"], device, full)


def test_conv_transpose(workload, variant, compare):
    compare(workload, variant)
