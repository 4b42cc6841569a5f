"""Volumes and 2-D images: files, cases, slices for training and segmentation, augmentation, splits, synthetic cases."""

from fastunet.data.augment import Augmentation, augment
from fastunet.data.case import DEFAULT_MODALITIES, MODALITIES, Case, Source
from fastunet.data.cases import cases_from_files, discover_cases
from fastunet.data.cells import make_cells
from fastunet.data.grids import check_geometry
from fastunet.data.label_tables import LABEL_MAPS
from fastunet.data.labels import IGNORED, LabelMap
from fastunet.data.phantoms import make_phantoms
from fastunet.data.sampling import Batch
from fastunet.data.slice_dataset import SliceDataset
from fastunet.data.slices import CaseSlices, fit_slice, unfit_slice
from fastunet.data.splits import Split, split_cases
from fastunet.data.tile_dataset import TileDataset
from fastunet.data.volumes import Volume, read_geometry, read_labels, read_volume, write_labels, write_map

__all__ = [
    "DEFAULT_MODALITIES",
    "IGNORED",
    "LABEL_MAPS",
    "MODALITIES",
    "Augmentation",
    "Batch",
    "Case",
    "CaseSlices",
    "LabelMap",
    "SliceDataset",
    "Source",
    "Split",
    "TileDataset",
    "Volume",
    "augment",
    "cases_from_files",
    "check_geometry",
    "discover_cases",
    "fit_slice",
    "make_cells",
    "make_phantoms",
    "read_geometry",
    "read_labels",
    "read_volume",
    "split_cases",
    "unfit_slice",
    "write_labels",
    "write_map",
]
