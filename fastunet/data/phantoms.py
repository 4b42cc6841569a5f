"""Synthetic glioma cases in BraTS files: for demonstrations and tests, never for claims about patients.

A case is a head of 160 x 190 x 148 mm in a field of view of 200 x 200 x 155 mm: scalp, skull, folded cortex, white
matter, deep grey matter, ventricles, cerebellum and vessels, bent by a smooth random deformation, with a tumour of
oedema ⊃ enhancing rim ⊃ necrotic core that pushes the ventricles aside. Intensities follow the contrasts of the four
sequences, then come texture, the blur of the scanner, a bias field, Rician noise and a random gain. No threshold
separates the tumour: scalp and white-matter lesions are as bright as oedema in FLAIR, vessels, choroid plexus and scalp
as bright as the rim in T1ce, and CSF as dark as the necrotic core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastunet.arguments import checked
from fastunet.data.case import MODALITIES, Case
from fastunet.data.cases import discover_cases
from fastunet.data.label_tables import LABEL_MAPS
from fastunet.data.volumes import save_nifti
from fastunet.errors import UserError
from fastunet.files import make_output_folder, require_room

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

FIELD_OF_VIEW = (200.0, 200.0, 155.0)
_HEAD = (80.0, 95.0, 74.0)
_SCALP_MM, _SKULL_MM, _FLUID_MM = 6.0, 13.0, 14.5  # depth below the skin at which each layer ends
_CORTEX_MM = 34.0
_SMALLEST_SIDE, _LARGEST_SIDE = 16, 2**15 - 1  # NIfTI-1 counts to that
_SMALLEST_PART = 6e-4  # of all voxels: 2.5 cubic centimetres, so that a score of each class means something
_ATTEMPTS = 50
_PARTS = {"brats2021": ("_flair", "_t1", "_t1ce", "_t2", "_seg"), "brats2023": ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")}
_PARTS["brats2024"] = _PARTS["brats2023"]
_NAMES = {"brats2021": "Phantom_{:03d}", "brats2023": "Phantom-{:05d}-000", "brats2024": "Phantom-{:05d}-100"}

# tissue                flair  t1    t1ce  t2
_CONTRASTS = {
    "air":             (0.00, 0.00, 0.00, 0.00),
    "scalp":           (0.88, 0.95, 1.00, 0.62),
    "skull":           (0.10, 0.12, 0.13, 0.09),
    "fluid":           (0.13, 0.20, 0.21, 1.00),
    "grey":            (0.58, 0.50, 0.53, 0.62),
    "white":           (0.45, 0.70, 0.72, 0.44),
    "deep grey":       (0.53, 0.57, 0.60, 0.52),
    "vessel":          (0.22, 0.30, 1.05, 0.16),
    "lesion":          (0.86, 0.55, 0.57, 0.80),
    "oedema":          (0.92, 0.48, 0.50, 0.86),
    "enhancing":       (0.80, 0.55, 1.08, 0.72),
    "necrotic":        (0.52, 0.27, 0.29, 0.92),
    "cavity":          (0.16, 0.19, 0.20, 1.00),
}  # fmt: skip
_TISSUES = {name: index for index, name in enumerate(_CONTRASTS)}
_CLASS_TISSUES = {1: "necrotic", 2: "oedema", 3: "enhancing", 4: "cavity"}


@dataclass(frozen=True)
class _Tumour:
    classes: np.ndarray
    centre: np.ndarray
    radius: float


@checked
def make_phantoms(
    root: str | Path,
    cases: int,
    seed: int,
    *,
    shape: Sequence[int] = (96, 96, 48),
    edition: str = "brats2021",
    skull: bool = True,
) -> list[Case]:
    """Writes ``cases`` synthetic cases below ``root`` and returns them; the same arguments give the same bytes.

    Args:
        root: the folder, made if needed.
        cases: how many; case i depends on ``seed`` and i only.
        seed: a non-negative integer.
        shape: voxels per axis; the field of view stays, so the voxel size changes.
        edition: the file names and label values, "brats2021", "brats2023" or "brats2024" (with a resection cavity).
        skull: False strips scalp and skull, as the BraTS data are.

    Raises:
        UserError: an unknown edition, a shape that is too small, no room on the disk, or a file that cannot be written.
    """
    if edition not in _PARTS:
        raise UserError(f"phantoms are made of edition {', '.join(_PARTS)}, not {edition!r}")
    if len(shape) != 3 or min(shape) < _SMALLEST_SIDE or max(shape) > _LARGEST_SIDE:
        raise UserError(f"a phantom has 3 axes of {_SMALLEST_SIDE} to {_LARGEST_SIDE} voxels, got {tuple(shape)}")
    root = make_output_folder(root)
    require_room(root, cases, math.prod(shape), f"phantoms of {' × '.join(map(str, shape))}")
    for index in range(cases):
        name = _NAMES[edition].format(index)
        images, classes = phantom(np.random.default_rng([seed, index]), shape, edition == "brats2024", skull)
        folder = root / name
        make_output_folder(folder)
        values = LABEL_MAPS[edition].decode(classes)
        for part, voxels in zip(_PARTS[edition], [*images, values]):
            save_nifti(folder / f"{name}{part}.nii.gz", _image(voxels))
    return discover_cases(root, modalities=MODALITIES)


def phantom(
    rng: np.random.Generator, shape: Sequence[int], cavity: bool = False, skull: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One case: intensities int16 (4, X, Y, Z) in the order of ``MODALITIES``, 0 outside, and classes uint8 (X, Y, Z).

    Axes run to the left, to the back and to the top of the head.
    """
    position = _bent_grid(rng, shape)
    depth = (1 - np.sqrt(sum((p / r) ** 2 for p, r in zip(position, _HEAD)))) * min(_HEAD)
    tumour = _draw_tumour(rng, position, depth, cavity)
    tissue = _draw_anatomy(rng, position, depth, tumour)
    oedema_stays_out = (tissue == _TISSUES["fluid"]) | (tissue == _TISSUES["vessel"])
    classes = np.where((tumour.classes == 2) & oedema_stays_out, 0, tumour.classes).astype(np.uint8)
    for index, name in _CLASS_TISSUES.items():
        tissue[classes == index] = _TISSUES[name]
    if not skull:
        tissue[depth < _SKULL_MM] = _TISSUES["air"]
    return _scan(rng, tissue), classes


def _bent_grid(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Voxel centres in millimetres from the head's centre, float32 (3, X, Y, Z), scaled and bent at random."""
    axes = [(np.arange(n) + 0.5 - n / 2) * (size / n) for n, size in zip(shape, FIELD_OF_VIEW)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    scale = rng.uniform(1.0, 1.1, 3)
    shift = rng.uniform(-3, 3, 3)
    return np.stack([g * k + d + 3.0 * smooth_field(rng, shape, 3) for g, k, d in zip(grid, scale, shift)])


def _draw_tumour(rng: np.random.Generator, position: np.ndarray, depth: np.ndarray, cavity: bool) -> _Tumour:
    """A tumour somewhere in the brain, of which every class has voxels."""
    shape = depth.shape
    brain = depth > _FLUID_MM + 2
    wanted = 4 if cavity else 3
    for _ in range(_ATTEMPTS):
        direction = rng.normal(size=3)
        centre = direction / np.linalg.norm(direction) * rng.uniform(0.3, 0.66) * (np.array(_HEAD) - _FLUID_MM)
        centre[2] = max(centre[2], -20.0)  # gliomas of the cerebellum are rare
        radius = rng.uniform(29, 40)
        stretch = rng.uniform(0.85, 1.2, 3)
        offset = position - centre.astype(np.float32)[:, None, None, None]
        distance = np.sqrt(sum((o * s) ** 2 for o, s in zip(offset, stretch))) / radius
        whole = distance * (1 + 0.22 * smooth_field(rng, shape, 7))
        core = distance * (1 + 0.17 * smooth_field(rng, shape, 8)) / rng.uniform(0.58, 0.7)
        necrosis = core * (1 + 0.12 * smooth_field(rng, shape, 9)) / rng.uniform(0.58, 0.72)
        classes = np.zeros(shape, dtype=np.uint8)
        classes[brain & (whole < 1)] = 2
        classes[brain & (core < 1)] = 3
        classes[brain & (core < 1) & (necrosis < 1)] = 1
        if cavity:
            towards_middle = -centre / np.linalg.norm(centre)
            away = offset - (0.55 * radius * towards_middle).astype(np.float32)[:, None, None, None]
            hole = np.sqrt((away**2).sum(0)) * (1 + 0.1 * smooth_field(rng, shape, 6)) < 0.3 * radius
            classes[brain & hole & (whole < 1.1)] = 4
        if np.bincount(classes.ravel(), minlength=wanted + 1)[1 : wanted + 1].min() > _SMALLEST_PART * classes.size:
            return _Tumour(classes, centre, radius)
    raise UserError(f"a phantom of shape {shape} is too coarse for a tumour of three parts")


def _draw_anatomy(rng: np.random.Generator, position: np.ndarray, depth: np.ndarray, tumour: _Tumour) -> np.ndarray:
    """Tissue indices uint8 (X, Y, Z) of a healthy head, its inner parts pushed away from the tumour."""
    shape = depth.shape
    centre = tumour.centre.astype(np.float32)[:, None, None, None]
    offset = position - centre
    push = 0.45 * np.exp(-((offset**2).sum(0)) / tumour.radius**2)
    x, y, z = centre + offset * (1 - push)
    side = np.abs(x)
    inner = depth - _FLUID_MM
    fold = np.abs(smooth_field(rng, shape, 19))
    ripple = smooth_field(rng, shape, 5)

    tissue = np.full(shape, _TISSUES["white"], dtype=np.uint8)

    def paint(name: str, where: np.ndarray) -> None:
        tissue[where] = _TISSUES[name]

    def ellipsoid(*axes: tuple[np.ndarray, float, float]) -> np.ndarray:
        return np.asarray(sum(((values - middle) / radius) ** 2 for values, middle, radius in axes))

    cortex = inner < _CORTEX_MM * (0.55 + 0.12 * ripple)
    midline = (np.abs(x + 0.8 * ripple) < 5.0) & (z > 8 + 4 * ripple)
    paint("grey", (cortex & (fold < 0.62)) | (inner < 4) | midline)
    paint("fluid", cortex & (fold < 0.17 * (1 - inner / _CORTEX_MM)))
    paint("fluid", (np.abs(x + 0.8 * ripple) < 1.4) & (z > 10 + 4 * ripple))

    for middle, radii in (((13, 8, -2), (8, 13, 9)), ((25, -6, 0), (5, 16, 9)), ((14, -27, 8), (5, 9, 8))):
        paint("deep grey", ellipsoid(*zip((side, y, z), middle, radii)) < 1)

    cerebellum = ellipsoid((x, 0, 46), (y, 42, 32), (z, -48, 21)) < 1
    paint("grey", cerebellum)
    paint("white", cerebellum & (np.sin(z * 0.75 + 0.05 * y + ripple) > 0.35) & (side > 4))

    size = rng.uniform(0.75, 1.3)
    horn = ellipsoid((side, 7 + 0.006 * y**2, 5.5 * size), (y, 2, 36 * size**0.5), (z, 12 - 0.007 * y**2, 9 * size))
    paint("lesion", (horn < 1.7) & (horn > 1) & (np.abs(y) > 16) & (ripple > rng.uniform(-0.6, 0.6)))
    paint("lesion", (inner > 10) & (smooth_field(rng, shape, 16) > rng.uniform(1.9, 2.3)))
    paint("fluid", (horn < 1) | (ellipsoid((x, 0, 2.2 * size), (y, 2, 15), (z, -4, 9)) < 1))
    paint("vessel", ellipsoid((side, 9, 2.5), (y, 16, 8), (z, 10, 4)) < 1)

    branches = smooth_field(rng, shape, 7) ** 2 + smooth_field(rng, shape, 7) ** 2
    paint("vessel", (branches < 0.012) & (inner < 45))
    paint("vessel", (side < 3.2) & (depth < _FLUID_MM + 4) & ((z > 10) | (y > 30)))

    paint("fluid", depth < _FLUID_MM)
    paint("vessel", (side < 3.2) & (depth > _SKULL_MM - 1) & (depth < _FLUID_MM + 1) & ((z > 10) | (y > 30)))
    paint("skull", depth < _SKULL_MM + ripple)
    paint("scalp", depth < _SCALP_MM + ripple)
    paint("air", depth < 0)
    return tissue


def _scan(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """Intensities int16 (4, X, Y, Z) of a tissue map, at least 1 inside the head and 0 in the air."""
    shape = tissue.shape
    head = tissue != _TISSUES["air"]
    texture = 1 + 0.035 * smooth_field(rng, shape, 22)
    images = np.zeros((len(MODALITIES), *shape), dtype=np.int16)
    for image, contrasts in zip(images, zip(*_CONTRASTS.values())):
        table = np.array(contrasts, dtype=np.float32) * rng.normal(1, 0.04, len(contrasts)).astype(np.float32)
        signal = blur(table[tissue]) * texture * np.exp(0.1 * smooth_field(rng, shape, 2))
        noise = rng.standard_normal((2, *shape), dtype=np.float32) * np.float32(rng.uniform(0.02, 0.035))
        signal = np.hypot(signal + noise[0], noise[1]) * rng.uniform(300, 1200)
        image[head] = np.maximum(signal[head].round(), 1)
    return images


def blur(values: np.ndarray) -> np.ndarray:
    """One pass of [1, 4, 1] / 6 along each axis: the partial volumes at the borders of tissues."""
    for axis in range(values.ndim):
        v = np.moveaxis(values, axis, 0)
        padded = np.concatenate([v[:1], v, v[-1:]])
        values = np.moveaxis((padded[:-2] + 4 * v + padded[2:]) / 6, 0, axis)
    return values


def smooth_field(rng: np.random.Generator, shape: Sequence[int], cells: int) -> np.ndarray:
    """A random cubic B-spline field, float32, mean about 0 and standard deviation 1, of ``cells`` knots per axis."""
    field = rng.standard_normal([cells + 3] * len(shape), dtype=np.float32)
    for size in shape:  # each pass consumes the first axis and appends the fine one
        field = np.tensordot(field, _spline_basis(size, cells), axes=(0, 0))
    return np.asarray(field / field.std())


def _spline_basis(size: int, cells: int) -> np.ndarray:
    """Weights (cells + 3, size) of the uniform cubic B-spline at ``size`` points."""
    position = (np.arange(size) + 0.5) * (cells / size)
    distance = np.abs(np.arange(cells + 3)[:, None] - 1 - position)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _image(voxels: np.ndarray) -> Nifti1Image:
    """The NIfTI image of voxels that run left, back, up, centred on the scanner's origin."""
    import nibabel

    spacing = [size / n for size, n in zip(FIELD_OF_VIEW, voxels.shape)]
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [-affine[i, i] * (n - 1) / 2 for i, n in enumerate(voxels.shape)]
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"fastunet phantom"
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return image
