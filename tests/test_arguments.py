"""What ``checked`` refuses and takes; ``tests/faults/arguments.py`` asks every public function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fastunet import UNet, functional, reference
from fastunet.arguments import checked

X = torch.zeros(2, 2)
NESTED = torch.nested.nested_tensor([X, X])


@checked
def takes(
    whole: int = 0,
    real: float = 0.0,
    flag: bool = False,
    text: str | None = None,
    tensor: torch.Tensor = X,
    array: np.ndarray | Sequence[int] = (),
    names: Sequence[str] = (),
    path: str | Path = "",
    pair: tuple[int, str] = (0, ""),
    many: tuple[int, ...] = (),
    table: Mapping[str, Iterable[int]] | None = None,
    once: Iterable[int] = (),
    **options: int,
):
    return dict(locals())


class Table:
    """What shows itself in several lines."""

    def __repr__(self):
        return "a  b\n1  2"


@pytest.mark.parametrize(("name", "value", "error"), [
    ("whole", True, TypeError), ("whole", 1.0, TypeError), ("whole", X, TypeError), ("whole", 2**63, ValueError),
    ("whole", np.uint64(2**64 - 1), ValueError), ("whole", "1", TypeError), ("whole", None, TypeError),
    ("real", float("nan"), ValueError), ("real", np.float32("inf"), ValueError), ("real", 10**400, ValueError),
    ("real", 1j, TypeError), ("real", X, TypeError), ("real", False, TypeError), ("flag", 1, TypeError),
    ("real", 2**63, ValueError), ("real", Fraction(10**400), ValueError),
    ("tensor", X.to(torch.float8_e5m2), ValueError),
    ("tensor", torch.nn.UninitializedParameter(), ValueError), ("tensor", NESTED, ValueError),
    ("text", b"x", TypeError), ("tensor", [1.0], TypeError), ("tensor", X.numpy(), TypeError),
    ("tensor", X.to_sparse(), ValueError), ("tensor", torch.nested.nested_tensor([X]), ValueError),
    ("tensor", X.to(torch.complex64), ValueError),
    ("array", X, TypeError), ("array", np.array(["x"]), ValueError), ("array", [0.5], TypeError),
    ("names", "flair", TypeError), ("names", [1], TypeError), ("path", b"x", TypeError), ("path", 1, TypeError),
    ("path", "a\0b", ValueError), ("path", Path("a\0b"), ValueError), ("path", "\ud800", ValueError),
    ("pair", (1,), ValueError), ("pair", ("", 1), TypeError), ("many", [1, 1.5], TypeError),
    ("table", {"a": 1}, TypeError), ("table", {1: [1]}, TypeError), ("table", {"a": [None]}, TypeError),
    ("table", {"a": X.sum()}, TypeError), ("names", [[["x" * 9] * 9] * 9] * 9, TypeError),
    ("once", iter([1, "a"]), TypeError), ("whole", torch.nn.Sequential(torch.nn.ReLU()), TypeError),
    ("text", Table(), TypeError),
])  # fmt: skip
def test_refused_with_name_and_value(name, value, error):
    shown = "tensor" if isinstance(value, torch.Tensor) else "array" if isinstance(value, np.ndarray) else ""
    with pytest.raises(error, match=rf"^takes: {name} is .*{shown}.*; expected ") as caught:
        takes(**{name: value})
    assert len(str(caught.value)) < 600


def test_taken_with_numbers_of_numpy_as_those_of_python():
    given = takes(
        np.int64(3), np.float32(0.5), np.bool_(True), names=["a"], path=Path("x"), many=[1], table={"a": (1, 2)}
    )
    assert [type(given[name]) for name in ("whole", "real", "flag")] == [int, float, bool]
    assert takes(real=1)["real"] == 1
    assert takes(once=(i for i in range(3)))["once"] == (0, 1, 2)


def test_a_class_is_checked_and_its_instances_are_its_own():
    with pytest.raises(TypeError, match="UNet: width is '4'; expected int"):
        UNet(width="4")
    with pytest.raises(ValueError, match="UNet: dropout is nan"):
        UNet(width=4, dropout=float("nan"))
    assert type(UNet(width=np.int64(4), depth=1)) is UNet


def test_functions_keep_limits_of_recompilation_of_their_own():
    codes = {getattr(functional, name).__code__ for name in functional.__all__}
    assert len(codes) == len(functional.__all__)
    assert functional.conv_relu.__code__.co_name == "conv_relu"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_plain_build_can_be_traced():
    """As TensorBoard's ``add_graph`` does: sizes are tensors then."""
    model, x = reference.UNet(width=4, depth=1).eval(), torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
