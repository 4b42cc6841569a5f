"""Every operator once on small ragged and aligned shapes: the program that compute-sanitizer watches."""

from __future__ import annotations

import torch

from fastunet.architecture import Architecture
from fastunet.inspection.layers import Call, network_calls, standalone_calls

NETWORKS = (
    (Architecture(width=16, depth=1), (12, 20)),
    (Architecture(width=24, depth=1, in_channels=3, num_classes=5), (10, 14)),
    (Architecture.from_preset("isbi", width=64, depth=1), (28, 36)),
    (Architecture.from_preset("isbi", width=33, depth=1), (28, 28)),
)
DTYPES = (torch.bfloat16, torch.float32)


def small_calls() -> list[Call]:
    """One call of each operator and argument shape of the small networks."""
    found = []
    for network, (height, width) in NETWORKS:
        found += network_calls(network, 2, height, width)
        found += network_calls(network, 2, height, width, training=False, output="labels")
        found += standalone_calls(network, 2, height, width)
    return list({f"{call.operator} {call.arguments}": call for call in found}.values())


def main(device: str = "cuda") -> None:
    """Runs them all once."""
    for dtype in DTYPES:
        for call in small_calls():
            call.launcher()(*call.random(dtype, device))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
