"""Operators on tensors that lie inside memory full of NaN."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fastunet import functional
from tests.faults.trials import Deadline, Outcome


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
