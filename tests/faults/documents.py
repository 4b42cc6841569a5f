"""JSON and safetensors files with other types, missing keys and flipped bytes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import safetensors.torch

from fastunet.data import discover_cases
from fastunet.errors import UserError
from fastunet.training import checkpoint, tensor_file
from fastunet.training.config import TrainConfig
from tests.cli_helpers import write_checkpoint
from tests.data_files import msd_folder
from tests.faults.trials import Deadline, Outcome

VALUES = [None, True, 0, -1, 1.5, 1e308, "", "x", "0", [], [0], {}, {"0": 1}, 2**70, 10**6, "\0", "../../x", "é",
          "gone"]  # fmt: skip
TEXTS = [b"", b"[", b"[" * 100_000, b"null", b"3", b'"x"', b"NaN", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}",
         b'{"labels": "\\ud800"}', b'{"a": Infinity}', b'{"a": 1, "a": 2}']  # fmt: skip


def campaign(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """Half of the trials change a fact and sign it again, as a hostile author would; the others damage bytes."""
    outcome, draw = Outcome("dataset.json, config.json and checkpoints, changed"), random.Random(seed)
    root, run = msd_folder(work / "data"), work / "run"
    run.mkdir()
    write_checkpoint(run / "best.safetensors", width=2, depth=1)
    TrainConfig(data="x").write(run)
    readers = {
        root / "dataset.json": lambda: discover_cases(root, modalities=None),
        run / "config.json": lambda: TrainConfig.read(run),
        run / "best.safetensors": lambda: str(checkpoint.load_model(run)[0].state_dict()),
    }
    originals = {path: path.read_bytes() for path in readers}
    wanted = readers[run / "best.safetensors"]()
    while outcome.tried < trials and time:
        path = draw.choice(list(readers))
        signed = draw.random() < 0.5
        data = _changed(originals[path], draw) if signed else _damaged(originals[path], draw)
        path.write_bytes(data)
        try:
            result = readers[path]()
            wrong = path.suffix == ".safetensors" and not signed and data != originals[path] and result == wanted
            outcome.add("read", f"{path.name}: damage went unnoticed: {data[:200]!r}" if wrong else None)
        except UserError as error:
            sentence = len(str(error)) < 600 and "\n" not in str(error).strip()
            outcome.add("refused in a sentence", None if sentence else f"{path.name}: {str(error)[:300]!r}")
        except Exception as error:
            outcome.add("", f"{path.name}: {type(error).__name__} {error} for {data[:300]!r}")
        path.write_bytes(originals[path])
    shutil.rmtree(work)
    return outcome


def _changed(data: bytes, draw: random.Random) -> bytes:
    if data[:1] == b"{":
        return draw.choice(TEXTS) if draw.random() < 0.1 else json.dumps(_replaced(json.loads(data), draw)).encode()
    start = 8 + int.from_bytes(data[:8], "little")
    key = "fastunet"
    metadata = json.loads(data[8:start])["__metadata__"]
    facts = draw.choice(TEXTS).decode("latin1") if draw.random() < 0.1 else None
    facts = facts or json.dumps(_replaced(json.loads(metadata[key]), draw))
    packed = safetensors.torch.save(safetensors.torch.load(data), {key: facts})
    header, body = tensor_file.split(packed, Path("file"))
    header["__metadata__"]["digest"] = tensor_file.digest(header, body)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def _replaced(facts: object, draw: random.Random) -> object:
    """``facts`` with one value replaced, removed or renamed, at any depth."""
    node = facts
    while True:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.4:
            break
        node = node[key]
    value = draw.choice(VALUES)
    if value == "gone":
        node.pop(key)
    elif isinstance(node, dict) and draw.random() < 0.2:
        node[str(value)] = node.pop(key)
    else:
        node[key] = value
    return facts


def _damaged(data: bytes, draw: random.Random) -> bytes:
    data, place = bytearray(data), draw.randrange(len(data))
    kind = draw.randrange(4)
    if kind == 0:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[place:place] = draw.randbytes(draw.randrange(1, 9))
    elif kind == 2:
        other = draw.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    else:
        del data[place : place + draw.randrange(1, len(data))]
    return bytes(data)
