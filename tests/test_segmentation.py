"""``fastunet segment`` and ``evaluate``: values, geometry and memory, against a plain slice-by-slice computation."""

from __future__ import annotations

import csv
import shutil
import sys

import nibabel
import numpy as np
import pytest
import torch

from fastunet import reference
from fastunet.data import LABEL_MAPS, discover_cases, read_labels
from fastunet.inference.segmenter import Segmenter
from fastunet.pictures.overlay import best_slice
from fastunet.training.checkpoint import load_model
from tests.cli_helpers import files_below, run, write_checkpoint
from tests.processes import ended, start

CASE = "Phantom_001"
FILE_VALUES = np.array(LABEL_MAPS["brats2021"].values)


def volume(path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def normalised(data: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over the non-zero voxels, written as plainly as can be."""
    brain = data[data != 0].astype(np.float64)
    return np.where(data != 0, (data - brain.mean()) / brain.std(), 0).astype(np.float32)


def expected_logits(model: torch.nn.Module, folder, name: str) -> np.ndarray:
    """(X, Y, Z, classes) from the reference network, an axial slice at a time."""
    plain = reference.UNet(**model.config).eval()
    plain.load_state_dict(model.state_dict())
    channels = [normalised(volume(folder / f"{name}_{m}.nii.gz")) for m in ("flair", "t1ce")]
    out = []
    with torch.inference_mode():
        for z in range(channels[0].shape[2]):
            image = torch.from_numpy(np.stack([c[:, :, z] for c in channels]))[None]
            out.append(plain(image)[0].permute(1, 2, 0).numpy())
    return np.stack(out, axis=2)


def agree(labels: np.ndarray, logits: np.ndarray) -> None:
    """``labels`` are the argmax of ``logits`` wherever rounding cannot decide between the first two."""
    first_two = np.sort(logits, axis=-1)[..., -2:]
    clear = first_two[..., 1] - first_two[..., 0] > 1e-4
    assert clear.mean() > 0.95
    assert (labels[clear] == FILE_VALUES[logits.argmax(-1)][clear]).all()


def test_labels_are_those_of_the_reference(phantoms, checkpoint, tmp_path, capsys):
    assert run("segment", checkpoint, phantoms, "--out", tmp_path, "--device", "cpu") == 0
    assert files_below(tmp_path) == [f"Phantom_00{i}.nii.gz" for i in range(4)]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in files_below(tmp_path)]
    model, _ = load_model(checkpoint)
    labels = volume(tmp_path / f"{CASE}.nii.gz")
    agree(labels, expected_logits(model, phantoms / CASE, CASE))
    assert set(np.unique(labels)) <= set(FILE_VALUES)
    assert len(np.unique(labels)) >= 3, "an untrained network that says one thing everywhere would prove little"
    written, source = nibabel.load(tmp_path / f"{CASE}.nii.gz"), nibabel.load(phantoms / CASE / f"{CASE}_flair.nii.gz")
    assert np.array_equal(written.affine, source.affine)
    assert written.shape == source.shape
    assert np.array_equal(written.header.get_qform(), source.header.get_qform())


def test_probabilities(phantoms, checkpoint, tmp_path):
    line = ["segment", checkpoint, phantoms / CASE, "--out", tmp_path, "--probabilities", "--device", "cpu"]
    assert run(*line, "--batch-size", "5") == 0
    names = ["background", "necrotic_core", "oedema", "enhancing_tumour"]
    assert files_below(tmp_path) == sorted([f"{CASE}.nii.gz", *(f"{CASE}_prob_{n}.nii.gz" for n in names)])
    maps = np.stack([volume(tmp_path / f"{CASE}_prob_{n}.nii.gz") for n in names], axis=-1)
    model, _ = load_model(checkpoint)
    logits = expected_logits(model, phantoms / CASE, CASE)
    expected = torch.from_numpy(logits).double().softmax(-1).numpy()
    assert np.abs(maps - expected).max() <= 1e-5
    agree(volume(tmp_path / f"{CASE}.nii.gz"), logits)


def test_loose_files_and_other_orientation(phantoms, checkpoint, tmp_path):
    """The same head stored along other axes gives the same labels, in the other orientation."""
    assert run("segment", checkpoint, phantoms / CASE, "--out", tmp_path / "a", "--device", "cpu") == 0
    for modality in ("flair", "t1ce"):
        image = nibabel.load(phantoms / CASE / f"{CASE}_{modality}.nii.gz")
        turned = image.as_reoriented(nibabel.orientations.axcodes2ornt("ASR", (("L", "R"), ("P", "A"), ("I", "S"))))
        nibabel.save(turned, tmp_path / f"scan_{modality}.nii.gz")
    files = [tmp_path / "scan_flair.nii.gz", tmp_path / "scan_t1ce.nii.gz"]
    assert run("segment", checkpoint, *files, "--out", tmp_path / "b", "--device", "cpu") == 0
    expected, actual = nibabel.load(tmp_path / "a" / f"{CASE}.nii.gz"), nibabel.load(tmp_path / "b" / "scan.nii.gz")
    assert np.array_equal(actual.affine, nibabel.load(files[0]).affine)
    closest = nibabel.as_closest_canonical
    same = np.asarray(closest(actual).dataobj) == np.asarray(closest(expected).dataobj)
    assert same.mean() > 0.9999, f"{(~same).sum()} voxels differ"


def test_tiled_volume_equals_untiled(phantoms, tmp_path):
    model = tmp_path / "valid.safetensors"
    write_checkpoint(model, padding="valid", up="transpose")
    assert run("segment", model, phantoms / CASE, "--out", tmp_path / "a", "--device", "cpu") == 0
    assert run("segment", model, phantoms / CASE, "--out", tmp_path / "b", "--device", "cpu", "--tile", "52") == 0
    whole, tiled = (volume(tmp_path / f / f"{CASE}.nii.gz") for f in "ab")
    assert len(np.unique(whole)) >= 2
    assert (whole == tiled).mean() > 0.9999


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_images(suffix, tmp_path):
    from PIL import Image

    model = write_checkpoint(tmp_path / "grey.safetensors", modalities=("em",), padding="valid", up="transpose")
    pixels = np.random.default_rng(0).integers(1, 256, (70, 90)).astype(np.uint8)
    source = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(source) if suffix == ".png" else np.save(source, pixels)
    line = ["segment", tmp_path / "grey.safetensors", source, "--device", "cpu", "--overlay"]
    assert run(*line, "--out", tmp_path / "whole") == 0
    assert run(*line, "--out", tmp_path / "tiled", "--tile", "60") == 0

    def read(folder: str) -> np.ndarray:
        path = tmp_path / folder / source.name
        return np.asarray(Image.open(path)) if suffix == ".png" else np.load(path)

    labels = read("whole")
    padded = np.pad(normalised(pixels), ((20, 22), (20, 22)), mode="reflect")  # 112 × 132, the next sizes that fit
    with torch.inference_mode():
        logits = model(torch.from_numpy(padded)[None, None])[0].permute(1, 2, 0).numpy()[:70, :90]
    agree(labels, logits)
    assert (read("tiled") == labels).mean() > 0.999
    assert files_below(tmp_path / "whole") == sorted([source.name, "image_overlay.png"])


def test_evaluate_model_and_predictions_agree(phantoms, checkpoint, tmp_path, capsys):
    assert run("segment", checkpoint, phantoms, "--out", tmp_path / "p", "--device", "cpu") == 0
    assert run("evaluate", checkpoint, phantoms, "--csv", tmp_path / "a.csv", "--device", "cpu") == 0
    capsys.readouterr()
    assert run("evaluate", tmp_path / "p", phantoms, "--csv", tmp_path / "b.csv") == 0
    text = capsys.readouterr().out
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    with open(tmp_path / "a.csv", newline="") as file:
        rows = {(r["case"], r["kind"], r["structure"]): r for r in csv.DictReader(file)}
    case = discover_cases(phantoms)[1]
    truth = read_labels(case.label, case.label_map)
    predicted = read_labels(tmp_path / "p" / f"{CASE}.nii.gz", case.label_map)
    structures = {("class", name): (i,) for i, name in enumerate(case.label_map.class_names) if i}
    structures |= {("region", name): classes for name, classes in case.label_map.regions.items()}
    for (kind, name), classes in structures.items():
        t, p = np.isin(truth, classes), np.isin(predicted, classes)
        row = rows[CASE, kind, name]
        assert float(row["dice"]) == pytest.approx(2 * (t & p).sum() / (t.sum() + p.sum()), abs=1e-6)
        assert float(row["sensitivity"]) == pytest.approx((t & p).sum() / t.sum(), abs=1e-6)
        assert float(row["specificity"]) == pytest.approx((~t & ~p).sum() / (~t).sum(), abs=1e-6)
        assert (int(row["truth_voxels"]), int(row["predicted_voxels"])) == (t.sum(), p.sum())
    dice = [float(r["dice"]) for (c, kind, _), r in rows.items() if kind == "class" and c != "mean"]
    assert f"Mean foreground Dice: {np.mean(dice):.3f}." in text


@pytest.mark.parametrize("rule, shown", [("one", "1.000"), ("skip", "–")])
def test_the_rule_for_empty_structures(rule, shown, tmp_path, capsys):
    """Class 4 (enhancing) is empty in both, class 1 is predicted where there is none."""
    truth, predicted = np.zeros((2, 8, 8, 8), dtype=np.uint8)
    truth[:4, :, :4] = predicted[:4, :, 2:6] = 2
    predicted[7] = 1
    for name, data in (("t", truth), ("p", predicted)):
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")
    line = ["evaluate", tmp_path / "p.nii.gz", tmp_path / "t.nii.gz", "--labels", "brats2021", "--empty", rule]
    assert run(*line) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("t "))
    necrotic, oedema, enhancing, *_ = row.split()[1:]
    assert oedema == "0.500"
    assert enhancing == shown
    assert necrotic == {"one": "0.000", "skip": "–"}[rule]


def test_overlay_shows_the_slice_with_most(phantoms, checkpoint, tmp_path):
    assert run("segment", checkpoint, phantoms / CASE, "--out", tmp_path, "--overlay", "--device", "cpu") == 0
    assert (tmp_path / f"{CASE}.png").read_bytes().startswith(b"\x89PNG")
    stack = np.zeros((5, 9, 9), dtype=np.uint8)
    stack[1, :, :] = 2  # much of one class
    stack[3, :5], stack[3, 5:7], stack[3, 7:] = 1, 2, 3  # as much, of three
    assert best_slice(stack) == 3


def measured(*line: object) -> int:
    """Runs ``fastunet``; prints its memory in MiB before a case is opened, and at most, and the number of batches."""

    def status(key):
        return int(next(each for each in open("/proc/self/status") if each.startswith(key)).split()[1]) / 1024

    # Batches are alike, so two of them run the network and the others only pass through.
    real, opened, calls = Segmenter._run, Segmenter.open, []

    def few(self, forward, images):
        calls.append(1)
        if len(calls) <= 2:
            yield from real(self, forward, images)
        else:
            shape = (len(images), 4, 240, 240) if forward is self._network else (len(images), 240, 240)
            yield slice(None), slice(None), torch.zeros(shape, dtype=torch.float32 if len(shape) == 4 else torch.uint8)

    def open_case(self, *args, **kwargs):
        print("before", status("VmRSS"))
        return opened(self, *args, **kwargs)

    Segmenter._run, Segmenter.open = few, open_case
    code = run(*line)
    print("peak", status("VmHWM"), len(calls))
    return code


@pytest.fixture(scope="module")
def whole_case(tmp_path_factory):
    """A case of 240 × 240 × 155."""
    folder = tmp_path_factory.mktemp("whole") / "case"
    folder.mkdir()
    data = np.zeros((240, 240, 155), dtype=np.int16)
    data[40:200, 30:210] = np.random.default_rng(0).integers(1, 1000, (160, 180, 155))
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), folder / "c_flair.nii.gz")
    shutil.copy(folder / "c_flair.nii.gz", folder / "c_t1ce.nii.gz")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("option", [None, "--probabilities"])
def test_memory_of_a_whole_case(option, whole_case, tmp_path):
    """The full network on 240 × 240 × 155 stays 400 MB above the model and the two input volumes."""
    write_checkpoint(tmp_path / "full.safetensors", width=32, depth=4)
    line = ["segment", tmp_path / "full.safetensors", whole_case, "--out", tmp_path / "out", "--threads", "1"]
    line += ["--device", "cpu", *([option] if option else [])]
    assert ended(start(measured, *line, told=tmp_path / "told")) == 0, (tmp_path / "told.err").read_text()
    words = (tmp_path / "told.out").read_text().split()
    before, peak = float(words[words.index("before") + 1]), float(words[words.index("peak") + 1])
    assert int(words[-1]) == 39
    volumes = 2 * 240 * 240 * 155 * 4 / 2**20
    assert peak - before - volumes < 400 * 1e6 / 2**20, f"{peak - before - volumes:.0f} MiB"
