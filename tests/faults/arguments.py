"""Wrong arguments for every public function, class and method, found by walking the package."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import types
import typing
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import fastunet
from fastunet import data, losses, metrics
from fastunet.arguments import mismatch
from fastunet.inference import frozen, segmenter, tiles
from fastunet.training import step
from tests.data_files import brats_case
from tests.faults.trials import Deadline, Outcome, forked

MODULES = (fastunet, frozen, segmenter, tiles, step)
"""Walked with the modules that they list in ``__all__``."""
WORDS = ["auto", "torch", "triton", "same", "valid", "logits", "labels", "batch", "sample", "smooth", "skip", "one",
         "mean", "sum", "error", "zero", "brats", "isbi", "brats2021", "flair", "x", "x.nii", "x.h5", "x.keras", "",
         "a\0b", "\ud800"]  # fmt: skip
SCALARS = [None, True, False, 0, 1, 2, -1, 300, 10**12, 2**63, 10**400, 0.5, 1.5, -1.0, float("nan"), float("inf"),
           b"x", 1j, [], [1.0], [0, 1], ["flair"], {}, {"a": [0]}, (1, 2), (16, 16, 16), object(), repr,
           np.float32(0.5), np.int64(1), np.bool_(True), np.uint64(2**64 - 1), np.str_("same")]  # fmt: skip
CPU_SECONDS, MEMORY = 20, 4 << 30
_REPLACED = {
    "fastunet.data.phantoms.phantom": lambda *_: (np.zeros((4, 2, 2, 2), np.int16), np.zeros((2, 2, 2), np.uint8)),
    "fastunet.data.cells.cells": lambda *_: (np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8)),
    "fastunet.data.cells.range": lambda count: range(min(count, 3)),
    "fastunet.data.phantoms.range": lambda count: range(min(count, 3)),
    "torch.onnx.export": unittest.mock.Mock(side_effect=ValueError("exporting takes seconds")),
}  # fmt: skip
"""What takes seconds once the arguments are found right, and something in its place."""


def campaign(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """Only ValueError, TypeError, and what a docstring names, may come of any values in any places."""
    warnings.simplefilter("ignore")
    outcome, pool = Outcome("wrong arguments of every public function, class and method"), _pool(work)
    functions = dict(_public(pool))
    _call_wrongly(work, "", lambda x: x, pool, 100, seed)  # hypothesis reads our source once, for all children
    for name, function in functions.items():
        if not time:
            break
        calls = math.ceil(1.25 * trials / len(functions))  # some functions have no more ways to be called
        # In a child: a call that hangs or ends the process is a loss like any other.
        answer = forked(lambda: _call_wrongly(work, name, function, pool, calls, seed), CPU_SECONDS, MEMORY)  # noqa: B023
        if not answer.startswith("{"):
            outcome.add("", f"{name}: {answer}")
            continue
        child = Outcome(**json.loads(answer))
        outcome.lost += child.lost
        for kind, count in child.counts.items():
            outcome.counts[kind] = outcome.counts.get(kind, 0) + count
    return outcome


def _pool(work: Path) -> list[Any]:
    """Values of every kind: some fit a parameter, most do not."""
    x = torch.randn(2, 3, 6, 8)
    tensors = [x, x[0], x[None], x[:0], x[:, :0], torch.tensor(1.0), x.long(), x > 0, x.to(torch.complex64), x.double(),
               x.half(), x.to("meta"), x.to_sparse(), x * float("nan"), torch.randn(4, 3, 3, 3), torch.randn(4),
               torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), torch.zeros(2, 6, 8, dtype=torch.long),
               torch.full((2, 6, 8), -1), torch.full((2, 6, 8), 2**40)]  # fmt: skip
    arrays = [np.zeros((3, 4, 5)), np.zeros((6, 5, 4), np.uint8), np.zeros((3, 4), np.int64), np.array(["x"]),
              np.zeros(0), np.full((2, 2), np.nan), np.zeros((3, 3, 3), complex)]  # fmt: skip
    brats_case(work / "data" / "case_0")
    case = data.discover_cases(work / "data")[0]
    net = fastunet.UNet(in_channels=3, num_classes=3, width=2, depth=1).eval()
    slices = data.SliceDataset([case], cache_dir=work / "cache")
    things = [net, fastunet.reference.UNet(width=2, depth=1), net.freeze(), torch.nn.Linear(2, 2), torch.nn.Identity(),
              torch.optim.Adam(net.parameters()), net.architecture, losses.DiceLoss(), metrics.SegmentationMetrics(3),
              case, [case], data.LABEL_MAPS["brats2021"], slices, data.CaseSlices(case),
              data.read_volume(case.files[0]), data.Augmentation(), torch.device("cpu"), torch.float16,
              net.state_dict(), shutil.copy(case.files[0], work / "copy.nii.gz"), Path("x.nii"),
              work / "data"]  # fmt: skip
    return [*tensors, *arrays, *SCALARS, *WORDS, *things]


def _public(pool: list[Any]) -> Iterator[tuple[str, Callable]]:
    """Every public function and class by name, and the public methods of those objects of ``pool`` that are ours."""
    seen, waiting = set(), list(MODULES)
    while waiting:
        module = waiting.pop(0)
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            thing = getattr(module, name)
            if isinstance(thing, types.ModuleType):
                waiting.append(thing)
            elif callable(thing) and not name.startswith("_") and thing not in seen and not _is_exception(thing):
                seen.add(thing)
                yield f"{module.__name__}.{name}", thing
    for kind, thing in {type(thing): thing for thing in pool}.items():
        if kind.__module__.startswith("fastunet"):
            for name, method in inspect.getmembers(thing, inspect.ismethod):
                ours = method.__func__.__module__.startswith("fastunet")
                if ours and (not name.startswith("_") or name in ("__call__", "__getitem__")):
                    yield f"{kind.__module__}.{kind.__name__}.{name}", method


def _is_exception(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def _call_wrongly(work: Path, name: str, function: Callable, pool: list[Any], calls: int, seed: int) -> str:
    """The outcome, as JSON; half of the values are among those that the annotations allow."""
    os.chdir(work)
    outcome = Outcome(name)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL,
                  p.VAR_KEYWORD)]  # fmt: skip
    values = {p.name: _values(function, p.name, pool) for p in parameters}
    required = {p.name: values.pop(p.name) for p in parameters if p.default is p.empty}

    @seeded(seed)
    @settings(max_examples=calls, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])  # fmt: skip
    @given(st.fixed_dictionaries(required, optional=values))
    def call(given):
        try:
            result = function(**given)
            if inspect.isgenerator(result):
                next(result, None)
            outcome.add("took them")
        except (ValueError, TypeError):
            outcome.add("ValueError or TypeError")
        except Exception as error:
            if type(error).__name__ in (inspect.getdoc(function) or ""):
                return outcome.add("the error that its docstring names")
            shown = {k: tuple(v.shape) if hasattr(v, "shape") else repr(v)[:30] for k, v in given.items()}
            outcome.add("", f"{name}: {type(error).__name__} {str(error)[:120]} for {shown}")

    with ExitStack() as stack:
        for target, stand_in in _REPLACED.items():
            stack.enter_context(unittest.mock.patch(target, stand_in, create=True))
        if inspect.isclass(function) and issubclass(function, torch.nn.Module):
            stack.enter_context(torch.device("meta"))  # a network may be as large as one likes
        call()
    return json.dumps(asdict(outcome))


def _values(function: Callable, name: str, pool: list[Any]) -> st.SearchStrategy:
    made = function.__init__ if inspect.isclass(function) else function
    try:
        hint = typing.get_type_hints(made).get(name, Any)
    except NameError:  # a name that only type checkers import
        hint = Any
    fitting = [value for value in pool if mismatch(value, hint) is None]
    return st.one_of(st.sampled_from(fitting or pool), st.sampled_from(pool))
