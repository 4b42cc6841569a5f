"""``fastunet.fuse`` follows a forward pass only where each call goes the same way."""

from __future__ import annotations

import gc
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastunet import fuse
from tests.fuse_nets import Code, Plain
from tests.fuse_results import pair, same


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


def writes_view(m, x):
    y = F.relu(m.conv(x)) + 0
    y.flatten(2)[:, :, 3:7].zero_()
    return m.head(y)


def asks_by_is(m, x):
    return m.head(F.relu(m.conv(x)) * (2 if type(x) is torch.Tensor else 1))


def asks_dtype(m, x):
    return m.head(F.relu(m.conv(x)) * (2 if x.dtype is torch.float32 else 1))


def compares_types(m, x):
    return m.head(F.relu(m.conv(x)) * (2 if type(x) in (torch.Tensor, nn.Parameter) else 1))


def minds_gradients(m, x):
    return m.head(F.relu(m.conv(x)) * (2 if torch.is_grad_enabled() and m.training else 1))


def draws_in_python(m, x):
    return m.head(F.relu(m.conv(x)) * (1 if random.random() < 0.5 else 2))


def draws_a_number(m, x):
    return m.head(F.relu(m.conv(x)) * (1 if torch.rand(()).item() < 0.5 else 2))


def draws_by_numpy(m, x):
    return m.head(F.relu(m.conv(x)) * (1 if np.random.uniform() < 0.5 else 2))  # noqa: NPY002


def goes_on(m, x):
    try:
        size = int(x.shape[2])
    except Exception:
        size = 1
    return m.head(F.relu(m.conv(x))) * size


def goes_on_too(m, x):
    try:
        return m.head(F.relu(m.conv(x))) * (1 if x.mean() > 0 else 2)
    except Exception:
        return x


def looks_up(m, x):
    return m.head(F.relu(m.conv(x)) * {8: 1.0}.get(x.shape[2], 2.0))


def tells(m, x):
    return m.head(F.relu(m.conv(x)) * (2 if "32" in f"{x.dtype}" else 1))


def notes(m, x):
    NOTED.append(1)
    return m.head(F.relu(m.conv(x)))


def counts(m, x):
    m.record.calls["here"][0] += 1
    return m.head(F.relu(m.conv(x)))


def compares_objects(m, x):
    y = m.conv(x)
    z = F.relu(y, inplace=True)
    return m.head(z * 2 if z is y else z)


def compares_in_a_helper(m, x):
    y = m.conv(x)
    return m.head(y * (2 if same_object(F.relu_(y), y) else 1))


def same_object(a, b):
    return a is b


def compares_by_id(m, x):
    y = m.conv(x)
    return m.head(y * (2 if id(F.relu_(y)) == id(y) else 1))


def asks_for_history(m, x):
    y = F.relu(m.conv(x))
    return m.head(y if y.grad_fn is None else 2 * y)


def asks_for_a_mode(m, x):
    return m.head(F.relu(m.conv(x)) * (2 if torch.is_autocast_enabled("cpu") else 1))


def notes_in_a_helper(m, x):
    return m.head(F.relu(m.conv(x)) * noting())


def noting():
    NOTED.append(1)
    return len(NOTED)


def counts_globally(m, x):
    global COUNT
    COUNT += 1
    return m.head(F.relu(m.conv(x)) * COUNT)


def counts_in_a_class(m, x):
    Counter.count += 1
    return m.head(F.relu(m.conv(x)) * Counter.count)


def counts_in_slots(m, x):
    return m.head(F.relu(m.conv(x)) * COUNTER.up())


def counts_in_a_closure(m, x):
    return m.head(F.relu(m.conv(x)) * counted())


def counts_in_tensors(m, x):
    TENSOR.add_(1)
    ARRAY[0] += 1
    return m.head(F.relu(m.conv(x)) * float(ARRAY[0]))


class Counter:
    __slots__ = ("calls",)
    count = 0

    def __init__(self):
        self.calls = 0

    def up(self):
        self.calls += 1
        return self.calls


def closure():
    count = 0

    def up():
        nonlocal count
        count += 1
        return count

    return up


NOTED, COUNT, COUNTER, counted = [], 0, Counter(), closure()
TENSOR, ARRAY = torch.zeros(1), np.zeros(1)


@pytest.mark.parametrize("code", [
    follows_training, without_gradients, keeps, makes, asks, writes_view, asks_by_is, asks_dtype, compares_types,
    minds_gradients, draws_in_python, draws_a_number, draws_by_numpy, goes_on, goes_on_too, looks_up, tells, notes,
    counts, compares_objects, compares_in_a_helper, compares_by_id, asks_for_history, asks_for_a_mode,
    notes_in_a_helper, counts_globally, counts_in_a_class, counts_in_slots, counts_in_a_closure, counts_in_tensors,
])  # fmt: skip
def test_code_whose_path_may_be_another_is_not_followed(code):
    record = SimpleNamespace(calls={"here": [0]})
    net = type("Net", (Code,), {"forward": code})(None, record=record)
    before, kind, state = dict(net.__dict__), type(net), torch.get_rng_state()
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse(net, inplace=True)
    assert type(net) is kind
    assert net.__dict__ == before
    assert (NOTED, record.calls) == ([], {"here": [0]})
    assert (COUNT, Counter.count, COUNTER.calls, counted.__closure__[0].cell_contents, TENSOR, ARRAY) == (0,) * 6
    assert torch.equal(torch.get_rng_state(), state)


def test_what_runs_meanwhile_is_no_part_of_it():
    """Such as what counts collections of garbage, of which there are many here."""
    threshold = gc.get_threshold()
    callback = lambda phase, info: noting()  # noqa: E731
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        assert fuse(Plain())[1].fused
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
        NOTED.clear()


def test_a_pickle_that_cannot_be_followed_any_more_runs_as_it_is():
    fused, net = pair(Scaled())
    for each in (fused, net):
        each.scaled = True
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    same(pickle.loads(pickle.dumps(fused)), net, x)


class Scaled(Plain):
    scaled = False

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.scaled and x.shape[0] > 1 else y


def test_what_modules_share_stays_shared():
    class Keeps(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.layers, self.shared = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), shared

        def forward(self, x):
            self.shared[0] = y = self.layers(x)
            return y

    maps = [None]
    fused, net = pair(Code(lambda m, x: m.head(m.keeps(x)) + m.maps[0].mean(), keeps=Keeps(maps), maps=maps))
    assert fused.maps is fused.keeps.shared
    same(fused, net, torch.randn(1, 1, 6, 6, dtype=torch.float64))


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
