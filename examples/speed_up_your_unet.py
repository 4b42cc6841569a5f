"""Speed up a U-Net that you already have: python examples/speed_up_your_unet.py

`fastunet.fuse` puts fused operators where a module convolves, normalises, activates, pools, upsamples and concatenates.
Weights, `state_dict` and results stay; the report says what was fused and what was not, and why.
"""

import time

import torch
from torch import nn

import fastunet


def block(channels_in: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (channels_in, channels):
        layers += [nn.Conv2d(size, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


class YourUNet(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.down, self.pool, self.bottom = block(1, width), nn.MaxPool2d(2), block(width, 2 * width)
        self.up, self.merge = nn.ConvTranspose2d(2 * width, width, 2, stride=2), block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        x = self.up(self.bottom(self.pool(skip)))
        return self.head(self.merge(torch.cat([skip, x], dim=1)))


@torch.no_grad()
def milliseconds(model: nn.Module, x: torch.Tensor, repeats: int = 5) -> float:
    model(x)
    start = time.perf_counter()
    for _ in range(repeats):
        model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yours = YourUNet().to(device, memory_format=torch.channels_last).eval()
    fused, report = fastunet.fuse(yours)
    print(report)
    x = torch.randn(2, 1, 128, 128, device=device).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), yours(x), rtol=1e-3, atol=1e-4)
    fused.load_state_dict(yours.state_dict())  # the same keys, both ways
    print(f"yours {milliseconds(yours, x):.1f} ms, fused {milliseconds(fused, x):.1f} ms")
