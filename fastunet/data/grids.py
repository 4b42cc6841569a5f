"""Whether files lie on one grid: exactly, up to what writers round, or not; and then by how much."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from fastunet.arguments import checked
from fastunet.data.case import Case, check_modalities, colour_index
from fastunet.data.volumes import Geometry, read_geometry
from fastunet.errors import UserError, warn_once

_SAME = 5e-4  # voxels; below, the difference is that of float32 headers and not worth a word
_ROUNDED = 5e-3  # voxels: half a percent
_RELATIVE = 1e-4  # of a coordinate, as headers with four or five digits have it
_MOST_ROUNDED = 0.1  # voxels, however far from the origin


@checked
def check_geometry(case: Case, modalities: Iterable[str], *, label: bool = True) -> Geometry:
    """Proves that the files of a case lie on one grid, and returns that of the first modality; reads headers only.

    Raises:
        UserError: a channel that its file lacks, a label file with channels; and see ``check_same_grid``.
    """
    modalities = list(modalities)
    check_modalities(case, modalities)
    sources = [case.modalities[modality] for modality in modalities]
    grids = {source.path: read_geometry(source.path) for source in sources}
    for path, channel in sources:
        shape = grids[path].shape
        if channel is None and len(shape) > 3:
            if case.is_image:
                raise UserError(f"{path} has {shape[3]} channels, and a grey image is asked for: convert it to that")
            raise UserError(f"{path}: expected one volume of 3 axes, got shape {shape}")
        grey_as_colour = case.is_image and len(shape) == 3 and None not in map(colour_index, modalities)
        if channel is not None and channel >= (*shape[3:], 1)[0] and not grey_as_colour:
            raise UserError(f"{path}: has no channel {channel}, its shape is {shape}")
    for path in (case.masks or [case.label]) if label and case.label is not None else ():
        grids[path] = read_geometry(path)
        if len(grids[path].shape) > 3 and not case.is_image:
            raise UserError(f"{path}: a label file has 3 axes, this one has shape {grids[path].shape}")
    first, *others = grids.values()
    for other in others:
        _check_orientation(first, other)
        try:
            check_same_grid(first, other)
        except UserError as error:
            if case.is_image or other.path == case.label:
                raise
            raise UserError(f"{error}, or leave it out of --modalities") from error
    return first


def _check_orientation(first: Geometry, other: Geometry) -> None:
    """Refuses two images whose tags differ, unless their shapes show that both are the same way up as they are shown.

    A mask without a tag may have been painted on what a viewer shows, or on the pixels as they are stored.
    """
    quarter = (first.orientation > 4) != (other.orientation > 4)
    told = quarter and first.shape[0] != first.shape[1] and first.shape[:2] == other.shape[:2]
    if first.orientation != other.orientation and not told:
        tags = f"orientation tags {first.orientation} and {other.orientation} (1 is none)"
        raise UserError(f"{first.path} and {other.path} have {tags}: save both as they are to be seen, without a tag")


def check_same_grid(first: Geometry, other: Geometry) -> None:
    """Raises ``UserError`` unless two files have one shape and one affine, up to a writer's rounding.

    The measure is how far apart the same corner of both lies. Half a percent of a voxel, or 1e-4 of a corner's distance
    from the origin but at most a tenth of a voxel, passes with one warning per folder.
    """
    if other.shape[:3] != first.shape[:3]:
        raise UserError(
            f"{first.path} and {other.path} differ in shape: {first.shape[:3]} and {other.shape[:3]}; "
            "resample one onto the grid of the other"
        )
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in first.shape[:3]))])
    one, two = corners @ first.affine[:3].T, corners @ other.affine[:3].T
    apart = float(np.linalg.norm(two - one, axis=1).max())
    voxel = float(np.linalg.norm(first.affine[:3, :3], axis=0).min())
    reach = float(np.linalg.norm(one, axis=1).max())
    if apart <= _SAME * voxel:
        return
    if apart <= max(_ROUNDED * voxel, min(_RELATIVE * reach, _MOST_ROUNDED * voxel)):
        warn_once(
            f"rounded grid in {first.path.parent.parent}",
            f"{first.path} and {other.path} differ in affine by a writer's rounding, {apart:.2g} mm; taken as one grid",
        )
        return
    raise UserError(
        f"{first.path} and {other.path} differ in affine, by up to {apart:.3g} mm ({_difference(first, other)}): "
        "resample one onto the grid of the other, or copy the header if only that is wrong"
    )


def _difference(first: Geometry, other: Geometry) -> str:
    """What differs most: the order of the axes, the voxel size, the direction, or the position."""
    import nibabel

    if not (np.linalg.det(first.affine[:3, :3]) and np.linalg.det(other.affine[:3, :3])):
        return "one has axes that are not independent"
    codes = ["".join(nibabel.aff2axcodes(grid.affine)) for grid in (first, other)]
    if codes[0] != codes[1]:
        return f"axes run {codes[0]} and {codes[1]}"
    sizes = [np.linalg.norm(grid.affine[:3, :3], axis=0) for grid in (first, other)]
    if not np.allclose(sizes[0], sizes[1], rtol=_RELATIVE):
        shown = [" × ".join(f"{size:.5g}" for size in three) for three in sizes]
        return f"voxels of {shown[0]} and {shown[1]} mm"
    if not np.allclose(first.affine[:3, :3], other.affine[:3, :3], atol=_RELATIVE * sizes[0].max()):
        return "directions differ"
    return "they are shifted"
