"""``fastunet.fuse``: modules of other people give what they gave, in outputs, gradients and statistics, or raise."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import fastunet
from bench.workloads.common_unet import CommonUNet, DoubleConv
from fastunet import fuse
from tests.fuse_nets import NETS, Plain
from tests.tolerance import assert_within_budget

REFUSED = "nothing to fuse"


def randomised(net: nn.Module) -> nn.Module:
    """Biases, norms and running statistics that are not 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5))
    return net


def outcome(net: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
    """Outputs, gradients of images and parameters, and buffers, of some steps."""
    found = {}
    for step in range(steps):
        net.zero_grad(set_to_none=True)
        images = x.clone().requires_grad_()
        outputs = net(images)
        for index, y in enumerate(outputs if isinstance(outputs, list | tuple) else [outputs]):
            found[f"output {step} {index}"] = y.detach().clone()
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape)
            (y * weights).sum().backward(retain_graph=True)
        found[f"d images {step}"] = images.grad
        found |= {f"d {name} {step}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        found |= {f"{name} {step}": b.clone() for name, b in net.named_buffers()}
    return found


def same(fused: nn.Module, net: nn.Module, x: torch.Tensor) -> None:
    got, want = outcome(fused, x), outcome(net, x)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-9 * (1 + tensor.abs().max().item()), msg=told)


def pair(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module in float64, and its fused copy."""
    net = randomised(net.double())
    return fuse(net)[0], net


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = NETS[name]
    package = {"MONAI": "monai", "nnU-Net": "dynamic_network_architectures"}.get(name.split()[0])
    if package:
        pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    return build(), torch.randn(shape, dtype=torch.float64)


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
    net, x = make(name)
    net = randomised(net).to(dtype)
    x = x.to(dtype)
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


# What must be right or left alone ----------------------------------------------------------------


class Code(nn.Module):
    """Layers conv, conv2 (4 → 4), norm, relu, and a forward pass of one's own."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.code = forward

    def forward(self, x):
        return self.code(self, x)


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


CODE = {
    "a result with two users": Code(two_users),
    "a skip written in place": Code(written_between, wide=nn.Conv2d(8, 4, 3, padding=1)),
    "an alias written in place": Code(written_alias),
    "three maps concatenated": Code(three_in_a_row, wide3=nn.Conv2d(12, 4, 3, padding=1)),
    "concatenated over the width": Code(over_width),
    "a layer called twice": Code(called_twice),
    "a norm called twice": Code(norm_called_twice),
    "LeakyReLU of each kind": Code(leaky, up=nn.Conv2d(4, 4, 2), leaky=nn.LeakyReLU(0.3)),
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
    assert ("conv2", "has hooks or a forward of its own") in [(left.layer, left.reason) for left in report.left]
    same(net, plain, torch.randn(1, 1, 8, 8, dtype=torch.float64))


def follows_training(m, x):
    return m.head(F.dropout(F.relu(m.conv(x)), 0.5, m.training))


def without_gradients(m, x):
    with torch.no_grad():
        y = F.relu(m.conv(x))
    return m.head(y)


def keeps(m, x):
    m.last = F.relu(m.conv(x))
    return m.head(m.last)


def makes(m, x):
    return m.head(F.relu(m.conv(x)) * torch.rand(1).double())


def asks(m, x):
    return m.head(F.relu(m.conv(x)) if isinstance(x, torch.Tensor) else x)


@pytest.mark.parametrize("code", [follows_training, without_gradients, keeps, makes, asks])
def test_code_whose_path_may_be_another_is_not_followed(code):
    net = Code(code)
    before = dict(net.__dict__)
    with pytest.raises(ValueError, match=REFUSED):
        fuse(net, inplace=True)
    assert type(net) is Code
    assert net.__dict__ == before


def test_optional_arguments_run_the_module_itself():
    class Net(Plain):
        def forward(self, x, scale=None):
            y = super().forward(x)
            return y if scale is None else scale * y

    fused, net = pair(Net())
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    same(fused, net, x)
    torch.testing.assert_close(fused(x, 3.0), 3 * net(x))
    torch.testing.assert_close(fused(x=x), net(x))
    with pytest.raises(TypeError, match="wrong"):
        fused(x, wrong=1)


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


# What happens to the module afterwards -----------------------------------------------------------


def halved(module, inputs, output):
    return output * 0.5


def hook(net):
    net.inc.double_conv[0].register_forward_hook(halved)


def block_hook(net):
    net.downs[0][1].register_forward_hook(halved)


def root_hook(net):
    net.register_forward_hook(halved)


def backward_hook(net):
    net.outc.register_full_backward_hook(lambda m, into, out: (3 * into[0],))


def patched(net):
    net.ups[0].conv.forward = lambda x: DoubleConv.forward(net.ups[0].conv, x) + 1


def another_layer(net):
    torch.manual_seed(1)
    net.inc.double_conv[2] = nn.GELU()
    net.downs[1][1].double_conv[3] = nn.Conv2d(16, 16, 5, padding=2).double()


def appended(net):
    net.inc.double_conv.append(nn.Tanh())


def inserted(net):
    net.downs[1] = nn.Sequential(net.downs[1], nn.Tanh())


def other_settings(net):
    net.inc.double_conv[3].padding_mode = "circular"
    net.inc.double_conv[3]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def parametrised(net):
    parametrizations.weight_norm(net.downs[0][1].double_conv[0])


def swapped(net):
    net.outc.weight = nn.Parameter(net.outc.weight.detach() * 2)
    net.outc.bias = None


def frozen_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def moved(net):
    net.to(memory_format=torch.channels_last)


AFTERWARDS = [hook, block_hook, root_hook, backward_hook, patched, another_layer, appended, inserted, other_settings,
              parametrised, swapped, frozen_norms, moved]  # fmt: skip


@pytest.mark.parametrize("change", AFTERWARDS, ids=lambda f: f.__name__)
def test_what_is_done_afterwards_counts(change):
    fused, net = pair(CommonUNet())
    for each in (fused, net):
        change(each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fused, net, torch.randn(2, 1, 12, 12, dtype=torch.float64))


def test_a_flag_of_a_module_counts():
    package = pytest.importorskip("dynamic_network_architectures", reason="dynamic-network-architectures is missing")
    assert package
    fused, net = pair(make("nnU-Net PlainConvUNet, deep supervision")[0])
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    for each in (fused, net):
        each.decoder.deep_supervision = False
    with pytest.warns(UserWarning, match="deep_supervision"):
        same(fused, net, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_their_own(copied):
    fused, net = pair(CommonUNet())
    other = copied(fused)
    assert type(other) is type(fused)
    assert isinstance(other, CommonUNet)
    with torch.no_grad():
        for a, b in zip(other.parameters(), fused.parameters()):
            assert a.data_ptr() != b.data_ptr()
            b.zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs through its modules")
        same(other, net, torch.randn(1, 1, 16, 16, dtype=torch.float64))


def test_a_saved_module_and_state_dicts_load_both_ways():
    fused, net = pair(CommonUNet())
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    net.load_state_dict(loaded.state_dict())
    fused.load_state_dict(net.state_dict())
    same(loaded, net, torch.randn(1, 1, 16, 16, dtype=torch.float64))


def test_dropout_drops_in_training_only():
    net = Code(dropout_then_norm, dropout=nn.Dropout2d(0.5)).double()
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


def test_inplace_keeps_the_object_and_else_the_module_stays():
    net = Plain()
    fused, _ = fuse(net)
    assert fused is not net
    assert type(net) is Plain
    assert fuse(net, inplace=True)[0] is net
    assert isinstance(net, Plain)
    assert net.training


def test_it_compiles_as_a_whole_and_exports():
    net = randomised(CommonUNet()).eval()
    x = torch.randn(1, 1, 16, 16)
    fused = fuse(net)[0]
    with torch.no_grad():
        want = net(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
        program = torch.export.export(fused, (x,)).module()
        torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-5)


def test_results_have_the_memory_format_of_the_module():
    net = CommonUNet()
    fused = fuse(net)[0]
    x = torch.randn(2, 1, 16, 16)
    assert fused(x).is_contiguous()
    assert fused.to(memory_format=torch.channels_last)(x).is_contiguous(memory_format=torch.channels_last)


# What is refused ---------------------------------------------------------------------------------


def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))


def two_devices():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, device="meta"), nn.ReLU())


def quantised():
    from torch.ao.nn.quantized.dynamic import Linear

    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Linear(2, 2))


@pytest.mark.parametrize(("module", "error", "said"), [
    ("model.pt", TypeError, r"fuse takes a torch\.nn\.Module, not a str"),
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
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(module, error, said):
    module = module() if callable(module) and not isinstance(module, nn.Module) else module
    before = type(module)
    with pytest.raises(error, match=said) as refused:
        fuse(module, inplace=True)
    assert type(module) is before
    assert "\n" not in str(refused.value)
