"""Small NIfTI files for the tests of ``fastunet.data``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np

# All 48 ways to store a volume along the axes of the body, as signed axis permutations.
ORIENTATIONS = [
    "".join(pair[sign] for pair, sign in zip(order, signs))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for signs in itertools.product((0, 1), repeat=3)
]


def oriented_affine(codes: str, spacing=(1.0, 2.0, 3.0)) -> np.ndarray:
    """An affine whose voxel axes run towards ``codes``, such as "LPS"."""
    ornt = nib.orientations.axcodes2ornt(tuple(codes))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, direction) in enumerate(ornt):
        affine[int(world), axis] = direction * spacing[axis]
    affine[:3, 3] = (5, -7, 11)
    return affine


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **header) -> Path:
    """Writes ``array`` in its own dtype."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def random_image(seed: int, shape=(6, 5, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def random_labels(seed: int, shape=(6, 5, 4), values=(0, 1, 2, 4)) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, dtype=np.uint8), shape)


def brats_case(folder: Path, name: str | None = None, seed: int = 0, shape=(6, 5, 4), suffix=".nii.gz") -> Path:
    """A case named as in BraTS 2018-2021, all four modalities and a label."""
    name = name or folder.name
    for number, part in enumerate(("flair", "t1", "t1ce", "t2")):
        save(folder / f"{name}_{part}{suffix}", random_image(10 * seed + number, shape))
    save(folder / f"{name}_seg{suffix}", random_labels(seed, shape))
    return folder


def head_case(folder, seed=0, shape=(10, 9, 8), codes="LPS"):
    """A case with an empty border of different width on every side, and labels in its middle."""
    brats_case(folder, seed=seed, shape=shape)
    inside = np.zeros(shape, bool)
    inside[1:-3, 2:-1, 1:-2] = True
    lesion = np.zeros(shape, bool)
    lesion[3:5, 3:6, 3:5] = True
    for part in ("flair", "t1", "t1ce", "t2", "seg"):
        path = folder / f"{folder.name}_{part}.nii.gz"
        array = np.asanyarray(nib.load(path).dataobj)
        save(path, array * (lesion if part == "seg" else inside), oriented_affine(codes))
    return folder


def gli_case(folder: Path, values=(0, 1, 2, 3), suffix=".nii.gz") -> Path:
    """A case named as in BraTS 2023 and 2024."""
    for number, part in enumerate(("t2f", "t1n", "t1c", "t2w")):
        save(folder / f"{folder.name}-{part}{suffix}", random_image(number))
    save(folder / f"{folder.name}-seg{suffix}", random_labels(0, values=values))
    return folder


MSD_JSON = {
    "name": "BRATS",
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
}


def msd_folder(root: Path, names=("BRATS_001", "BRATS_002"), shape=(6, 5, 4)) -> Path:
    """A Medical Segmentation Decathlon task: 4-D images."""
    listed = []
    for seed, name in enumerate(names):
        save(root / "imagesTr" / f"{name}.nii.gz", random_image(seed, (*shape, 4)).astype(np.float32))
        save(root / "labelsTr" / f"{name}.nii.gz", random_labels(seed, shape, (0, 1, 2, 3)))
        listed.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    (root / "dataset.json").write_text(json.dumps({**MSD_JSON, "training": listed}))
    return root


NNUNET_JSON = {
    "channel_names": {"0": "T1ce", "1": "FLAIR"},
    "labels": {"background": 0, "liver": 1, "lesion": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def nnunet_folder(root: Path, names=("case_a", "case_b"), shape=(6, 5, 4), **changes) -> Path:
    """An nnU-Net raw folder: one file per channel."""
    for seed, name in enumerate(names):
        for channel in range(2):
            save(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", random_image(2 * seed + channel, shape))
        save(root / "labelsTr" / f"{name}.nii.gz", random_labels(seed, shape, (0, 1, 2)))
    (root / "dataset.json").write_text(json.dumps({**NNUNET_JSON, "numTraining": len(names), **changes}))
    return root
