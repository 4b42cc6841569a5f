"""One safetensors file: tensors of finite numbers, facts about them as JSON, and a digest of all that it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastunet.errors import UserError
from fastunet.files import reason, write_bytes
from fastunet.schema import parse_json

_DIGEST_KEY = "digest"


class NotFinite(UserError):
    """NaN or infinity where a checkpoint holds numbers."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], key: str, facts: dict[str, Any]) -> None:
    """Writes one whole file, with ``facts`` below ``key``; a value that is not finite is ``NotFinite``."""
    packed = {}
    for name, tensor in tensors.items():
        packed[name] = tensor.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
        _require_finite(name, packed[name], path)
    metadata = {key: json.dumps(facts, allow_nan=False)}
    header, body = split(safetensors.torch.save(packed, metadata), path)
    header["__metadata__"] = metadata | {_DIGEST_KEY: digest(header, body)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, b"".join([len(text).to_bytes(8, "little"), text, body]))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a whole, undamaged file of finite numbers; any other is a ``UserError``."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file")
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    header, body = split(data, path)
    metadata = header.get("__metadata__", {})
    if _DIGEST_KEY not in metadata:
        raise UserError(f"{path} is not a fastunet checkpoint: it has no digest of its content")
    if metadata[_DIGEST_KEY] != digest(header, body):
        raise UserError(f"{path} is damaged: its content is not what was written")
    for name, tensor in tensors.items():
        _require_finite(name, tensor, path)
    return tensors, metadata


def split(data: bytes, path: Path) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file and the bytes of its tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return parse_json(data[8:start], dict[str, dict[str, Any]], path), memoryview(data)[start:]


def digest(header: dict[str, Any], body: memoryview) -> str:
    """Of all facts and tensors, the digest itself left out."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != _DIGEST_KEY}
    facts = json.dumps(header | {"__metadata__": metadata}, sort_keys=True).encode()
    content = hashlib.blake2b(facts, digest_size=16)
    content.update(body)
    return content.hexdigest()


def _require_finite(name: str, tensor: torch.Tensor, path: Path) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NotFinite(f"{name} in {path} is not finite: it has NaN or infinity")
