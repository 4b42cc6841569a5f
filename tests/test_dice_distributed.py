"""Two gloo processes with half of a batch each against one process with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which it would keep alive past the end
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastunet.losses import DiceCrossEntropyLoss, DiceLoss, RegionDiceCrossEntropyLoss
from fastunet.metrics import SegmentationMetrics
from tests.processes import ended, start_group

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch is built without gloo")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(2, 4, 3, padding=1).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 2, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (4, 6, 7), generator=generator)
    labels[:2, :3] = 255  # the halves count different numbers of pixels
    return images, labels


OPTIONS = dict(ignore_index=255, class_weights=[0.5, 1.0, 2.0, 3.0], empty="skip")


def losses(**sync):
    """By names; the four outputs are taken as four regions, too."""
    regions = dict(regions=[(1, 2, 3), (1, 3), (3,), (2,)], num_classes=4, ignore_index=255)
    return {
        "cross-entropy too": DiceCrossEntropyLoss(**OPTIONS, **sync),
        "Dice alone": DiceLoss(**OPTIONS, **sync),
        "regions": RegionDiceCrossEntropyLoss(**regions, **sync),
    }


def work(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(measured(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measured(rank):
    images, labels = (x[2 * rank : 2 * rank + 2] for x in batch())
    found = {}

    for name, function in losses(sync=True).items():
        model = DistributedDataParallel(network())
        loss = function(model(images), labels)
        loss.backward()
        found[name, "mean"] = loss.detach(), model.module.weight.grad
    for name, function in losses(sync=True, grad_reduction="sum").items():
        model = network()
        loss = function(model(images), labels)
        loss.backward()
        dist.all_reduce(model.weight.grad)
        found[name, "sum"] = loss.detach(), model.weight.grad

    weights = torch.linspace(0, 3, 4 * 6 * 7, dtype=torch.float64).view(4, 6, 7)
    for way, factor in (("weighted mean", 0.5), ("weighted sum", 1.0)):
        model = network()
        options = OPTIONS | dict(sync=True, grad_reduction=way.split()[1])
        loss = DiceCrossEntropyLoss(**options)(model(images), labels, weights[2 * rank : 2 * rank + 2])
        loss.backward()
        dist.all_reduce(model.weight.grad)
        found[way] = loss.detach(), factor * model.weight.grad

    labels_of_one = labels.clone()
    labels_of_one[0, 5, 5] = 9 * rank
    with pytest.raises(ValueError) as error:
        DiceCrossEntropyLoss(**OPTIONS, sync=True)(model(images), labels_of_one)
    found["wrong"] = str(error.value)

    scores = SegmentationMetrics(4, ignore_index=255)
    scores.update(model(images), labels, [f"case {rank}", "shared"])
    scores.all_reduce()
    found["metrics"] = scores.compute(), scores.compute_cases()
    return found


def test_two_processes_equal_one(tmp_path):
    assert [ended(process) for process in start_group(work, tmp_path)] == [0, 0]
    model, (images, labels) = network(), batch()
    expected = {}
    for name, function in losses().items():
        loss = function(model(images), labels)
        expected[name] = loss.detach(), torch.autograd.grad(loss, model.weight)[0]
    scores = SegmentationMetrics(4, ignore_index=255)
    scores.update(model(images), labels, ["case 0", "shared", "case 1", "shared"])
    weighted = network()
    weights = torch.linspace(0, 3, 4 * 6 * 7, dtype=torch.float64).view(4, 6, 7)
    weighted_loss = DiceCrossEntropyLoss(**OPTIONS)(weighted(images), labels, weights)
    weighted_loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (loss, gradient) in expected.items():
            for way in ("mean", "sum"):
                torch.testing.assert_close(found[name, way][0], loss, rtol=1e-12, atol=0)
                torch.testing.assert_close(found[name, way][1], gradient, rtol=1e-10, atol=1e-14)
        for way in ("weighted mean", "weighted sum"):
            torch.testing.assert_close(found[way][0], weighted_loss.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(found[way][1], weighted.weight.grad, rtol=1e-10, atol=1e-14)
        # every process stops, so that none waits for the others
        told = "1 labels are out of range, 9 among them" if rank else "labels of another process are out of range"
        assert found["wrong"].startswith(told)
        assert found["metrics"][0] == scores.compute()
        assert found["metrics"][1] == scores.compute_cases()
