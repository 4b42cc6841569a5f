"""SIGKILL, SIGINT and SIGTERM at random moments of training, caching and segmentation; and full disks."""

from __future__ import annotations

import csv
import os
import random
import resource
import shutil
import signal
import time as clock
from pathlib import Path

import nibabel
import numpy as np

from fastunet.training import tensor_file
from tests.data_files import msd_folder
from tests.faults.trials import TINY, Deadline, Outcome, command, finish, is_one_sentence, left_behind, start

OPTIONS = [*TINY, "--epochs", "3", "--checkpoint-every", "0.05"]
SHAPE, CASES = (24, 20, 8), ("a", "b", "c", "d")


def content(folder: Path) -> dict[str, object]:
    """What must be equal in two runs of one kind: weights, the log without its times, label files."""
    found: dict[str, object] = {}
    for path in folder.rglob("*") if folder.exists() else ():
        if path.suffix == ".safetensors" and path.name != "state.safetensors":
            found[path.name] = path.read_bytes()
        elif path.name == "log.csv":
            with open(path, newline="") as file:
                timings = ("seconds", "slices_per_second", "data_wait_share")
                found[path.name] = [{k: v for k, v in row.items() if k not in timings} for row in csv.DictReader(file)]
        elif path.name.endswith(".nii.gz"):
            found[path.name] = path.read_bytes()
    return found


def damage(folder: Path) -> list[str]:
    """Files below ``folder`` that are not whole."""
    broken = []
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".safetensors" and not path.name.startswith("."):
                tensor_file.read_tensors(path)
            elif path.name.endswith(".nii.gz") and not path.name.startswith("."):
                np.asarray(nibabel.load(path).dataobj)
        except Exception as error:
            broken.append(f"{path.name}: {error}")
    return broken


def campaign(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """Every file is whole, the resumed run ends in the bytes of one that was never killed, and nothing is left."""
    outcome, draw, log = (
        Outcome("killed and interrupted (training, caching, segmentation)"),
        random.Random(seed),
        work / "log",
    )
    data, out = msd_folder(work / "data", CASES, SHAPE), work / "out"
    train = ["train", data, "--out", out, *OPTIONS]
    began = clock.monotonic()
    assert command(train, log) == 0, log.read_text()
    length, trained = clock.monotonic() - began, content(out)
    model = shutil.copytree(out, work / "model")
    segment = ["segment", model, data, "--out", out, "--probabilities", "--device", "cpu", "--overwrite"]
    shutil.rmtree(out)
    began = clock.monotonic()
    assert command(segment, log) == 0, log.read_text()
    segment_length, segmented = clock.monotonic() - began, content(out)
    while outcome.tried < trials and time:
        shutil.rmtree(out, ignore_errors=True)
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        segmenting = draw.random() < 0.3
        line, whole = (segment, segment_length) if segmenting else (train, length)
        pid = start(line, log)
        clock.sleep(draw.uniform(0, whole * (0.3 if draw.random() < 0.3 else 1)))
        os.kill(pid, number)
        code = finish(pid)
        name = f"{signal.Signals(number).name} while {'segmenting' if segmenting else 'training'}"
        broken = damage(out) if out.exists() else []
        ended = code in (0, -9 if number == signal.SIGKILL else 128 + number, -number)
        again = command(line if segmenting else [*train, "--resume"], log)
        wanted = segmented if segmenting else trained
        problems = [f"damaged {broken}"] * bool(broken) + [f"exit code {code}"] * (not ended)
        problems += [f"again: code {again}, {log.read_text()[-300:]}"] * (again != 0)
        problems += ["other results"] * (again == 0 and content(out) != wanted)
        problems += [f"left behind {left_behind(out)}"] * bool(left_behind(out))
        outcome.add(name, f"{name}: {'; '.join(problems)}" if problems else None)
    shutil.rmtree(work)
    return outcome


def full_disk(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """No file can grow beyond a limit: one sentence, code 2, whole files, and the same results once there is space."""
    outcome, log = Outcome("disk full at another size each time (training, segmentation)"), work / "log"
    data, out = msd_folder(work / "data", CASES[:3], SHAPE), work / "out"
    train = ["train", data, "--out", out, *TINY, "--epochs", "1"]
    assert command(train, log) == 0, log.read_text()
    trained, largest = content(out), max(path.stat().st_size for path in out.rglob("*"))
    model = shutil.copytree(out, work / "model")
    segment = ["segment", model, data, "--out", out, "--probabilities", "--overlay", "--device", "cpu", "--overwrite"]
    for index in range(trials):
        if not time:
            break
        limit = int(100 * (1.1 * largest / 100) ** (index / max(trials - 1, 1)))
        line = segment if index % 3 == 2 else train
        shutil.rmtree(out, ignore_errors=True)
        # The child's own log is a file too: it is a pipe's worth of text, and cut like the others.
        code = command(line, work / "small", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # noqa: B023
        said = (work / "small").read_text(errors="replace")
        problems = [f"code {code}"] * (code not in (0, 2)) + ["traceback"] * ("Traceback" in said)
        if out.exists():
            problems += damage(out)
        again = command([*train, "--resume"] if line is train else line, log)
        problems += [f"again: {log.read_text()[-200:]}"] * (again != 0)
        problems += ["other results"] * (line is train and content(out) != trained)
        problems += left_behind(out)
        outcome.add("refused" if code else "fitted", f"{line[0]} with {limit} bytes: {problems}" if problems else None)
    shutil.rmtree(work)
    return outcome


def two_at_once(work: Path, trials: int, seed: int, time: Deadline) -> Outcome:
    """One output folder: one of two trainings is refused. One cache, or one output of segmentations: both are right."""
    outcome, draw = (
        Outcome("two processes at once (one run folder, one cache, one output of labels)"),
        random.Random(seed),
    )
    data, out = msd_folder(work / "data", CASES, SHAPE), work / "out"
    logs = [work / "log0", work / "log1"]
    train = ["train", data, "--out", out, *TINY, "--epochs", "2"]
    assert command(train, logs[0]) == 0, logs[0].read_text()
    trained, model = content(out), shutil.copytree(out, work / "model")
    segment = ["segment", model, data, "--out", out, "--device", "cpu", "--overwrite"]
    shutil.rmtree(out)
    assert command(segment, logs[0]) == 0
    segmented = content(out)
    for index in range(trials):
        if not time:
            break
        for path in (out, work / "other", work / "cache"):
            shutil.rmtree(path, ignore_errors=True)
        kind = ("one run folder", "one cache", "one output of labels")[index % 3]
        lines = [segment, segment] if index % 3 == 2 else [train, train]
        if kind == "one cache":
            (work / "cache").mkdir()
            for folder in (out, work / "other"):
                folder.mkdir()
                (folder / "cache").symlink_to(work / "cache")
            lines = [train, ["train", data, "--out", work / "other", *train[4:]]]
        first = start(lines[0], logs[0])
        clock.sleep(draw.uniform(0, 0.5))
        codes = [finish(pid) for pid in (first, start(lines[1], logs[1]))][::1]
        wanted = trained if lines[0] is train else segmented
        right = content(out) == wanted and (kind != "one cache" or content(work / "other") == wanted)
        expected = [[0, 2]] if kind == "one run folder" else [[0, 0]]
        said = all(is_one_sentence(code, log) for code, log in zip(codes, logs))
        good = right and said and sorted(codes) in expected
        outcome.add(kind, None if good else f"{kind}: codes {codes}, results {'right' if right else 'wrong'}")
    shutil.rmtree(work)
    return outcome
