"""The cache folder, and decoded images in it, which later runs need not decode again."""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from torch import Tensor

from vitft.pictures.preprocess import Fit

MAX_KEPT = 20 * 2**30  # bytes of all cached images together
N_CHECKSUM = 4  # bytes of a checksum


def data_folder() -> Path:
    """Return the folder of named sets: $VITFT_DATA, or `vitft` in the platform's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("VITFT_DATA") or user_cache_path("vitft"))


def decoded_folder() -> Path:
    """Return the folder of decoded images."""
    return data_folder() / "decoded"


@dataclass(frozen=True)
class CachedDecoder:
    """A decoder that caches its images in a file: called with i, it gives image i.

    Row i of the file is a checksum and image i. An image whose row is missing, unreadable or
    damaged is decoded again. The file is sparse: images that nobody asked for take no space.

    Attributes:
        decode: index -> uint8 of `shape`.
        path: of the file; where it cannot be written, nothing is cached.
        shape: (C, height, width) of every image.
    """

    decode: Callable[[int], Tensor]
    path: Path
    shape: tuple[int, int, int]

    def __call__(self, i: int) -> Tensor:
        """Return image i, uint8 (C, height, width).

        Raises:
            ValueError, OSError: as `decode` does.
        """
        found = self._read(i)
        if found is None:
            found = self.decode(i)
            self._write(i, found)
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of a row."""
        return N_CHECKSUM + math.prod(self.shape)

    def _read(self, i: int) -> Tensor | None:
        row = bytearray(self.n_bytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(i * self.n_bytes)
                n = file.readinto(row)
        except OSError:
            return None
        if n != len(row) or row[:N_CHECKSUM] != _checksum(memoryview(row)[N_CHECKSUM:]):
            return None
        return torch.frombuffer(row, dtype=torch.uint8, offset=N_CHECKSUM).view(self.shape)

    def _write(self, i: int, image: Tensor) -> None:
        pixels = image.contiguous().numpy().tobytes()
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(i * self.n_bytes)
                file.write(_checksum(pixels) + pixels)
        except OSError:
            pass  # a full disk, say, only costs the next run some time


def cached(
    decode: Callable[[int], Tensor], paths: Sequence[Path], fit: Fit
) -> Callable[[int], Tensor]:
    """Return `decode` with a cache: a file in `decoded_folder`.

    The file's name is a hash of the paths, sizes and times of the pictures, of `fit`, and of the
    versions of Pillow and torch. Where all files together would take more than MAX_KEPT, those used
    longest ago are removed. Where the folder cannot be written, or the disk is too full, `decode`
    is returned without a cache.

    Args:
        decode: index -> image, uint8 (C, height, width), of `paths`.
        paths: of the pictures.
        fit: how they are preprocessed.
    """
    shape, folder = (fit.n_channels, fit.image_size, fit.image_size), decoded_folder()
    found = CachedDecoder(decode, folder / f"{_key(paths, fit)}.images", shape)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _make_room(found.path, len(paths) * found.n_bytes):
            return decode
        found.path.touch(mode=0o600)  # the file's time is that of its last use
    except OSError:
        return decode
    return found


def _key(paths: Sequence[Path], fit: Fit) -> str:
    facts = [repr(fit), PIL.__version__, torch.__version__, *map(_state, paths)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _state(path: Path) -> tuple[str, int, int]:
    """Return a file's path, size and time of change; zeros where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return os.path.abspath(path), 0, 0
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _make_room(path: Path, n_bytes: int) -> bool:
    """Return whether `n_bytes` may be stored at `path`, after removing older files if necessary."""
    if n_bytes > min(MAX_KEPT, shutil.disk_usage(path.parent).free // 2):
        return False
    others = [other for other in path.parent.glob("*.images") if other != path]
    sizes = {other: other.stat() for other in others}
    left = MAX_KEPT - n_bytes - sum(status.st_blocks * 512 for status in sizes.values())
    for other in sorted(others, key=lambda other: sizes[other].st_mtime):
        if left >= 0:
            break
        other.unlink(missing_ok=True)
        left += sizes[other].st_blocks * 512
    return True


def _checksum(pixels: bytes | memoryview) -> bytes:
    return zlib.crc32(pixels).to_bytes(N_CHECKSUM, "little")
