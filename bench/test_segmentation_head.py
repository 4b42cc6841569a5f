"""1×1 convolution to class logits."""

from bench.workloads import selection


def workloads(device, full):
    return selection.operators(["segmentation_head"], device, full)


def test_segmentation_head(workload, variant, compare):
    compare(workload, variant)
