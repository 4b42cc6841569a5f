"""``fastunet.fuse`` on networks drawn at random."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from fastunet import fuse
from tests.fuse_results import outcome, randomised, same

WORDS = st.lists(st.sampled_from([
    "conv", "conv", "valid", "stride", "conv1", "batch", "instance", "group", "relu", "inplace", "leaky", "F.relu",
    "tanh", "pool", "dropout", "identity", "transpose", "up2", "keep", "cat", "add",
]), min_size=2, max_size=9)  # fmt: skip


class Random(nn.Module):
    """Layers and functions by a list of words; "keep" remembers a map that "cat" and "add" take up again."""

    def __init__(self, words):
        super().__init__()
        self.words, self.layers, channels, kept = words, nn.ModuleList(), 2, 2
        for word in words:
            other = channels + kept if word == "cat" else channels
            layer = {
                "conv": lambda c: nn.Conv2d(c, 4, 3, padding=1), "valid": lambda c: nn.Conv2d(c, 4, 3, bias=False),
                "stride": lambda c: nn.Conv2d(c, 6, 3, 2, 1), "conv1": lambda c: nn.Conv2d(c, 4, 1),
                "batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "group": lambda c: nn.GroupNorm(2, c),
                "relu": lambda c: nn.ReLU(), "inplace": lambda c: nn.ReLU(inplace=True),
                "leaky": lambda c: nn.LeakyReLU(0.2, inplace=True), "pool": lambda c: nn.MaxPool2d(2),
                "dropout": lambda c: nn.Dropout(0.0), "identity": lambda c: nn.Identity(),
                "transpose": lambda c: nn.ConvTranspose2d(c, 4, 2, 2), "up2": lambda c: nn.Conv2d(c, 4, 2),
                "cat": lambda c: nn.Conv2d(c, 4, 3, padding=1), "tanh": lambda c: nn.Tanh(),
            }.get(word, lambda c: nn.Identity())(other)  # fmt: skip
            self.layers.append(layer)
            channels = getattr(layer, "out_channels", channels)
            kept = channels if word == "keep" else kept
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        kept = x
        for word, layer in zip(self.words, self.layers):
            if word == "keep":
                kept = x
            elif word in ("cat", "add"):
                again = F.interpolate(kept, size=x.shape[2:])
                x = layer(torch.cat([again, x], 1)) if word == "cat" else x + again.mean(1, keepdim=True)
            elif word == "F.relu":
                x = F.relu(x)
            elif word == "up2":
                x = layer(F.pad(F.interpolate(x, scale_factor=2), (0, 1, 0, 1)))
            else:
                x = layer(x)
        return self.head(x)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(WORDS, st.booleans())
def test_random_networks_give_what_they_gave(words, training):
    torch.manual_seed(0)
    net = randomised(Random(words).double()).train(training)
    x = torch.randn(2, 2, 20, 18, dtype=torch.float64)
    try:
        outcome(copy.deepcopy(net), x)
    except (RuntimeError, ValueError):  # maps that vanish, or gradients that PyTorch refuses: no network of anyone
        reject()
    same(fuse(net)[0], net, x)
