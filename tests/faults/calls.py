"""Wrong arguments for every public function, and tensors that lie inside memory full of NaN."""

from __future__ import annotations

import inspect
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import fastunet
from fastunet import data, functional, losses, metrics
from tests.faults.trials import Deadline, Outcome, forked

BIG = [10**12, 2**70, -1, 0, 1, 300]
SCALARS = [None, True, 1.5, float("nan"), float("inf"), "", "x", b"x", 1j, [], [1.0], {}, (1, 2), object(), print, *BIG]
ALLOWED = (ValueError, TypeError)
SECONDS, MEMORY = 20.0, 4 << 30


def _tensors() -> list[torch.Tensor]:
    x = torch.randn(2, 3, 6, 8)
    return [x, x[0], x[None], x[:0], x[:, :0], torch.tensor(1.0), x.long(), x > 0, x.to(torch.complex64), x.double(),
            x.half(), x.to("meta"), x.to_sparse(), x * float("nan"), torch.randn(4, 3, 3, 3), torch.randn(4),
            torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), torch.zeros(2, 6, 8, dtype=torch.long),
            torch.full((2, 6, 8), -1), torch.full((2, 6, 8), 2**40)]  # fmt: skip


def _functions() -> dict[str, Callable]:
    """Every public function and class of the package that takes arguments."""
    found = {}
    for module in (functional, losses, metrics, data):
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            thing = getattr(module, name)
            exception = inspect.isclass(thing) and issubclass(thing, Exception)
            if callable(thing) and not exception and not name.startswith("_"):
                found[f"{module.__name__.removeprefix('fastunet.')}.{name}"] = thing
    return found | {"UNet": fastunet.UNet, "UNet.from_preset": fastunet.UNet.from_preset}


# They write files, which wrong arguments could send anywhere; the campaigns on files try these.
WRITERS = ("write", "make_", "save", "SliceDataset", "cache")


def arguments(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """Only ValueError and TypeError may come of any values in any places."""
    warnings.simplefilter("ignore")
    outcome, tensors = Outcome("wrong arguments of every public function"), _tensors()
    arrays = [np.zeros((3, 4, 5)), np.zeros((3, 4), np.int64), np.array(["x"]), np.zeros(0), np.full((2, 2), np.nan)]
    values = st.sampled_from([*tensors, *arrays, *SCALARS])
    functions = {n: f for n, f in _functions().items() if not any(word in n for word in WRITERS)}
    for name, function in functions.items():
        if not time:
            break
        calls = -(-trials // len(functions))
        # In a child: a call that hangs or ends the process is a loss like any other.
        answer = forked(lambda: _call_wrongly(name, function, values, calls, seed), SECONDS, MEMORY)  # noqa: B023
        if not answer.startswith("{"):
            outcome.add("", f"{name}: {answer}")
            continue
        child = Outcome(**json.loads(answer))
        outcome.lost += child.lost
        for kind, count in child.counts.items():
            outcome.counts[kind] = outcome.counts.get(kind, 0) + count
    return outcome


def _call_wrongly(name: str, function: Callable, values, calls: int, seed: int) -> str:
    """The outcome, as JSON."""
    outcome = Outcome(name)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL,
                  p.VAR_KEYWORD)]  # fmt: skip
    required = {p.name: values for p in parameters if p.default is p.empty}

    @seeded(seed)
    @settings(max_examples=calls, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])  # fmt: skip
    @given(st.fixed_dictionaries(required, optional={p.name: values for p in parameters if p.name not in required}))
    def call(given):
        try:
            function(**given)
            outcome.add("took them")
        except ALLOWED:
            outcome.add("ValueError or TypeError")
        except Exception as error:
            shown = {k: tuple(v.shape) if hasattr(v, "shape") else repr(v)[:30] for k, v in given.items()}
            outcome.add("", f"{name}: {type(error).__name__} {str(error)[:120]} for {shown}")

    call()
    return json.dumps(asdict(outcome))


def guard_zones(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """Operators give for a view inside NaN-filled memory what they give for a compact copy, and leave it as it is."""
    outcome, draw = Outcome("operators on views inside memory full of NaN"), random.Random(seed)
    torch.manual_seed(seed)
    while outcome.tried < trials and time:
        n, c, k = draw.randint(1, 2), draw.randint(1, 4), draw.randint(2, 5)
        x = torch.randn(n, c, draw.randint(4, 9), draw.randint(4, 9))
        labels = torch.randint(0, k, (n, *x.shape[2:]))
        calls = {
            "conv_relu": lambda x: functional.conv_relu(x, torch.ones(k, c, 3, 3), torch.ones(k)),  # noqa: B023
            "max_pool2d": functional.max_pool2d,
            "upsample_conv_relu": lambda x: functional.upsample_conv_relu(x, torch.ones(k, c, 2, 2), torch.ones(k)),  # noqa: B023
            "conv_transpose2d": lambda x: functional.conv_transpose2d(x, torch.ones(c, k, 2, 2), torch.ones(k)),  # noqa: B023
            "segmentation_head": lambda x: functional.segmentation_head(x, torch.ones(k, c, 1, 1), torch.ones(k)),  # noqa: B023
            "dice_loss": lambda x: functional.dice_loss(x.repeat(1, k, 1, 1)[:, :k], labels),  # noqa: B023
        }
        for name, call in calls.items():
            for kind, view in _views(x):
                around = view._base.clone()
                result, wanted = call(view), call(view.clone(memory_format=torch.contiguous_format))
                same = torch.allclose(result, wanted, rtol=1e-5, atol=1e-6)
                untouched = torch.equal(around.nan_to_num(7), view._base.nan_to_num(7))
                outcome.add("equal", None if same and untouched else f"{name} on {kind} of {tuple(x.shape)}")
    return outcome


def _views(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for kind, order in (("NCHW", (0, 1, 2, 3)), ("NHWC", (0, 2, 3, 1)), ("transposed", (0, 1, 3, 2))):
        for step in (1, 2):
            storage = torch.full([s * step + 4 for s in (x.shape[i] for i in order)], float("nan"))
            inside = storage[tuple(slice(2, 2 + x.shape[i] * step, step) for i in order)]
            view = inside.permute([order.index(i) for i in range(4)])
            view.copy_(x)
            yield f"{kind}, every {step}", view


def scratch() -> Path:
    """A folder for a campaign, in memory where the system has one there: a kill costs no disk's synchronisation."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="faults-", dir=memory if memory.is_dir() else None))
