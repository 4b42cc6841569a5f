"""The training loop: what it computes, writes and refuses."""

from __future__ import annotations

import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fastunet
from fastunet.data import SliceDataset, discover_cases, split_cases
from fastunet.errors import UserError
from fastunet.losses import DiceCrossEntropyLoss
from fastunet.metrics import SegmentationMetrics
from fastunet.training.checkpoint import Progress, load_model, load_state, save_state
from fastunet.training.config import TrainConfig
from fastunet.training.distributed import Processes
from fastunet.training.learner import batch_seed
from fastunet.training.loading import prefetched
from fastunet.training.precision import loss_scaler
from fastunet.training.run import train
from tests.cli_helpers import TINY, assert_user_error, files_below, read_log, run, write_checkpoint

ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


def test_two_epochs_equal_a_loop_written_out(phantoms, tmp_path):
    """Losses, metrics and final weights are those of a plain loop over the same slices."""
    options = dict(epochs=2, batch_size=8, seed=5, augment=False, schedule="cosine", foreground_fraction=0.75)
    config = TrainConfig(data=str(phantoms), width=4, depth=2, dropout=0.0, device="cpu", **options)
    train(config, tmp_path / "run", ONE_PROCESS, quiet=True)
    split = split_cases(discover_cases(phantoms), validation=0.2, seed=5)
    slices = SliceDataset(split.train, cache_dir=tmp_path / "c", foreground_fraction=0.75, skip_empty=True, seed=5)
    unseen = SliceDataset(split.validation, cache_dir=tmp_path / "c")
    torch.manual_seed(5)
    model = fastunet.UNet(width=4, depth=2, dropout=0.0)
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), DiceCrossEntropyLoss()
    steps, step = slices.steps(8), 0
    for epoch, row in enumerate(read_log(tmp_path / "run")):
        losses = []
        for batch in slices.batches(8, epoch):
            images, labels = slices.load(batch.indices)
            rate = 1e-3 * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / (2 * steps))))
            optimizer.param_groups[0]["lr"] = rate
            value = loss(model(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            step += 1
        assert float(row["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-6)
        assert float(row["learning_rate"]) == pytest.approx(rate, rel=1e-12)
        metrics = SegmentationMetrics(4, ["background", "necrotic core", "oedema", "enhancing tumour"])
        model.eval()
        with torch.no_grad():
            for batch in unseen.batches(8, shuffle=False):
                images, labels = unseen.load(batch.indices)
                metrics.update(model(images.to(memory_format=torch.channels_last)), labels)
        model.train()
        result = metrics.compute()
        assert float(row["accuracy"]) == pytest.approx(result["accuracy"], abs=1e-4)
        assert float(row["dice_oedema"]) == pytest.approx(result["classes"]["oedema"]["dice"], abs=1e-3)
    trained, card = load_model(tmp_path / "run" / "last.safetensors")
    for (name, weight), other in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert (weight - other).abs().max() <= 1e-6, name
    assert card.modalities == ("flair", "t1ce")
    assert card.labels["values"] == [0, 1, 2, 4]


def test_files_of_a_run(phantoms, tmp_path, capsys):
    assert run("train", phantoms, "--out", tmp_path, *TINY, "--epochs", "2", "--loss", "dice") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}\n"
    lines = captured.err.splitlines()
    assert lines[0] == "training cases: 3 (45 slices), validation cases: 1 (17 slices) of 32×32, flair, t1ce"
    assert [line.split(":")[0] for line in lines[1:]] == ["classes by label value", "epoch 1/2", "epoch 2/2"]
    files = {name for name in files_below(tmp_path) if not name.startswith("cache/")}
    weights = {"best.safetensors", "last.safetensors", "state.safetensors"}
    assert files == {"config.json", "curves.png", "log.csv"} | weights
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["loss"], config["epochs"], config["width"]) == ("dice", 2, 4)
    rows = read_log(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for column in ("accuracy", "mean_iou", "dice", "precision", "sensitivity", "specificity", "dice_necrotic core",
                   "dice_oedema", "dice_enhancing tumour"):  # fmt: skip
        assert 0 <= float(rows[1][column]) <= 1
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(fastunet.UNet(width=4, depth=2).state_dict())


def test_precision_changes_the_arithmetic_a_little(phantoms, tmp_path):
    options = [*TINY, "--epochs", "1", "--no-augment", "--dropout", "0"]
    losses = {}
    for name in ("fp32", "bf16", "fp16"):
        assert run("train", phantoms, "--out", tmp_path / name, *options, "--precision", name) == 0
        losses[name] = float(read_log(tmp_path / name)[0]["train_loss"])
    for precision in ("bf16", "fp16"):
        assert 0 < abs(losses["fp32"] - losses[precision]) < 0.1 * losses["fp32"], precision
        # The loss scale of fp16 starts so high that steps are skipped until it has been halved often enough.
        with safe_open(tmp_path / precision / "state.safetensors", framework="pt") as file:
            scaler = json.loads(file.metadata()["fastunet_state"])["scaler"]
            skipped = math.log2(65536 / scaler["scale"]) if precision == "fp16" else 0
            assert file.get_tensor("optimizer.step.head.bias").item() == 6 - skipped
            assert skipped <= 3


def test_tf32_needs_a_gpu(phantoms, tmp_path, capsys):
    code = run("train", phantoms, "--out", tmp_path / "run", *TINY, "--precision", "tf32")
    assert_user_error(capsys, code, "tf32", "CUDA")


def test_valid_network_learns_from_cropped_labels(phantoms, tmp_path):
    options = ["--preset", "isbi", "--width", "4", "--depth", "1", "--dropout", "0", "--size", "30", "--device", "cpu"]
    assert run("train", phantoms, "--out", tmp_path, *options, "--epochs", "3", "--learning-rate", "0.01") == 0
    rows = read_log(tmp_path)
    assert float(rows[-1]["train_loss"]) < 0.9 * float(rows[0]["train_loss"])


def test_dropout_and_augmentation_draw_anew_in_every_batch():
    seeds = {batch_seed(s, e, b, r) for s in range(3) for e in range(3) for b in range(20) for r in range(2)}
    assert len(seeds) == 360
    assert batch_seed(1, 2, 3, 0) == batch_seed(1, 2, 3, 0)
    assert max(seeds) < 2**63


def test_state_round_trip_restores_every_bit(tmp_path):
    def build(seed: int):
        torch.manual_seed(seed)
        model = fastunet.UNet(width=2, depth=1)
        return model, torch.optim.Adam(model.parameters(), fused=True), loss_scaler(torch.device("cpu"), "fp16")

    model, optimizer, scaler = build(0)
    for _ in range(3):
        scaler.scale(model(torch.randn(1, 2, 8, 8)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    progress = Progress(epoch=1, batch=7, step=31, loss_sum=1 / 3, best=0.1, history=[{"epoch": 1, "x": 2 / 7}])
    save_state(tmp_path / "state", model, optimizer, scaler, progress)
    other, other_optimizer, other_scaler = build(1)
    assert load_state(tmp_path / "state", other, other_optimizer, other_scaler) == progress
    assert other_scaler.state_dict() == scaler.state_dict()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for slot, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][slot]), (name, slot)
            assert value.stride() == other_optimizer.state[b][slot].stride(), (name, slot)
    write_checkpoint(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="holds no training state"):
        load_state(tmp_path / "weights.safetensors", other, other_optimizer, other_scaler)
    wide = fastunet.UNet(width=4, depth=1)
    with pytest.raises(UserError, match="another architecture"):
        load_state(tmp_path / "state", wide, torch.optim.Adam(wide.parameters()), other_scaler)


def test_prefetching_keeps_order_raises_and_stops():
    assert [item for item, _ in prefetched(iter(range(7)))] == list(range(7))

    def failing():
        yield 1
        raise UserError("bad file")

    with pytest.raises(UserError, match="bad file"):
        list(prefetched(failing()))
    endless = prefetched(iter(int, 1))
    next(endless)
    endless.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]

    def slow():
        for _ in range(2):
            time.sleep(0.1)
            yield 0

    assert sum(waited for _, waited in prefetched(slow())) > 0.15


def test_what_a_resumed_run_may_change():
    config = TrainConfig(data="a", epochs=3)
    assert config.resumed_with({"epochs": 5, "data": "b", "threads": 1}).epochs == 5
    with pytest.raises(UserError, match="with --batch-size 8; it cannot resume with --batch-size 4"):
        config.resumed_with({"batch_size": 4})
    with pytest.raises(UserError, match="started with --augment; it cannot resume without --augment"):
        config.resumed_with({"augment": False})
    with pytest.raises(UserError, match="started without --modalities; it cannot resume with --modalities t1,t2"):
        config.resumed_with({"modalities": ["t1", "t2"]})


def test_a_class_called_foreground_is_not_the_mean():
    from fastunet.metrics import SegmentationMetrics
    from fastunet.training.results import metric_columns

    metrics = SegmentationMetrics(3, ["background", "foreground", "rim"])
    metrics.update(torch.tensor([[[0, 1], [1, 0]]]), torch.tensor([[[0, 1], [1, 2]]]))
    columns = metric_columns(metrics)
    assert columns["dice_foreground"] == pytest.approx(0.5)
    assert columns["dice_foreground (class)"] == 1
    assert columns["dice_rim"] == 0
