"""Overlap-tile equals one pass over the whole mirrored image, whatever the tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastunet import UNet, reference
from fastunet.data.slices import mirror
from fastunet.errors import UserError
from fastunet.inference.tiles import border_width, segment_tiled

VALID = dict(in_channels=1, num_classes=3, width=3, depth=2, padding="valid", up="transpose")
SAME = dict(in_channels=1, num_classes=3, width=3, depth=2)


def with_whole_numbers(model: torch.nn.Module) -> torch.nn.Module:
    """Gives ``model`` sparse weights of -1, 0 and 1, with which float32 sums of whole numbers are exact in any order.

    Convolution libraries choose algorithms by size, so ordinary weights agree only to the last bits.
    """
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        draw = torch.rand(parameter.shape, generator=generator)
        parameter.data = (draw < 0.12).float() - (draw > 0.92).float()
    return model.eval()


def assemble(model, image: torch.Tensor, tile: int | None, output=None) -> torch.Tensor:
    """The tiles of ``image`` put together, after checking that each pixel comes once."""
    height, width = image.shape[-2:]
    counts, result = torch.zeros(height, width), None
    with torch.inference_mode():
        for rows, columns, part in segment_tiled(output or model, model.architecture, image, tile):
            if result is None:
                result = torch.full((*part.shape[:-2], height, width), -1, dtype=part.dtype)
            result[..., rows, columns] = part
            counts[rows, columns] += 1
    assert (counts == 1).all()
    return result


def mirrored(image: torch.Tensor, before: int, size: tuple[int, int]) -> torch.Tensor:
    height, width = image.shape[-2:]
    pad = [(0, 0), (0, 0), (before, size[0] - height - before), (before, size[1] - width - before)]
    return torch.from_numpy(np.pad(image.numpy(), pad, mode="reflect"))


@pytest.mark.parametrize("tile, height, width", [(44, 27, 21), (48, 75, 61), (60, 75, 61), (92, 75, 61)])
@pytest.mark.parametrize("build", [reference.UNet, UNet])
def test_valid_network_is_exact(build, tile, height, width):
    model = with_whole_numbers(build(**VALID))
    image = torch.randint(-3, 4, (2, 1, height, width), generator=torch.Generator().manual_seed(1)).float()
    # The whole image in one pass: 20 pixels of border, to a size that fits.
    with torch.inference_mode():
        whole = model(mirrored(image, 20, (116, 104)))[..., :height, :width]
    assert whole.abs().max() < 2**24
    assert whole.unique().numel() > 100
    tiled = assemble(model, image, tile)
    assert torch.equal(tiled, whole)
    assert torch.equal(assemble(model, image, None), whole)
    assert torch.equal(assemble(model, image, tile, model.predict), whole.argmax(1).to(torch.uint8))


@pytest.mark.parametrize("tile", [80, 96])
def test_same_network_is_exact_with_mirrored_borders(tile):
    model = with_whole_numbers(UNet(**SAME))
    image = torch.randint(-3, 4, (1, 1, 75, 61), generator=torch.Generator().manual_seed(1)).float()
    border = border_width(model.architecture)
    with torch.inference_mode():
        padded = model(mirrored(image, border, (144, 128)))
    whole = padded[..., border : border + 75, border : border + 61]
    assert torch.equal(assemble(model, image, tile), whole)
    assert torch.equal(assemble(model, image, None), whole)


def test_ordinary_weights_agree_to_rounding():
    torch.manual_seed(0)
    model = UNet(**VALID).eval()
    image = torch.randn(1, 1, 75, 61)
    whole, tiled = assemble(model, image, None), assemble(model, image, 48)
    assert (whole - tiled).abs().max() <= 32 * torch.finfo(torch.float32).eps * whole.abs().max()
    double = UNet(**VALID).double().eval()
    error = (assemble(double, image.double(), None) - assemble(double, image.double(), 48)).abs().max()
    assert error <= 1e-13


def test_tiles_off_the_pooling_grid_would_differ():
    """What the alignment of the tiles is for: shifted by one pixel, the same network gives other values."""
    model = with_whole_numbers(UNet(**VALID))
    image = torch.randint(-3, 4, (1, 1, 75, 61), generator=torch.Generator().manual_seed(1)).float()
    with torch.inference_mode():
        even, odd = model(mirrored(image, 20, (116, 104))), model(mirrored(image, 21, (116, 104)))
    assert not torch.equal(even[..., :60, :60], odd[..., 1:61, 1:61])


@pytest.mark.parametrize("network, border", [
    (dict(padding="valid", up="transpose", depth=4), 92),
    (dict(padding="valid", up="transpose", depth=2), 20),
    (dict(padding="valid", up="transpose", depth=0), 2),
])  # fmt: skip
def test_border_of_valid_networks(network, border):
    assert border_width(reference.UNet(**network, width=1).architecture) == border


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_border_of_same_networks_covers_all_they_see(depth):
    """The gradient of one output pixel with respect to the input shows how far the network looks."""
    model = reference.UNet(in_channels=1, num_classes=1, width=1, depth=depth, dropout=0.0).double()
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    border = border_width(model.architecture)
    side = 2 * border + 2**depth
    for offset in range(2**depth):
        image = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
        model(image)[0, 0, border + offset, border + offset].backward()
        seen = image.grad[0, 0].nonzero()
        assert len(seen) > 2**depth
        assert border + offset - seen.min() <= border
        assert seen.max() - (border + offset) <= border


def test_mirror_is_numpy_reflect():
    for length in (1, 2, 3, 7):
        index = mirror(np.arange(-20, length + 20), length)
        assert np.array_equal(index, np.pad(np.arange(length), 20, mode="reflect"))


@pytest.mark.parametrize("tile, words", [(50, "48 or 52"), (2, "4"), (44, None)])
def test_tile_sizes(tile, words):
    model = UNet(**VALID).eval()
    image = torch.zeros(1, 1, 9, 9)
    if words is None:
        assert assemble(model, image, tile).shape == (1, 3, 9, 9)
    else:
        with pytest.raises(UserError, match=words):
            assemble(model, image, tile)
    with pytest.raises(UserError, match="the border alone takes"):
        assemble(UNet(**SAME).eval(), image, 32)


@pytest.mark.parametrize("options", [SAME, VALID])
def test_a_tile_larger_than_the_image_takes_no_more_than_that(options):
    model, image = with_whole_numbers(UNet(**options)), torch.ones(1, 1, 9, 30)
    border, seen = border_width(model.architecture), []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2:])
        return model(x)

    large = 404 if options is VALID else 400
    assert torch.equal(assemble(model, image, large, forward), assemble(model, image, None))
    assert max(height for height, _ in seen) <= 9 + 2 * border + 8
    assert max(width for _, width in seen) <= 30 + 2 * border + 8
