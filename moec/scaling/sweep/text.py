"""Your text as bytes: no tokenizer, 256 tokens, loss in nats per byte.

Files are read in the order of their paths and joined. The result is cut into blocks; every twentieth is validation, the rest is
training: both see all of the text. Training windows are shuffled once for each seed and read without repetition, so that a run
stays below one epoch, as the law has it.

The default text, so that a sweep runs anywhere, is the source of the Python standard library that runs it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moec.scaling.errors import ScalingError

_BLOCK = 65536
_EVERY = 20  # one block in so many is validation


@dataclass(frozen=True)
class Text:
    """`train` and `valid`: uint8 [bytes]. `digest` tells one text from another; `files` were read, `skipped` were not text."""

    train: Tensor
    valid: Tensor
    digest: str
    files: int
    skipped: int


def read_text(paths: Sequence[str | Path] = ()) -> Text:
    """The files, and all text files in the folders; nothing given: the standard library's sources.

    Raises ScalingError for a file that is not UTF-8 text, or for a folder without any; what else is in folders is skipped.
    """
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & set(p.parts)]
        return _join([data for p in found if (data := _text(p)) is not None], 0)
    parts: list[bytes] = []
    skipped = 0
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not path.exists():
            raise ScalingError(f"--text {path} does not exist; name a file or a folder")
        read = [_text(p) for p in inside]
        kept = [data for data in read if data]
        if not path.is_dir() and read[0] is None:
            raise ScalingError(f"--text {path} is not UTF-8 text; convert it, or name other files")
        if not kept:
            raise ScalingError(f"--text {path} holds no text; name a file with text, or a folder with such files")
        parts += kept
        skipped += len(read) - len(kept)
    return _join(parts, skipped)


def windows(text: Tensor, context: int) -> int:
    """How many sequences of `context` bytes, each with the byte that follows it, do not overlap."""
    return max((len(text) - 1) // context, 0)


def check_enough(text: Text, context: int, sequences: int) -> None:
    """Raises ScalingError unless there are so many training sequences, and some for validation."""
    have = windows(text.train, context)
    if have < sequences or not windows(text.valid, context):
        raise ScalingError(
            f"the text has {have * context:,} bytes for training, the longest run needs {sequences * context:,}; give more text "
            "with --text, or lower --tokens: the law is for less than one epoch"
        )


def order(text: Text, context: int, seed: int) -> Tensor:
    """int64 [windows]: the training sequences as runs with this seed see them."""
    random = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    return torch.randperm(windows(text.train, context), generator=random)


def batch(text: Tensor, context: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, targets) int64 [B, context]: the sequences with these numbers, and the same a byte later."""
    places = numbers[:, None] * context + torch.arange(context + 1)
    taken = text[places].long()
    return taken[:, :-1], taken[:, 1:]


def _text(path: Path) -> bytes | None:
    """The bytes of a file, None where they are not text."""
    data = path.read_bytes()
    if b"\0" in data:
        return None
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return data


def _join(parts: Sequence[bytes], skipped: int) -> Text:
    whole = b"\n".join(parts)
    size = max(min(_BLOCK, len(whole) // _EVERY), 1)
    blocks = [whole[i : i + size] for i in range(0, len(whole), size)]
    valid = b"".join(blocks[_EVERY - 1 :: _EVERY])
    train = b"".join(block for i, block in enumerate(blocks) if i % _EVERY != _EVERY - 1)
    training, validation = (torch.frombuffer(bytearray(data or b"\n"), dtype=torch.uint8) for data in (train, valid))
    return Text(training, validation, hashlib.sha256(whole).hexdigest()[:16], len(parts), skipped)
