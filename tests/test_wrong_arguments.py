"""What is no tensor, no dense tensor or no number of classes is refused by the public function, with the value."""

from __future__ import annotations

import pytest
import torch

from fastunet import UNet, data, functional
from fastunet.architecture import Architecture
from fastunet.inference.tiles import segment_tiled
from fastunet.metrics import SegmentationMetrics

X, W, B = torch.zeros(1, 3, 4, 4), torch.zeros(4, 3, 3, 3), torch.zeros(4)
LABELS = torch.zeros(1, 4, 4, dtype=torch.long)
CALLS = {
    "conv_norm": (X, W, B),
    "conv_relu": (X, W, B),
    "conv_relu_pool": (X, W, B),
    "max_pool2d": (X,),
    "conv_transpose2d": (X, torch.zeros(3, 4, 2, 2), B),
    "upsample_conv_relu": (X, torch.zeros(4, 3, 2, 2), B),
    "upsample_bilinear2d": (X,),
    "segmentation_head": (X, torch.zeros(4, 3, 1, 1), B),
    "dice_loss": (X, LABELS),
    "dice_cross_entropy": (X, LABELS),
    "dice_coefficient": (X, LABELS),
    "region_dice_cross_entropy": (X, LABELS, [(1,), (1, 2), (2,)]),
    "confusion_matrix": (X, LABELS, 3),
}
NO_TENSORS = [[1.0, 2.0], "image", 3, 1.5, X.to_sparse(), X.to(torch.complex64)]


def test_every_public_function_is_here():
    assert set(CALLS) == set(functional.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_no_tensor(name):
    function, arguments = getattr(functional, name), CALLS[name]
    function(*arguments)
    for index, argument in enumerate(arguments):
        for wrong in NO_TENSORS if isinstance(argument, torch.Tensor) else []:
            with pytest.raises((ValueError, TypeError)):
                function(*arguments[:index], wrong, *arguments[index + 1 :])
    with pytest.raises(TypeError, match=r"is None; expected torch\.Tensor"):
        function(None, *arguments[1:])


@pytest.mark.parametrize("number", [0, -1, 10**12, True, 1.5, float("nan"), "4", None, torch.tensor(4)])
def test_number_of_classes(number):
    for call in (lambda: functional.confusion_matrix(X, LABELS, number), lambda: SegmentationMetrics(number)):
        with pytest.raises((ValueError, TypeError), match="num_classes is"):
            call()


@pytest.mark.parametrize("name", ["in_channels", "num_classes", "width", "depth"])
def test_networks_beyond_any_memory(name):
    with pytest.raises(ValueError, match="expected at most"):
        UNet(**{name: 10**12})


def test_tiles_of_other_images():
    with pytest.raises(ValueError, match=r"expected \(N, 2, H, W\)"):
        next(segment_tiled(torch.nn.Identity(), Architecture(), X))


def test_positions_of_another_shape():
    with pytest.raises(ValueError, match=r"positions of shape \(1, 1\)"):
        data.augment(X, LABELS, seed=0, epoch=0, positions=torch.zeros(1, 1).numpy())
