"""Damaged and hostile checkpoints, states and configurations: one sentence each, and never other results."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastunet
from fastunet.errors import UserError
from fastunet.training import tensor_file
from fastunet.training.checkpoint import Progress, load_model, load_state, save_state, save_weights
from fastunet.training.config import TrainConfig
from fastunet.training.precision import loss_scaler
from fastunet.training.tensor_file import NotFinite
from tests.cli_helpers import TINY, assert_user_error, files_below, run, write_checkpoint


@pytest.fixture
def weights(tmp_path) -> Path:
    write_checkpoint(tmp_path / "weights.safetensors", width=2, depth=1)
    return tmp_path / "weights.safetensors"


def trained(seed: int = 0):
    torch.manual_seed(seed)
    model = fastunet.UNet(width=2, depth=1)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.randn(1, 2, 8, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer, loss_scaler(torch.device("cpu"), "fp32")


@pytest.fixture
def state(tmp_path) -> Path:
    save_state(tmp_path / "state.safetensors", *trained(), Progress(epoch=1, step=1, history=[{"epoch": 1}]))
    return tmp_path / "state.safetensors"


def read(path: Path):
    return load_state(path, *trained(1)) if "state" in path.name else load_model(path)


def signed(path: Path, facts: object = None, change_tensors=lambda tensors: tensors) -> None:
    """Rewrites the file, with other facts or tensors and a digest that fits, as a hostile author would."""
    tensors, metadata = safetensors.torch.load(path.read_bytes()), tensor_file.read_tensors(path)[1]
    key = next(key for key in metadata if key.startswith("fastunet"))
    text = facts if isinstance(facts, str) else metadata[key] if facts is None else json.dumps(facts)
    header, body = tensor_file.split(safetensors.torch.save(change_tensors(tensors), {key: text}), path)
    header["__metadata__"]["digest"] = tensor_file.digest(header, body)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))


@pytest.mark.parametrize("name", ["weights", "state"])
def test_every_kind_of_damage_is_noticed(name, weights, state):
    path, draw = {"weights": weights, "state": state}[name], random.Random(3)
    whole = path.read_bytes()
    for trial in range(32):
        data = bytearray(whole)
        place, other = draw.randrange(len(data)), draw.randrange(len(data))
        if trial % 4 == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif trial % 4 == 1:
            data[place:place] = draw.randbytes(draw.randrange(1, 9))
        elif trial % 4 == 2:
            data[place], data[other] = data[other], data[place]
        else:
            del data[place : place + draw.randrange(1, 9)]
        if bytes(data) == whole:
            continue
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    read(path)


FACTS = [None, "x", -1, 0, 1.5, [], {}, True, 10**6, 10**30, [1, 2], {"a": None}, "gone"]


def places(facts, here=()):
    for key, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
        yield (*here, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*here, key))


@pytest.mark.parametrize("name", ["weights", "state"])
def test_every_wrong_type_is_one_sentence(name, weights, state):
    """Facts of any type in any place are read as they were or refused; a network of depth 10⁶ is not built."""
    path = {"weights": weights, "state": state}[name]
    whole, metadata = path.read_bytes(), tensor_file.read_tensors(path)[1]
    facts = json.loads(next(value for key, value in metadata.items() if key.startswith("fastunet")))
    trials = [(place, value) for place in places(facts) for value in FACTS]
    for place, value in random.Random(0).sample(trials, 30):
        path.write_bytes(whole)
        signed(path, replaced(facts, place, value))
        problem = refusal(path)
        assert problem is None or (str(path) in problem and "\n" not in problem), (place, value)
    for text in ("{", "[]", "3", "[" * 90000, "null", '"x"', '{"model": NaN}'):
        path.write_bytes(whole)
        signed(path, text)
        assert refusal(path), text


def replaced(facts, place, value):
    """``facts`` with another value at ``place``."""
    changed = json.loads(json.dumps(facts))
    node = changed
    for key in place[:-1]:
        node = node[key]
    if value == "gone":
        node.pop(place[-1])
    else:
        node[place[-1]] = value
    return changed


def refusal(path: Path) -> str | None:
    try:
        read(path)
    except UserError as error:
        return str(error)
    return None


TENSORS = [("weights", "head.weight"), ("state", "model.head.weight"), ("state", "optimizer.exp_avg.head.weight")]


@pytest.mark.parametrize("change", [
    lambda t: t.to(torch.int8), lambda t: t.half(), lambda t: t.double(), lambda t: t > 0, lambda t: t[:1],
    lambda t: t * float("nan"), lambda t: t / 0, lambda t: torch.tensor(1.0),
])  # fmt: skip
@pytest.mark.parametrize("name, tensor", TENSORS)
def test_tensors_of_another_kind_are_refused(change, name, tensor, weights, state):
    path = {"weights": weights, "state": state}[name]
    signed(path, change_tensors=lambda tensors: tensors | {tensor: change(tensors[tensor])})
    if "exp_avg" in tensor and safetensors.torch.load(path.read_bytes())[tensor].dtype in (torch.half, torch.double):
        return  # moments are numbers of any precision
    with pytest.raises(UserError, match=tensor.removeprefix("model.")):
        read(path)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    model, optimizer, scaler = trained()
    optimizer.state[model.head.bias]["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(NotFinite, match=r"optimizer\.exp_avg_sq\.head\.bias"):
        save_state(tmp_path / "state", model, optimizer, scaler, Progress())
    torch.nn.init.constant_(model.head.bias, float("nan"))
    card = load_model(write_card(tmp_path / "card.safetensors"))[1]
    with pytest.raises(NotFinite, match=r"head\.bias"):
        save_weights(tmp_path / "weights", model, card)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.safetensors"]


def write_card(path: Path) -> Path:
    write_checkpoint(path)
    return path


def test_folders_and_pipes_are_no_checkpoints(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)


CONFIG = {"data": "x", "epochs": 2}


@pytest.mark.parametrize("text", [
    "[]", "null", "3", '"x"', "{", "[" * 100000, "", "\udcff", json.dumps(CONFIG | {"zzz": 1}),
    '{"data": "x", "epochs": ' + "9" * 5000 + "}", '{"data": "x", "learning_rate": NaN}', '{"epochs": 2}',
    *(json.dumps(CONFIG | {key: value}) for key, value in {
        "learning_rate": True, "epochs": 0, "batch_size": 1.5, "precision": "fp8", "width": "8", "seed": -1, "axis": 3,
        "val_fraction": 2, "modalities": "flair", "augment": 1, "dropout": [], "data": None, "size": 0, "threads": {},
    }.items()),
])  # fmt: skip
def test_configurations_that_are_none(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        TrainConfig.read(tmp_path)
    assert len(str(caught.value)) < 400


def test_segment_and_resume_refuse_damage(phantoms, tmp_path, capsys):
    line = ["train", phantoms, "--out", tmp_path / "run", *TINY, "--epochs", "1"]
    assert run(*line) == 0
    config = tmp_path / "run" / "config.json"
    kept = config.read_text()
    for name, value in (("seed", 1), ("loss", "ce"), ("tversky", [0.3, 0.7]), ("modalities", ["t1ce", "flair"])):
        config.write_text(json.dumps(json.loads(kept) | {name: value}))
        code = run("train", phantoms, "--out", tmp_path / "run", "--resume")
        assert_user_error(capsys, code, f'was saved with "{name}": ', f"cannot go on with {json.dumps(value)} (config")
    config.unlink()
    assert_user_error(capsys, run("train", phantoms, "--out", tmp_path / "run", "--resume"), "(config.json is gone)")
    config.write_text(kept)
    for name in ("best.safetensors", "state.safetensors"):
        path = tmp_path / "run" / name
        data = bytearray(path.read_bytes())
        data[-100] ^= 4
        path.write_bytes(data)
    assert run("evaluate", tmp_path / "run", phantoms) == 2
    capsys.readouterr()
    code = run("segment", tmp_path / "run", phantoms, "--out", tmp_path / "out")
    assert_user_error(capsys, code, "best.safetensors is damaged")
    assert_user_error(capsys, run(*line, "--resume"), "state.safetensors is damaged")
    shutil.rmtree(tmp_path / "run" / "cache")


@pytest.mark.parametrize("name", ["config.json", "log.csv", "curves.png"])
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_files_of_others_are_never_replaced(name, resume, phantoms, tmp_path, capsys):
    (tmp_path / name).write_text('{"mine": 1}')
    code = run("train", phantoms, "--out", tmp_path, *TINY, "--epochs", "1", *resume)
    assert_user_error(capsys, code, str(tmp_path / name))
    assert files_below(tmp_path) == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


@pytest.mark.parametrize("option, value", [("--batch-size", 1000000), ("--seed", -1), ("--seed", 2**70)])
def test_options_out_of_range(option, value, phantoms, tmp_path, capsys):
    line = ["train", phantoms, "--out", tmp_path, *TINY, "--epochs", "1", option, value]
    assert_user_error(capsys, run(*line), option, str(value))
