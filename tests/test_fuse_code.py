"""``fastunet.fuse`` on unusual code: what it does is right, or the code is left alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fastunet import fuse
from tests.fuse_nets import Code
from tests.fuse_results import randomised, same


def two_users(m, x):
    y = m.conv(x)
    return m.head(F.relu(y) + y)


def written_between(m, x):
    skip = m.conv(x)
    both = torch.cat([skip, torch.sigmoid(skip)], 1)
    skip.mul_(2)
    return m.head(F.relu(m.wide(both))) + skip.sum()


def written_alias(m, x):
    y = m.conv(x)
    z = y
    y += 1
    return m.head(F.relu(m.conv2(z)))


def three_in_a_row(m, x):
    y = F.relu(m.conv(x))
    return m.head(F.relu(m.wide3(torch.cat([y, y, y], 1))))


def over_width(m, x):
    y = F.relu(m.conv(x))
    return m.head(F.relu(m.conv2(torch.cat([y, y], 3))))


def over_width_too(m, x):
    y = F.relu(m.conv(x))
    return m.head(F.relu(m.conv2(torch.cat([y, torch.cat([y, y], 3)[..., :10]], 1))))


def called_twice(m, x):
    y = F.relu(m.conv2(F.relu(m.conv2(F.relu(m.conv(x))))))
    return m.head(y)


def norm_called_twice(m, x):
    return m.head(F.relu(m.norm(m.conv2(F.relu(m.norm(m.conv(x)))))))


def leaky(m, x):
    up = F.interpolate(F.leaky_relu(m.conv(x), 0.2), scale_factor=2)
    up = nn.functional.leaky_relu(m.up(F.pad(up, [0, 1, 0, 1])))
    return m.head(m.leaky(m.conv2(up)))


def norm_alone(m, x):
    return m.head(torch.tanh(m.norm(m.conv(x))))


def norm_and_pool(m, x):
    y = m.norm(m.conv(x))
    z = F.interpolate(F.max_pool2d(y, (2, 2), 2), size=y.shape[2:])
    z += m.norm2(m.conv2(F.leaky_relu(y, 0.3)))
    return m.head(z)


def norm_of_activation(m, x):
    return m.head(m.norm(F.relu(m.conv(x))))


def norm_first(m, x):
    return m.head(m.conv2(F.relu(m.norm(m.conv(x).tanh()))))


def dropout_between(m, x):
    return m.head(F.relu(m.dropout(m.conv(x))))


def dropout_then_norm(m, x):
    return m.head(F.leaky_relu(m.norm(m.dropout(m.conv(x))), negative_slope=0.2))


def flattened(m, x):
    y = F.relu(m.conv(x))
    return y.view(y.size(0), -1).cumsum(1)


def added_in_place(m, x):
    y = F.relu(m.conv(x))
    z = m.conv2(torch.cat([y[:, :2], y[:, 2:]], 1))
    z += y
    return m.head(F.relu(z))


def resized_back(m, x):
    up = F.interpolate(F.relu(m.conv(x)), scale_factor=2.0, mode="nearest")
    return m.head(F.relu(m.up(up)))


def usual(m, x):
    return m.head(F.relu(m.conv2(F.relu(m.conv(x)))))


def pooled(m, x):
    return m.head(m.pool(F.relu(m.conv(x))))


def pooled_by_a_layer(m, x):
    return m.head(m.pool(F.relu(m.norm(m.conv(x)))))


def leaky_written(m, x):
    y = F.leaky_relu(m.conv(x), 0.2)
    z = F.leaky_relu(m.conv2(y), 0.2)
    z[:, 1:].add_(y[:, 1:])
    return m.head(z)


def pooled_after_writing(m, x):
    y = m.norm(m.conv(x))
    y.add_(1).tanh_()
    return m.head(F.max_pool2d(y, 2))


def strides_asked(m, x):
    y = F.relu(m.conv(x))
    return m.head(y) * y.stride(1)


def by_keywords(m, x):
    return m.head(input=F.relu(m.conv2(F.relu(input=m.conv(input=x)))))


CODE = {
    "a function, and a pool that is a layer": Code(pooled_by_a_layer, pool=nn.MaxPool2d(2)),
    "a leaky result written in place": Code(leaky_written),
    "a result written in place before its pool": Code(pooled_after_writing),
    "called by keywords": Code(by_keywords),
    "a result with two users": Code(two_users),
    "a skip written in place": Code(written_between, wide=nn.Conv2d(8, 4, 3, padding=1)),
    "an alias written in place": Code(written_alias),
    "three maps concatenated": Code(three_in_a_row, wide3=nn.Conv2d(12, 4, 3, padding=1)),
    "concatenated over the width": Code(over_width),
    "a layer called twice": Code(called_twice),
    "a norm called twice": Code(norm_called_twice),
    "LeakyReLU of each kind": Code(leaky, up=nn.Conv2d(4, 4, 2), leaky=nn.LeakyReLU(0.3)),
    "a slope of True": Code(leaky, up=nn.Conv2d(4, 4, 2), leaky=nn.LeakyReLU(True)),
    "a negative slope": Code(leaky, up=nn.Conv2d(4, 4, 2), leaky=nn.LeakyReLU(-0.3)),
    "a norm before its convolution": Code(norm_first),
    "a norm behind the activation": Code(norm_of_activation),
    "a norm and no activation": Code(norm_alone),
    "a norm, a pool and another slope": Code(norm_and_pool, norm2=nn.GroupNorm(2, 4)),
    "a norm without statistics": Code(norm_alone, norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "a norm without parameters": Code(norm_alone, norm=nn.BatchNorm2d(4, affine=False, eps=1e-3, momentum=0.3)),
    "a norm of averages": Code(norm_alone, norm=nn.BatchNorm2d(4, momentum=None)),
    "an instance norm without parameters": Code(norm_alone, norm=nn.InstanceNorm2d(4)),
    "an instance norm with statistics": Code(norm_alone, norm=nn.InstanceNorm2d(4, track_running_stats=True)),
    "a synchronised norm": Code(norm_alone, norm=nn.SyncBatchNorm(4)),
    "a norm without a parameter": Code(norm_alone, norm=nn.GroupNorm(4, 4, affine=False)),
    "dropout before a norm": Code(dropout_then_norm, dropout=nn.Dropout2d(0.0)),
    "dropout of nothing between": Code(dropout_between, dropout=nn.Dropout(0.0)),
    "a view of the result": Code(flattened),
    "a sum in place": Code(added_in_place),
    "upsampling before 3×3": Code(resized_back, up=nn.Conv2d(4, 4, 3, padding=1)),
    "upsampling before 2×2 without padding": Code(resized_back, up=nn.Conv2d(4, 4, 2)),
    "dilated": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
    "grouped": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "reflected": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "strided, a norm and a pool": Code(norm_and_pool, conv=nn.Conv2d(1, 4, 3, padding=1, stride=2),
                                       norm2=nn.GroupNorm(2, 4)),
    "strided behind a concatenation": Code(over_width_too, conv2=nn.Conv2d(8, 4, 3, padding=1, stride=2)),
    "strided 2×1": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=1, stride=(2, 1))),
    "strided": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=1, stride=2)),
    "padded one way": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=(1, 0))),
    "5×5": Code(usual, conv2=nn.Conv2d(4, 4, 5, padding=2)),
    "valid": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding="valid"), conv=nn.Conv2d(1, 4, 3)),
    "without bias": Code(usual, conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    "its own strides": Code(strides_asked),
    "new spectral norm": Code(usual, conv2=parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))),
    "new weight norm": Code(usual, conv2=parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))),
    "pool of 3": Code(pooled, pool=nn.MaxPool2d(3)),
    "overlapping pool": Code(pooled, pool=nn.MaxPool2d(2, stride=1)),
    "padded pool": Code(pooled, pool=nn.MaxPool2d(2, padding=1)),
    "pool that rounds up": Code(pooled, pool=nn.MaxPool2d(2, ceil_mode=True)),
    "usual pool": Code(pooled, pool=nn.MaxPool2d((2, 2), (2, 2))),
    "average pool": Code(pooled, pool=nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CODE)
def test_unusual_code_is_right_or_left_alone(name, training):
    torch.manual_seed(0)
    net = randomised(copy.deepcopy(CODE[name]).double()).train(training)
    x = torch.randn(2, 1, 9, 10, dtype=torch.float64)
    if name == "a skip written in place":  # PyTorch refuses its gradients
        net.requires_grad_(False)
        with torch.no_grad():
            torch.testing.assert_close(fuse(net)[0](x), net(x))
        return
    same(fuse(net)[0], net, x)


def test_what_cannot_be_copied_is_fused_in_place():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, net = (randomised(Code(usual).double()) for _ in range(2))
        for each in (plain, net):
            nn.utils.weight_norm(each.conv2)
        net.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"the module cannot be copied .*: pass inplace=True"):
        fuse(net)
    report = fuse(net, inplace=True)[1]
    assert [step.layers for step in report.fused] == [("conv",), ("head",)]
    assert ("conv2", "has hooks") in [(left.layer, left.reason) for left in report.left]
    same(net, plain, torch.randn(1, 1, 8, 8, dtype=torch.float64))


def draws(m, x):
    y = m.dropout(F.relu(m.conv2(F.relu(m.conv(x)))))
    return m.head(F.relu(m.dropout(m.conv2(y))))


@pytest.mark.parametrize(("code", "dropout"), [
    (dropout_then_norm, nn.Dropout2d(0.5)), (draws, nn.Dropout(0.5)), (draws, nn.AlphaDropout(0.5)),
])  # fmt: skip
def test_dropout_drops_in_training_only_and_in_the_order_of_the_layers_memory(code, dropout):
    net = Code(code, dropout=dropout).double()
    fused = fuse(net)[0]
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for each in (fused, net):
        torch.manual_seed(3)
        each.train()
        each.last = each(x), each(x)
    for got, want in zip(fused.last, net.last):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (fused.last[0] - fused.last[1]).abs().max() > 1e-3
    same(fused.eval(), net.eval(), x)


def doubled(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("change", [
    lambda m: setattr(m.up, "scale_factor", 3), lambda m: setattr(m.up, "mode", "bilinear"),
    lambda m: m.up.register_forward_hook(doubled), lambda m: m.pad.register_forward_hook(doubled),
    lambda m: setattr(m.pad, "padding", (1, 0, 1, 0)), lambda m: setattr(m.conv2, "padding", "same"),
    lambda m: setattr(m, "up", nn.UpsamplingBilinear2d(scale_factor=2)),
])  # fmt: skip
def test_what_is_done_to_upsampling_and_padding_counts(change):
    layers = dict(up=nn.Upsample(scale_factor=2), pad=nn.ZeroPad2d((0, 1, 0, 1)), conv2=nn.Conv2d(4, 4, 2))
    net = randomised(Code(lambda m, x: torch.relu(m.conv2(m.pad(m.up(m.conv(x))))), **layers).double())
    fused = fuse(net)[0]
    for each in (fused, net):
        change(each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fused, net, torch.randn(1, 1, 6, 6, dtype=torch.float64))
