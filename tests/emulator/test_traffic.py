"""What fastunet/inspection/traffic.py counts from the intermediate code is what the compiled kernels do."""

from __future__ import annotations

import pytest

from fastunet.architecture import Architecture
from fastunet.kernels import _launch

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")

FEWER = {  # elements of a tile that are one element of memory, which the tile counts each
    "conv_relu_first_kernel": "taps past the last, masked off, have the addresses of others",
    "conv_relu_box_head_kernel": "classes past the last, masked off, have the addresses of others",
    "conv_relu_rows_kernel": "stacked columns add one bias, and taps that they lack, masked off, are read nowhere",
    "conv_relu_rows_head_kernel": "the same, and classes past the last, masked off, have the addresses of others",
    "conv_relu_pointer_head_kernel": "classes past the last, masked off, have the addresses of others",
    "stride2_forward_kernel": "four phases add one bias",
    "segmentation_head_backward_kernel": "classes past the last, masked off, have the addresses of others",
    "conv_relu_weight_grad_first_kernel": "taps past the last, masked off, have the addresses of others",
    "conv_relu_weight_grad_kernel": "pixels past the end of a row, masked off, have the addresses of the next row's",
    "sum_splits_kernel": "splits past the last, masked off, have the addresses of others",
    "upsample_bilinear_forward_kernel": "neighbours in a row of the large map lie between the same pixels",
}
MORE = {  # loads ahead that the last steps make, masked off
    "segmentation_head_forward_kernel", "conv_relu_weight_grad_kernel", "conv_relu_weight_grad_first_kernel",
    "stride2_weight_grad_kernel", "conv_relu_pointer_kernel",
}  # fmt: skip


@pytest.mark.slow
def test_counted_traffic_is_executed_traffic():
    from .traffic import rows, table

    # what test_networks.py compiles too
    found = list(rows(network=Architecture(width=16, depth=1), size=(16, 24)))
    print(table(found))
    for row in found:
        assert row.counts["flop"] == row.claimed.flop, row.kernel
        for counted, claimed in ((row.read, row.claimed.read), (row.written, row.claimed.written)):
            assert counted >= claimed or row.kernel in FEWER, (row.kernel, counted, claimed)
            assert counted <= claimed or row.kernel in MORE, (row.kernel, counted, claimed)
    assert {row.kernel for row in found if row.read == row.claimed.read and row.written == row.claimed.written} >= {
        "conv_relu_box_kernel", "max_pool_backward_kernel", "stride2_data_grad_kernel",
        "dice_forward_kernel", "dice_backward_kernel", "sum_splits_kernel", "permuted_taps_kernel",
        "upsample_bilinear_backward_kernel",
    }  # fmt: skip
