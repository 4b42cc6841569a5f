"""Overlapping regions from the folder to the label file: trained, judged, resumed, segmented and scored as such."""

from __future__ import annotations

import csv
import dataclasses
import json

import nibabel
import numpy as np
import pytest
import torch

import fastunet
from fastunet.data import IGNORED, LABEL_MAPS, SliceDataset, discover_cases, split_cases
from fastunet.data.label_tables import brats_regions
from fastunet.errors import UserError
from fastunet.functional.dice_regions import region_table
from fastunet.inference.segmenter import Segmenter
from fastunet.losses import RegionDiceCrossEntropyLoss
from fastunet.metrics import SegmentationMetrics
from fastunet.training.checkpoint import Progress, load_model
from fastunet.training.config import TrainConfig
from fastunet.training.distributed import Processes
from fastunet.training.plan import trained_labels
from fastunet.training.results import judged_by, metric_columns
from tests.cli_helpers import TINY, assert_user_error, read_log, run, write_checkpoint

LABELS = {"background": 0, "whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": 4, "ignore": 7}
SHORT = [*TINY, "--epochs", 1, "--dropout", 0, "--no-augment", "--val-fraction", 0.5]


@pytest.fixture(scope="module")
def nnunet(phantoms, tmp_path_factory):
    """The phantoms as an nnU-Net folder with regions and an ignored corner."""
    root = tmp_path_factory.mktemp("nnunet")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir()
    for case in sorted(path for path in phantoms.iterdir() if path.is_dir()):
        for channel, part in enumerate(("flair", "t1ce")):
            (root / "imagesTr" / f"{case.name}_{channel:04d}.nii.gz").symlink_to(case / f"{case.name}_{part}.nii.gz")
        volume = nibabel.load(case / f"{case.name}_seg.nii.gz")
        values = np.asarray(volume.dataobj).astype(np.uint8)
        values[:4, :4] = 7
        nibabel.save(nibabel.Nifti1Image(values, volume.affine), root / "labelsTr" / f"{case.name}.nii.gz")
    table = {"channel_names": {"0": "flair", "1": "t1ce"}, "labels": LABELS, "regions_class_order": [2, 1, 4],
             "file_ending": ".nii.gz", "numTraining": 4}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="module")
def trained(nnunet, tmp_path_factory):
    """A run of one epoch on it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", nnunet, "--out", folder, *SHORT) == 0
    return folder


def test_an_epoch_equals_a_loop_written_out(nnunet, trained, tmp_path):
    """Losses and Dice are those of a plain loop: targets in memory, sigmoids, painting by masks."""
    cases = discover_cases(nnunet)
    labels = cases[0].label_map
    split = split_cases(cases, validation=0.5, seed=0)
    options = dict(cache_dir=tmp_path / "c", modalities=("flair", "t1ce"))
    slices = SliceDataset(split.train, **options, foreground_fraction=0.5, skip_empty=True, seed=0)
    unseen = SliceDataset(split.validation, **options)
    torch.manual_seed(0)
    model = fastunet.UNet(width=4, depth=2, num_classes=3, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def loss(logits, classes):
        t = torch.from_numpy(labels.encode_regions(classes.numpy()).astype(np.float32)).transpose(0, 1)
        counts = (classes != IGNORED)[:, None].expand_as(t).float()
        t, p = t * counts, logits.sigmoid() * counts
        dice = (2 * (p * t).sum((0, 2, 3)) + 1) / ((p + t).sum((0, 2, 3)) + 1)
        cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, t, weight=counts, reduction="sum")
        return 1 - dice.mean() + cross / counts.sum()

    losses = []
    for batch in slices.batches(8, 0):
        images, classes = slices.load(batch.indices)
        value = loss(model(images.to(memory_format=torch.channels_last)), classes)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    metrics = SegmentationMetrics(4, labels.class_names, regions=labels.regions, ignore_index=IGNORED)
    model.eval()
    for batch in unseen.batches(8, shuffle=False):
        images, classes = unseen.load(batch.indices)
        inside = (model(images).sigmoid() > 0.5).transpose(0, 1).numpy()
        metrics.update(torch.from_numpy(labels.decode_regions(inside)), classes)
    row = read_log(trained)[0]
    assert float(row["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    found = metrics.compute()["regions"]
    for name in labels.regions:
        assert float(row[f"dice_{name}"]) == pytest.approx(found[name]["dice"], abs=2e-3)
    assert float(row["dice_regions"]) == pytest.approx(np.mean([float(row[f"dice_{name}"]) for name in labels.regions]))
    # a class that shares its name with a region
    assert "dice_enhancing tumour (class)" in row


def test_the_run_is_resumed_segmented_and_scored(nnunet, trained, tmp_path, capsys):
    model, card = load_model(trained)
    assert (model.architecture.num_classes, card.regions) == (3, True)
    assert card.label_map.outputs == ("whole tumour", "tumour core", "enhancing tumour")
    assert run("train", nnunet, "--out", trained, "--resume", "--epochs", 2) == 0
    assert [row["epoch"] for row in read_log(trained)] == ["1", "2"]
    assert run("train", nnunet, "--out", trained, "--resume", "--regions", "none") == 2
    assert "without --regions; it cannot resume with --regions none" in capsys.readouterr().err
    case = next((nnunet / "imagesTr").iterdir()).name.removesuffix("_0000.nii.gz").removesuffix("_0001.nii.gz")
    assert run("segment", trained, nnunet, "--out", tmp_path, "--probabilities", "--device", "cpu", "--overlay") == 0
    values = np.asarray(nibabel.load(tmp_path / f"{case}.nii.gz").dataobj)
    painted = np.zeros_like(values)
    for name, value in zip(("whole_tumour", "tumour_core", "enhancing_tumour"), (2, 1, 4), strict=True):
        probability = np.asarray(nibabel.load(tmp_path / f"{case}_prob_{name}.nii.gz").dataobj)
        assert (probability >= 0).all()
        assert (probability <= 1).all()
        painted[probability > 0.5] = value
    assert np.array_equal(values, painted)
    assert run("segment", trained, nnunet, "--out", tmp_path / "labels", "--device", "cpu", "--tile", 72) == 0
    again = np.asarray(nibabel.load(tmp_path / "labels" / f"{case}.nii.gz").dataobj)
    assert set(np.unique(again)) <= {0, 1, 2, 4}
    capsys.readouterr()
    assert run("evaluate", trained, nnunet, "--device", "cpu", "--csv", tmp_path / "scores.csv") == 0
    said = capsys.readouterr().out
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    regions = [row for row in rows if row["kind"] == "region" and row["case"] != "mean"]
    assert {row["structure"] for row in regions} == {"whole tumour", "tumour core", "enhancing tumour"}
    mean = np.mean([float(row["dice"]) for row in regions])
    assert f"Mean region Dice: {mean:.3f}." in said
    (overall,) = (row for row in rows if row["kind"] == "mean")
    assert float(overall["dice"]) == pytest.approx(mean, abs=1e-6)


def test_mirror_images_are_averaged_before_regions_are_painted(trained):
    model, card = load_model(trained)
    card = dataclasses.replace(card, flips=(-1,))
    segmenter = Segmenter(model, card, torch.device("cpu"), tta=True)
    images = np.random.default_rng(0).normal(size=(2, 2, 16, 16)).astype(np.float32)
    labels, maps = segmenter.probabilities(images)
    with torch.no_grad():
        x = torch.from_numpy(images)
        expected = (model(x).sigmoid() + model(x.flip(-1)).sigmoid().flip(-1)) / 2
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    assert np.array_equal(labels, card.label_map.decode_regions(maps.swapaxes(0, 1) > 0.5))
    assert np.array_equal(segmenter.predict(images), labels)


def test_regions_of_brats_are_asked_for(phantoms, tmp_path, capsys):
    assert run("train", phantoms, "--out", tmp_path / "run", *SHORT, "--regions", "brats", "--loss", "ce") == 0
    said = capsys.readouterr().err
    assert "written in this order: whole tumour (as 2), tumour core (as 1), enhancing tumour (as 4)" in said
    model, card = load_model(tmp_path / "run")
    assert (model.architecture.num_classes, card.regions) == (3, True)
    assert TrainConfig.read(tmp_path / "run").regions == "brats"


def test_classes_are_trained_if_asked_and_regions_of_other_folders_refused(nnunet, tmp_path, capsys):
    assert run("train", nnunet, "--out", tmp_path / "run", *SHORT, "--regions", "none", "--loss", "dice") == 0
    model, card = load_model(tmp_path / "run")
    assert (model.architecture.num_classes, card.regions, card.label_map.region_order) == (4, False, ())
    assert "dice_regions" not in read_log(tmp_path / "run")[0]
    other = dataclasses.replace(LABEL_MAPS["brats2021"], regions={"all": (1, 2, 3)})
    with pytest.raises(UserError, match="DATA: --regions brats needs labels of BraTS; these are 0 background"):
        trained_labels("brats", other, "DATA")
    own = dataclasses.replace(other, region_order=(1,))
    with pytest.raises(UserError, match=r"DATA has regions of its own \(all\), trained without --regions"):
        trained_labels("brats", own, "DATA")
    many = dataclasses.replace(other, regions={f"r{i}": (1,) for i in range(33)}, region_order=(1,) * 33)
    with pytest.raises(UserError, match="DATA has 33 regions, more than 32; --regions none trains its classes"):
        trained_labels(None, many, "DATA")
    capsys.readouterr()
    assert_user_error(capsys, run("train", nnunet, "--out", tmp_path / "x", "--regions", "all"), "--regions")
    code = run("train", nnunet, "--out", tmp_path / "x", *SHORT, "--border-weights")
    assert_user_error(capsys, code, "--border-weights is for exclusive classes")


def test_runs_from_before_keep_their_classes(nnunet, trained, tmp_path):
    """Their configuration and their card do not know the option; the table of labels may order regions all the same."""
    stored = json.loads((trained / "config.json").read_text())
    assert stored.pop("regions") is None
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert TrainConfig.read(tmp_path).regions == "none"
    write_checkpoint(tmp_path / "best.safetensors")
    _, card = load_model(tmp_path)
    assert card.label_map.outputs == card.label_map.class_names


@pytest.mark.parametrize("table", LABEL_MAPS.values(), ids=LABEL_MAPS)
def test_regions_of_every_edition_give_its_classes_back(table):
    labels = brats_regions(table, "DATA")
    classes = np.arange(len(table.values), dtype=np.uint8).reshape(1, -1)
    assert np.array_equal(labels.decode_regions(labels.encode_regions(classes).astype(bool)), classes)
    bits = region_table(list(labels.regions.values()), len(table.values))
    inside = labels.encode_regions(classes)[:, 0].T  # of each class
    assert [sum(1 << r for r in np.flatnonzero(row)) for row in inside] == bits.tolist()
    # a region alone is written as one of its own classes
    for row, members in zip(np.eye(len(labels.regions), dtype=bool), labels.regions.values(), strict=True):
        assert labels.decode_regions(row[:, None])[0] in members


def test_epochs_are_judged_by_the_mean_of_the_regions():
    metrics = SegmentationMetrics(3, ["background", "a", "b"], regions={"a": (1, 2), "regions": (2,)})
    metrics.update(torch.tensor([[[0, 1], [1, 0]]]), torch.tensor([[[0, 1], [1, 2]]]))
    columns = metric_columns(metrics)
    assert columns["dice_a"] == pytest.approx(0.8)
    assert columns["dice_a (class)"] == 1
    assert columns["dice_regions (region)"] == 0
    assert judged_by(columns) == columns["dice_regions"] == pytest.approx(0.4)
    assert columns["dice_foreground"] == pytest.approx(0.5)


def test_the_loss_of_a_run_is_that_of_its_options():
    from fastunet.training.learner import _loss

    class Data:
        labels, ignored = brats_regions(LABEL_MAPS["brats2021"], "DATA"), None

    one = Processes(0, 1, torch.device("cpu"))
    found = {name: _loss(TrainConfig(data="", loss=name), one, Data, [1, 2, 3]) for name in ("ce", "dice", "dice_ce")}
    assert all(isinstance(loss, RegionDiceCrossEntropyLoss) for loss in found.values())
    assert all(loss.region_weights.tolist() == [1, 2, 3] for loss in found.values())
    weights = {name: (loss.options["ce_weight"], loss.options["dice_weight"]) for name, loss in found.items()}
    assert weights == {"ce": (1, 0), "dice": (0, 1), "dice_ce": (1, 1)}


def test_patience_counts_from_the_best_epoch_of_the_regions():
    """The Dice by which epochs are compared is that of the regions, whatever the classes have."""
    row = dict(step=1, train_loss=0.5, dice_foreground=0.3)
    history = [row | dict(epoch=1, dice_regions=0.4), row | dict(epoch=2, dice_regions=0.6),
               row | dict(epoch=3, dice_regions=0.5)]  # fmt: skip
    assert Progress(epoch=3, best=0.6, history=history).best_epoch == 2
