"""The operators: logical NCHW tensors in and out, fastest in ``channels_last``, differentiable, with ``backend=``."""

from fastunet.functional import relu as _relu  # noqa: F401  (registers relu_backward, which the others call)
from fastunet.functional.conv_norm import conv_norm
from fastunet.functional.conv_relu import conv_relu, conv_relu_pool
from fastunet.functional.conv_transpose import conv_transpose2d
from fastunet.functional.dice import dice_coefficient, dice_cross_entropy, dice_loss
from fastunet.functional.dice_confusion import confusion_matrix
from fastunet.functional.dice_regions import region_dice_cross_entropy
from fastunet.functional.max_pool import max_pool2d
from fastunet.functional.segmentation_head import segmentation_head
from fastunet.functional.upsample_bilinear import upsample_bilinear2d
from fastunet.functional.upsample_conv import upsample_conv_relu

__all__ = [
    "confusion_matrix",
    "conv_norm",
    "conv_relu",
    "conv_relu_pool",
    "conv_transpose2d",
    "dice_coefficient",
    "dice_cross_entropy",
    "dice_loss",
    "max_pool2d",
    "region_dice_cross_entropy",
    "segmentation_head",
    "upsample_bilinear2d",
    "upsample_conv_relu",
]
