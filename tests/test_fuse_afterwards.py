"""What happens to a fused module afterwards counts: hooks, other layers, copies, saved states, exports."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
import warnings
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from bench.workloads.common_unet import CommonUNet, DoubleConv
from fastunet import fuse
from tests.fuse_nets import Plain
from tests.fuse_results import make, pair, randomised, same


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


class Record:
    """An object of a class of its own."""

    def __init__(self):
        self.factors = {"y": 1.5}


OFFSET = 0.25


class Configured(nn.Module):
    """Its forward pass hangs on attributes of every kind."""

    scale, shift = 2.0, staticmethod(torch.abs)

    def __init__(self):
        super().__init__()
        self.conv, self.cfg, self.options = nn.Conv2d(1, 2, 3, padding=1), SimpleNamespace(add=-0.5), {"mul": [3.0]}
        self.act, self.record = functools.partial(nn.functional.leaky_relu, negative_slope=0.1), Record()

    def forward(self, x):
        y = torch.relu(self.conv(x)) * self.scale + OFFSET * self.record.factors["y"]
        return self.shift(self.act(y + self.cfg.add) * self.options["mul"][0])


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "scale", 3.0), lambda m: setattr(m, "shift", torch.sin),
    lambda m: setattr(m, "act", functools.partial(m.act.func, negative_slope=0.5)),
    lambda m: setattr(m.cfg, "add", -2.0), lambda m: m.options["mul"].insert(0, -1.0),
    lambda m: m.record.factors.update(y=3.0), lambda m: globals().update(OFFSET=4.0),
    lambda m: setattr(Configured, "scale", 5.0), lambda m: setattr(Configured, "forward", lambda self, x: self.conv(x)),
])  # fmt: skip
def test_what_the_forward_pass_reads_counts(change, monkeypatch):
    for name in ("scale", "forward"):
        monkeypatch.setattr(Configured, name, vars(Configured)[name])  # set back at the end
    monkeypatch.setitem(globals(), "OFFSET", OFFSET)
    fused, net = pair(Configured())
    fused.unread = 0.0
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs through its modules")
        same(fused, net, x)
    for each in (fused, net):
        change(each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fused, net, x)


FACTOR, SETTINGS = 2.0, types.ModuleType("settings")
SETTINGS.factor = 2.0


class Shared:
    """A class whose attributes code reads, and objects with slots."""

    __slots__ = ("own",)
    factor = 2.0

    def __init__(self, own):
        self.own = own

    def times(self, x):
        return x * self.own


class ByHelpers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.object, self.gamma = nn.Conv2d(1, 2, 3, padding=1), Shared(2.0), None
        self.names, self.table, self.times = {"a"}, np.array([2.0]), Shared(2.0).times
        self.register_parameter("scale", None)

    def forward(self, x):
        y = torch.relu(self.conv(x)) + self.own_factor
        y = self.object.times(y) * float(self.table[0]) * (2.0 if "a" in self.names else 3.0)
        return helped(self.times(y if self.scale is None else self.scale * y)) * (3.0 if self.gamma else 1.0)

    @property
    def own_factor(self):
        return FACTOR


def helped(x):
    return helped_again(x) * Shared.factor * SETTINGS.factor


def helped_again(x, factors={"y": 2.0}):  # noqa: B006
    return F.silu(x * FACTOR * factors["y"])


@pytest.mark.parametrize("change", [
    lambda m, p: p.setitem(globals(), "FACTOR", 3.0), lambda m, p: p.setattr(SETTINGS, "factor", 3.0),
    lambda m, p: p.setattr(Shared, "factor", 3.0), lambda m, p: p.setitem(helped_again.__defaults__[0], "y", 3.0),
    lambda m, p: p.setitem(globals(), "helped_again", torch.tanh), lambda m, p: p.setattr(F, "silu", torch.tanh),
    lambda m, p: p.setattr(Shared, "times", lambda self, x: x + 1), lambda m, p: setattr(m.object, "own", 3.0),
    lambda m, p: setattr(m, "times", Shared(3.0).times), lambda m, p: m.names.clear(),
    lambda m, p: m.table.fill(3.0), lambda m, p: setattr(m, "scale", nn.Parameter(torch.tensor(3.0).double())),
    lambda m, p: p.setattr(ByHelpers, "own_factor", 3.0),
])  # fmt: skip
def test_what_helpers_read_counts(change, monkeypatch):
    fused, net = pair(ByHelpers())
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs through its modules")
        same(fused, net, x)
    before = net(x)
    for each in (fused, net):
        change(each, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fused, net, x)
    assert not torch.equal(net(x), before)


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
    x = torch.randn(2, 1, 16, 16)
    fused = fuse(net)[0]
    with torch.no_grad():
        want = net(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
        assert inspect.signature(fused.forward) == inspect.signature(net.forward)
        program = torch.export.export(fused, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}).module()
        torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-5)


def test_it_is_not_scripted():
    for module in (fuse(Plain())[0], nn.Sequential(fuse(Plain())[0])):
        with pytest.raises(ValueError, match=r"a fused Plain is not for TorchScript: script what it was fused from"):
            torch.jit.script(module)


Maps = namedtuple("Maps", "logits features")


@pytest.mark.parametrize("made", [lambda **maps: OrderedDict(maps), Maps, dict, lambda **maps: [*maps.values()]])
def test_results_have_the_class_and_the_memory_format_of_the_module(made):
    class Net(CommonUNet):
        def forward(self, x):
            return made(logits=super().forward(x), features=self.inc(x))

    fused, net = pair(Net().float())
    x = torch.randn(2, 1, 18, 18)
    for memory in (torch.contiguous_format, torch.channels_last):
        images = x.to(memory_format=memory)[..., 1:-1, 1:-1]
        got, want = (each.float().to(memory_format=memory)(images) for each in (fused, net))
        assert type(got) is type(want)
        for one, other in zip(*(each.values() if isinstance(each, dict) else each for each in (got, want))):
            assert one.stride() == other.stride()
