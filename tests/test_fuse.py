"""``fastunet.fuse``: modules of other people give what they gave, in outputs, gradients and statistics, or raise."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastunet
from fastunet import fuse
from tests.fuse_nets import NETS, Plain
from tests.fuse_results import make, outcome, pair, randomised, same
from tests.tolerance import assert_within_budget


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_a_network_gives_what_it_gave(name, training):
    net, x = make(name)
    fused, net = pair(net.train(training))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs through its modules")
        same(fused, net, x)
    assert list(fused.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "batch norm, transposed", "nnU-Net PlainConvUNet"])
def test_errors_in_smaller_dtypes_are_those_of_pytorch(name, dtype):
    """Of PyTorch in the memory format of the operators: some processors sum less exactly in it."""
    net, x = make(name)
    net = randomised(net).to(dtype=dtype, memory_format=torch.channels_last)
    x = x.to(dtype=dtype, memory_format=torch.channels_last)
    exact = outcome(copy.deepcopy(net).double(), x.double(), steps=1)
    plain, got = outcome(copy.deepcopy(net), x, steps=1), outcome(fuse(net)[0], x, steps=1)
    for kind in ("output", "d images", "d ") if name == "plain" else ("output", "d images"):
        values = [torch.cat([v.flatten() for key, v in each.items() if key.startswith(kind)])
                  for each in (got, plain, exact)]  # fmt: skip
        assert_within_budget(*values, kind)


def test_the_report_names_every_step_and_what_is_left():
    report = fuse(Plain())[1]
    assert [(step.pattern, step.layers) for step in report.fused] == [
        ("conv 3×3 + ReLU", ("conv1",)),
        ("conv 3×3 + ReLU + max-pool", ("conv2",)),
        ("conv 3×3 + ReLU", ("conv3", "relu")),
        ("conv 3×3 + ReLU", ("conv4",)),
        ("upsampling ×2 + conv 2×2 + ReLU", ("up",)),
        ("upsampling ×2 + conv 2×2 + ReLU", ("up2", "relu")),
        ("cat + conv 3×3 + ReLU", ("conv5",)),
        ("conv 1×1", ("head",)),
    ]
    assert report.left == ()
    assert str(report).splitlines()[0] == "8 fused steps stand for 10 layers; 0 parts are left as they are"


def test_a_part_that_cannot_be_followed_stays_and_its_children_are_fused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            self.last = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            if x.shape[2] > 8:
                x = x[:, :, ::2]
            return F.relu(self.last(self.inside(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.part = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), Branching()

        def forward(self, x):
            return self.part(self.first(x))

    fused, net = pair(Net())
    for side in (8, 20):
        same(fused, net, torch.randn(1, 1, side, 9, dtype=torch.float64))
    report = fuse(net)[1]
    assert [step.layers for step in report.fused] == [("first.0", "first.1"), ("part.inside.0", "part.inside.1")]
    assert [(left.layer, left.kind) for left in report.left] == [("part", "Branching"), ("part.last", "Conv2d")]
    assert report.left[0].reason == "it branches on its input, or loops over it"


REFUSED = "nothing to fuse"


def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))


def two_devices():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, device="meta"), nn.ReLU())


def quantised():
    from torch.ao.nn.quantized.dynamic import Linear

    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Linear(2, 2))


def hooked():
    net = Plain()
    net.register_forward_hook(lambda module, inputs, output: output)
    return net


@pytest.mark.parametrize(("module", "error", "said"), [
    ("model.pt", TypeError, r"fuse: module is 'model.pt'; expected nn.Module"),
    (nn.Linear(2, 2), ValueError, r"there is nothing to fuse: no 2-D convolutions"),
    (nn.Sequential(nn.Conv2d(1, 2, 5), nn.ReLU()), ValueError, r"there is nothing to fuse \(0: it is 5×5, not 3×3\)"),
    (nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()), ValueError, REFUSED),
    (scripted, ValueError, "fuse the module before it is scripted"),
    (two_devices, ValueError, r"lies on several devices: 0\.weight on cpu and 2\.weight on meta"),
    (quantised, ValueError, "there are no operators for quantised layers"),
    (lambda: torch.compile(Plain()), ValueError, "fuse the module before it is compiled"),
    (lambda: fuse(Plain())[0], ValueError, REFUSED),
    (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(8), nn.ReLU()), ValueError,
     "1 is in a wrong place behind 0: it is made for 8 channels, and the convolution gives 4"),
    (lambda: fastunet.UNet(width=4, depth=1), ValueError, REFUSED),
    (hooked, ValueError, r"there is nothing to fuse \(conv1: the module has hooks; conv2"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(module, error, said):
    module = module() if callable(module) and not isinstance(module, nn.Module) else module
    before = type(module)
    with pytest.raises(error, match=said) as refused:
        fuse(module, inplace=True)
    assert type(module) is before
    assert "\n" not in str(refused.value)
