"""What is no tensor, no dense tensor or no number of classes is refused by the public function, with the value."""

from __future__ import annotations

import pytest
import torch

from fastunet import UNet, data, functional, losses, reference
from fastunet.architecture import Architecture
from fastunet.inference.tiles import segment_tiled
from fastunet.metrics import SegmentationMetrics
from fastunet.training.step import TrainingStep
from tests.data_files import brats_case

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
NO_TENSORS = [[1.0, 2.0], "image", 3, 1.5, X.to_sparse(), X.to(torch.complex64), X.to(torch.float8_e4m3fn),
              X[0, 0, 0, 0], torch.nested.nested_tensor([X[0], X[0]]), torch.nn.UninitializedParameter()]  # fmt: skip


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


@pytest.mark.parametrize(("tile", "forward", "words"), [
    (0, torch.nn.Identity(), "tile is 0"), (10**12, torch.nn.Identity(), "tile is 10"),
    (None, lambda x: x[..., :5], "forward gave"), (None, lambda x: 3, "forward gave 3"),
])  # fmt: skip
def test_tiles_that_are_none(tile, forward, words):
    with pytest.raises(ValueError, match=words):
        next(segment_tiled(forward, Architecture(in_channels=3, depth=1), X, tile))


@pytest.mark.parametrize(("changed", "words"), [
    ({"positions": torch.zeros(1, 1).numpy()}, r"positions of shape \(1, 1\)"),
    ({"positions": [-1]}, r"positions are \[-1\]"),
    ({"positions": torch.zeros(1).numpy()}, "expected integers"), ({"epoch": -1}, "epoch is -1"),
    ({"weights": X}, r"weights have shape \(1, 3, 4, 4\)"), ({"images": X.long()}, "images are torch.int64"),
])  # fmt: skip
def test_augmentation(changed, words):
    given = {"images": X, "labels": LABELS, "seed": 0, "epoch": 0, "positions": [0]} | changed
    with pytest.raises(ValueError, match=words):
        data.augment(**given)


@pytest.mark.parametrize("options", [{"noise": -1.0}, {"rotate": -1}, {"probability": 1.5}])
def test_augmentation_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        data.Augmentation(**options)


def test_slices_that_a_case_does_not_have(tmp_path):
    brats_case(tmp_path / "case")
    slices = data.CaseSlices(data.discover_cases(tmp_path)[0])
    volume, labels = slices.new_volume("u1"), torch.zeros(1, *slices.slice_shape).numpy()
    for start in (-1, len(slices), 10**12):
        with pytest.raises(ValueError, match="are not among the"):
            slices.place(volume, start, labels)
    with pytest.raises(ValueError, match="batch_size is -1"):
        next(slices.batches(-1))
    for size in (0, -1, 10**12):
        with pytest.raises(ValueError, match="slice size is"):
            data.CaseSlices(slices.case, size=size)


def test_names_that_no_file_can_have():
    with pytest.raises(ValueError, match="there is no such"):
        data.discover_cases("x" * 5000)
    with pytest.raises(ValueError, match="there is no such"):
        data.cases_from_files(["x" * 5000 + ".nii"])


@pytest.mark.parametrize("build", [UNet, reference.UNet])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("autocast", [False, True])
def test_images_of_other_dtypes_and_devices(build, norm, autocast):
    model = build(3, 2, 2, 1, norm=norm).eval()
    wrong = [X.double(), X.long(), X.bool(), X.to(torch.uint16), X.to("meta"), *([] if autocast else [X.half()])]
    for images in wrong:
        with pytest.raises(ValueError, match="the images are"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(images)


@pytest.mark.parametrize("weights", [True, 10**400, [1.0, float("nan")], [1.0, -1.0], [[1.0]], "ab", [1e300, 1]])
def test_weights_of_classes_and_regions(weights):
    with pytest.raises(ValueError, match="class_weights is "):
        losses.DiceCrossEntropyLoss(class_weights=weights)(X[:, :2], LABELS)
    with pytest.raises(ValueError, match="region_weights is "):
        losses.RegionDiceCrossEntropyLoss([(1,), (2,)], region_weights=weights)


@pytest.mark.parametrize("wrong", [3, [1.0], X[:, 0].to_sparse(), X[:, 0].to("meta"), X[:, 0].to(torch.complex64)])
def test_tensors_of_losses(wrong):
    loss, regions = losses.DiceCrossEntropyLoss(), losses.RegionDiceCrossEntropyLoss([(1,), (2,), (3,)])
    for call in (lambda: regions(wrong, LABELS), lambda: loss(X, wrong), lambda: loss(X, LABELS, wrong)):
        with pytest.raises((TypeError, ValueError)):
            call()
    with pytest.raises(ValueError, match="the weights are on meta"):
        functional.dice_cross_entropy(X, LABELS, class_weights=torch.ones(3, device="meta"))


def test_metrics_without_numbers():
    metrics = SegmentationMetrics(3)
    metrics.update(X.to("meta"), LABELS.to("meta"))
    with pytest.raises(ValueError, match="the counts are on meta"):
        metrics.compute()
    for labels in (torch.tensor(1), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="predicted labels have shape"):
            metrics.update(labels, LABELS)


def test_tensors_of_inference_mode_in_a_derivative():
    with torch.inference_mode():
        images, weight, labels = X.clone(), W.clone(), LABELS.clone()
    with pytest.raises(ValueError, match="inference mode"):
        functional.conv_relu(X.clone().requires_grad_(), weight, B)
    with pytest.raises(ValueError, match="inference mode"):
        functional.dice_loss(X.clone().requires_grad_(), labels)
    with pytest.raises(ValueError, match="inference mode"):
        functional.dice_coefficient(X.clone().requires_grad_(), labels)
    for network in (UNet(3, 2, 2, 1), reference.UNet(3, 2, 2, 1)):
        with pytest.raises(ValueError, match="inference mode"):
            network(images)
        with torch.no_grad():
            assert network.predict(images).shape == (1, 4, 4)
    assert functional.conv_relu(X, weight, B).shape == (1, 4, 4, 4)


def test_sums_over_processes_that_are_not_there():
    for loss in (losses.DiceLoss(sync=True), losses.DiceCrossEntropyLoss(dice_weight=0.0, sync=True)):
        with pytest.raises(ValueError, match="sync=True needs a process group"):
            loss(X, LABELS)
    with pytest.raises(ValueError, match="process_group needs a process group"):
        functional.conv_norm(X, W, B, process_group="x")


def test_training_steps():
    model = UNet(3, 3, 2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"precision is torch\.float64"):
        TrainingStep(model, losses.DiceLoss(), optimizer, precision=torch.float64)
    for loss in (lambda *_: 1.0, lambda logits, _: logits, lambda *_: torch.tensor(1.0)):
        with pytest.raises(ValueError, match="the loss is"):
            TrainingStep(model, loss, optimizer)(X, LABELS)
