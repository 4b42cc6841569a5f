"""What is in a data folder, and every reason why training would refuse it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastunet.data.case import Case, check_axis, check_modalities
from fastunet.data.grids import check_geometry
from fastunet.data.masks import value_counts
from fastunet.data.resampling import resampled_shape
from fastunet.data.single_masks import case_labels
from fastunet.data.slices import orient, slice_size, slice_spacing
from fastunet.data.volumes import Geometry, read_label_values, read_volume
from fastunet.errors import UserError


@dataclass
class Intensities:
    """Of one modality of one case: least, mean and greatest value that is not 0, and the share of zeros."""

    least: float
    mean: float
    greatest: float
    zeros: float


@dataclass
class CaseReport:
    """What one case holds.

    Attributes:
        case: the case.
        geometry: of its first file, None if the files do not lie on one grid.
        values: voxels by label value, as stored.
        intensities: by modality.
        slices: how many training takes: from the first to the last that is not 0, in image or label.
        problems: sentences, each a reason to refuse the case.
        remarks: sentences on what does not keep the case from training, such as a modality that training does not take.
    """

    case: Case
    geometry: Geometry | None = None
    values: Counter[int] = field(default_factory=Counter)
    intensities: dict[str, Intensities] = field(default_factory=dict)
    slices: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel sizes in millimetres; nothing without a geometry."""
        return () if self.geometry is None else tuple(np.linalg.norm(self.geometry.affine[:3, :3], axis=0).tolist())

    @property
    def axes(self) -> str:
        """Where the voxel axes run, such as "LPS"; "" if they are not independent."""
        from nibabel import aff2axcodes

        codes = ("",) if self.geometry is None else aff2axcodes(self.geometry.affine)
        return "".join(code or "?" for code in codes)


def check_quickly(
    cases: Sequence[Case],
    modalities: Sequence[str],
    *,
    size: object = None,
    axis: int = 2,
    spacing: tuple[float, float] | None = None,
) -> list[str]:
    """Every problem of labelled cases that headers show: what is missing, unreadable, or not on one grid.

    Args:
        cases: the cases; those without a label are left out, as in training.
        modalities: the channels.
        size: of the slices; without one, all slices of volumes must have one size.
        axis: the slicing axis.
        spacing: what slices are resampled to, see ``CaseSlices``.
    """
    problems: list[str] = []
    try:
        if size is not None:
            slice_size(size)
    except UserError as error:
        problems.append(str(error))
    sizes: dict[tuple[int, ...], str] = {}
    for case in cases:
        if case.label is None:
            continue
        try:
            check_modalities(case, modalities)
            check_axis(case, axis)
            geometry = check_geometry(case, modalities)
            sizes.setdefault(slice_shape(geometry, axis, spacing)[1:], case.name)
        except UserError as error:
            problems.append(str(error))
    if size is None and len(sizes) > 1 and not cases[0].is_image:
        shown = ", ".join(f"{height} × {width} ({name})" for (height, width), name in list(sizes.items())[:4])
        problems.append(f"slices have {len(sizes)} sizes, such as {shown}: training needs one size for all (--size)")
    return problems


def inspect_case(case: Case, modalities: Sequence[str], *, on_nan: str = "error", axis: int = 2) -> CaseReport:
    """Reads every file of ``case`` once; ``modalities`` are those that training would use. Nothing is raised."""
    report = CaseReport(case)
    try:
        check_modalities(case, modalities)
        report.geometry = check_geometry(case, modalities)
        check_geometry(case, list(case.modalities))
    except UserError as error:
        (report.remarks if report.geometry else report.problems).append(str(error))
    used = {case.modalities[name].path for name in modalities if name in case.modalities}
    filled: list[np.ndarray] = []
    for path in dict.fromkeys(source.path for source in case.modalities.values()):
        try:
            data = read_volume(path, on_nan=on_nan).data
        except UserError as error:
            (report.problems if path in used else report.remarks).append(str(error))
            continue
        channels = data[..., None] if data.ndim == 3 else data
        for name, source in case.modalities.items():
            if source.path == path and (source.channel or 0) < channels.shape[3]:
                report.intensities[name] = _intensities(channels[..., source.channel or 0])
                filled += [channels[..., source.channel or 0] != 0] if name in modalities else []
    if case.label is not None:
        try:
            values = case.label_map.decode(case_labels(case)) if case.masks else read_label_values(case.label)
            report.values.update(value_counts(values, case.label))
            filled.append(case.label_map.encode(values, case.label) != 0)
        except UserError as error:
            report.problems.append(str(error))
    if report.geometry and filled and not report.problems and not case.is_image:
        inside = orient(np.logical_or.reduce(filled), report.geometry.affine, report.geometry.path)
        planes = np.flatnonzero(np.moveaxis(inside, axis, 0).any(axis=(1, 2)))
        report.slices = int(planes[-1] - planes[0]) + 1 if planes.size else 0
    found = [report.intensities[name] for name in modalities if name in report.intensities]
    if found and all(one.zeros == 1 for one in found) and not case.is_image:
        labelled = any(value != case.label_map.values[0] for value in report.values)
        text = f"{case.files[0]}: every voxel of case {case.name} is 0"
        (report.remarks if labelled else report.problems).append(text)
    report.problems = list(dict.fromkeys(report.problems))
    report.remarks = [text for text in dict.fromkeys(report.remarks) if text not in report.problems]
    return report


def foreground(report: CaseReport) -> int:
    """How many voxels of the case belong to a class other than the background; ignored ones do not."""
    background, ignored = report.case.label_map.values[0], report.case.label_map.ignore
    return sum(count for value, count in report.values.items() if value not in (background, ignored))


def _intensities(data: np.ndarray) -> Intensities:
    inside = data[data != 0]
    if inside.size == 0:
        return Intensities(0.0, 0.0, 0.0, 1.0)
    zeros = 1 - inside.size / data.size
    return Intensities(float(inside.min()), float(inside.mean(dtype=np.float64)), float(inside.max()), zeros)


def slice_shape(geometry: Geometry, axis: int, spacing: tuple[float, float] | None = None) -> tuple[int, int, int]:
    """Number, height and width of the slices along ``axis`` in the common orientation, resampled to ``spacing``."""
    voxels = np.broadcast_to(np.uint8(0), geometry.shape[:3])
    count, *shape = np.moveaxis(orient(voxels, geometry.affine, geometry.path), axis, 0).shape
    own = slice_spacing(geometry.affine, axis, geometry.path)
    return count, *resampled_shape((shape[0], shape[1]), own, spacing, geometry.path)
