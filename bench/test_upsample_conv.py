"""Nearest ×2 upsampling, 2×2 convolution and ReLU."""

from bench.workloads import selection


def workloads(device, full):
    return selection.operators(["upsample_conv_relu"], device, full)


def test_upsample_conv(workload, variant, compare):
    compare(workload, variant)
