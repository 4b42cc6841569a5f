"""3×3 convolution + bias + ReLU, of one source or of skip and input, and with its max-pool."""

from bench.workloads import selection


def workloads(device, full):
    return selection.operators(["conv_relu", "conv_relu_pool"], device, full)


def test_conv_relu(workload, variant, compare):
    compare(workload, variant)
