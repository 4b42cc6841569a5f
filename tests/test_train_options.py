"""Schedules, decay, clipping, averaged and class weights, and the end by patience: what each computes, and resumes."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch

import fastunet
from fastunet.data import LABEL_MAPS, SliceDataset, discover_cases, read_labels, split_cases
from fastunet.errors import DataWarning, UserError
from fastunet.losses import DiceCrossEntropyLoss
from fastunet.training import dataset, learner
from fastunet.training.config import TrainConfig
from fastunet.training.distributed import Processes
from fastunet.training.precision import prepare
from fastunet.training.run import train
from tests.cli_helpers import TINY, assert_user_error, run

ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


def rates(schedule: str, **options) -> list[float]:
    config = TrainConfig(data="d", epochs=5, learning_rate=2.0, schedule=schedule, **options)
    return [config.learning_rate_at(step, 4) for step in range(20)]


def test_schedules_and_their_warm_up():
    warm = dict(warm_up=1.5)
    assert rates("constant") == [2.0] * 20
    assert rates("constant", **warm) == [2 * n / 6 for n in range(1, 7)] + [2.0] * 14
    for schedule, share in (("cosine", lambda x: 0.01 + 0.99 * math.cos(math.pi * x / 2) ** 2),
                            ("poly", lambda x: (1 - x) ** 0.9)):  # fmt: skip
        assert rates(schedule) == pytest.approx([2 * share(step / 20) for step in range(20)])
        assert rates(schedule, **warm)[:6] == [2 * n / 6 for n in range(1, 7)]
        assert rates(schedule, **warm)[6:] == pytest.approx([2 * share(step / 14) for step in range(14)])


def test_options_equal_a_loop_written_out(phantoms, tmp_path):
    """Decay, clipping, averaging, class weights and a schedule at once; the average is what is validated and saved."""
    weights = [0.1, 1.0, 2.0, 0.5]
    config = TrainConfig(data=str(phantoms), width=4, depth=2, dropout=0.0, device="cpu", epochs=1, seed=5,
                         augment=False, learning_rate=0.01, schedule="poly", warm_up=0.25, weight_decay=0.1,
                         clip_norm=0.3, ema=0.6, class_weights=weights, tversky=(0.3, 0.7))  # fmt: skip
    train(config, tmp_path / "run", ONE_PROCESS, quiet=True)
    split = split_cases(discover_cases(phantoms), validation=0.2, seed=5)
    slices = SliceDataset(split.train, cache_dir=tmp_path / "c", foreground_fraction=0.5, skip_empty=True, seed=5)
    torch.manual_seed(5)
    model = fastunet.UNet(width=4, depth=2, dropout=0.0)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    loss, moments, steps = DiceCrossEntropyLoss(class_weights=weights, tversky=(0.3, 0.7)), {}, slices.steps(8)
    assert steps >= 6
    clipped = 0
    for step, batch in enumerate(slices.batches(8, 0)):
        images, labels = slices.load(batch.indices)
        model.zero_grad()
        loss(model(images.to(memory_format=torch.channels_last)), labels).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        clipped += norm > 0.3
        warm_up = round(0.25 * steps)
        rate = 0.01 * ((step + 1) / warm_up if step < warm_up else (1 - (step - warm_up) / (steps - warm_up)) ** 0.9)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            gradient = parameter.grad * min(1.0, 0.3 / norm)
            first, second = moments.get(name, (torch.zeros_like(gradient),) * 2)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[name] = first, second
            change = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            parameter.data -= rate * (0.1 * parameter.data + change)
            average[name] = decay * average[name] + (1 - decay) * parameter.data
    assert clipped > 0
    saved = {name: safetensors.torch.load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("last", "state")}
    for name, value in model.state_dict().items():
        assert (saved["state"][f"model.{name}"] - value).abs().max() <= 2e-5, name
        assert (saved["last"][name] - average[name]).abs().max() <= 2e-5, name
        assert torch.equal(saved["state"][f"average.{name}"], saved["last"][name])
    assert max((saved["state"][f"model.{n}"] - v).abs().max() for n, v in average.items()) > 1e-3


def test_augmentation_begins_after_the_first_thousand_slices(phantoms, tmp_path, monkeypatch):
    """Of volumes, and counted in slices, so that neither batch nor processes matter."""
    shares, augment = [], dataset.augment

    def noted(*args, share, **options):
        shares.append(share)
        return augment(*args, share=share, **options)

    monkeypatch.setattr(dataset, "augment", noted)
    monkeypatch.setattr(dataset, "_PLAIN_SLICES", 90)
    assert run("train", phantoms, "--out", tmp_path, *TINY, "--epochs", 5) == 0
    epochs = [shares[start : start + 6] for start in range(0, 30, 6)]
    assert [set(each) for each in epochs] == [{0.0}, {0.0}, {0.0}, {0.5}, {1.0}]


def test_without_decay_adamw_is_adam():
    ends = []
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        weight = torch.linspace(-1, 1, 40).requires_grad_()
        optimizer = kind([weight], lr=0.1, weight_decay=0.0, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            (weight.sin() ** 2).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_a_resumed_run_has_the_same_average(phantoms, tmp_path, monkeypatch):
    options = [*TINY, "--epochs", 2, "--ema", 0.9, "--clip-norm", 0.5, "--weight-decay", 0.01, "--schedule", "poly",
               "--warm-up", 0.5, "--threads", 1, "--checkpoint-every", 0]  # fmt: skip
    assert run("train", phantoms, "--out", tmp_path / "whole", *options) == 0
    step, left = learner.Learner.step, 8

    def interrupted(self, *args, **options):
        nonlocal left
        left -= 1
        if left == 0:
            raise UserError("the power is off")
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "step", interrupted)
        assert run("train", phantoms, "--out", tmp_path / "run", *options) == 2
    assert run("train", phantoms, "--out", tmp_path / "run", "--resume") == 0
    for name in ("best", "last", "state"):
        wanted, found = (safetensors.torch.load_file(tmp_path / f / f"{name}.safetensors") for f in ("whole", "run"))
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name


def test_patience_ends_a_run_and_more_of_it_goes_on(phantoms, tmp_path, capsys):
    """With a learning rate of nothing no epoch is better than the first."""
    line = ["train", phantoms, "--out", tmp_path, *TINY, "--epochs", 9, "--learning-rate", 1e-30, "--patience", 2]
    for given, epochs in (([], 3), (["--resume"], 3), (["--resume", "--patience", "3"], 4)):
        assert run(*line, *given) == 0
        said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("stopped")]
        assert len(said) == 1
        assert f"in epoch 1 in {epochs - 1} epochs" in said[0]
        with open(tmp_path / "log.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == epochs
    assert TrainConfig.read(tmp_path).patience == 3  # what a further --resume without options goes by


def test_clipping_sees_gradients_without_the_loss_scale(phantoms, tmp_path, monkeypatch):
    """The norm of this network's gradient is about 10; with the scale of fp16 it would be above 10,000."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item()))
    assert run("train", phantoms, "--out", tmp_path, *TINY, "--epochs", 1, "--precision", "fp16", "--size", 16,
               "--clip-norm", 1) == 0  # fmt: skip
    finite = [norm for norm in norms if math.isfinite(norm)]
    assert len(finite) >= 3
    assert max(finite) < 200


def test_balanced_weights_are_inverse_to_the_pixels(phantoms, tmp_path):
    cases = discover_cases(phantoms)
    data = SliceDataset(cases, cache_dir=tmp_path, skip_empty=True)
    config = TrainConfig(data="d", class_weights="balanced")
    holder = type("Data", (), dict(train=data, labels=cases[0].label_map))
    counts = sum(np.bincount(read_labels(case.label, case.label_map).ravel(), minlength=4) for case in cases)
    counts[0] = sum((data.whole(index)[1] == 0).sum().item() for index in range(len(data)))
    weights = learner.class_weights(config, holder)
    assert np.mean(weights) == pytest.approx(1)
    assert np.ptp(weights * counts) < 1e-9 * weights[0] * counts[0]
    names = [*LABEL_MAPS["brats2021"].class_names, "cavity"]
    one_more = type("Labels", (), dict(class_names=names, outputs=names, region_order=()))
    with pytest.raises(UserError, match="no training slice holds cavity"):
        learner.class_weights(config, type("Data", (), dict(train=data, labels=one_more)))


@pytest.mark.parametrize("options, words", [
    (["--class-weights", "1,2"], ["2 numbers", "4 outputs"]),
    (["--class-weights", "0,0,0,0"], ["not all 0"]),
    (["--tversky", "0.3,0.7", "--loss", "ce"], ["--tversky 0.3,0.7", "not ce"]),
    (["--tversky", "0,0"], ["--tversky 0,0"]),
    (["--dropout", "1"], ["dropout is 1.0"]),
    (["--depth", "99"], ["depth is 99"]),
    (["--warm-up", 20], ["--warm-up is 20 epochs of 20"]),
])  # fmt: skip
def test_options_that_cannot_be_honoured(options, words, phantoms, tmp_path, capsys):
    assert_user_error(capsys, run("train", phantoms, "--out", tmp_path / "run", *TINY, *options), *words)
    assert not (tmp_path / "run" / "cache").exists(), "hours of work before they are told"


def test_a_network_larger_than_the_memory(phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learner, "memory_of", lambda device: 1 << 16)
    code = run("train", phantoms, "--out", tmp_path / "run", *TINY)
    assert_user_error(capsys, code, "a network of 7,", "cpu has 0; a smaller --depth or --width takes less")


def test_images_larger_than_the_memory(phantoms, tmp_path, capsys):
    code = run("train", phantoms, "--out", tmp_path / "run", *TINY, "--size", 60000)
    assert_user_error(capsys, code, "the maps of 8 images of 60000×60000 take", "a smaller --size or --batch-size")


@pytest.mark.parametrize("options", [["--class-weights", "1,x"], ["--class-weights", "1,-1"],
                                     ["--class-weights", "1,1,1,1e300"], ["--tversky", "1e39,1"], ["--ema", "1"],
                                     ["--clip-norm", "0"], ["--patience", "0"], ["--tversky", "1"]])  # fmt: skip
def test_numbers_out_of_range(options, tmp_path, capsys):
    assert_user_error(capsys, run("train", tmp_path, "--out", tmp_path / "run", *options), *options[:1])


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9")
def test_precision_is_that_asked_for_whatever_the_process_inherits():
    """fp32 stays fp32 where everything inherits tf32, and the older switches can still be read."""
    matmul, cudnn, before = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.fp32_precision
    try:
        for inherited in ("tf32", "ieee"):
            torch.backends.fp32_precision = inherited
            prepare(torch.device("cpu"), "fp32")
            assert {matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} == {"ieee"}
            assert not matmul.allow_tf32
            assert not cudnn.allow_tf32
    finally:
        torch.backends.fp32_precision = before


def test_a_run_of_an_older_version_says_that_its_augmentation_was_another(tmp_path):
    TrainConfig(data="d").write(tmp_path)
    TrainConfig.read(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["turns"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.warns(DataWarning, match="older version"):
        TrainConfig.read(tmp_path)
