"""Bytes of a file, decompressed by what the bytes say, whatever the file's name says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from mopo_trainer.data.errors import DataError, one_line


def read_bytes(path: Path) -> bytes:
    """The content of a file, of a .gz, .bz2, .xz, .zst or .zip file that of what was compressed.

    Raises:
        DataError: cut short or damaged, or a .zip of several files.
    """
    content = path.read_bytes()
    while kind := next((known for magic, known in MAGIC.items() if content.startswith(magic)), None):
        try:
            content = DECOMPRESS[kind](content)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except (EOFError, OSError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            problem = one_line(error)
            raise DataError(f"{path}: the {kind} file is cut short or damaged ({problem}); write it again") from None
    return content


def _unzip(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.namelist() if not member.endswith("/") and "__MACOSX" not in member]
        if len(members) != 1:
            raise DataError(f"the zip file holds {len(members)} files ({', '.join(members[:5])}); unpack it, name one")
        return archive.read(members[0])


def _unzstd(content: bytes) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
        return stream.read()


MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",  # an empty one
}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
    "zstd": _unzstd,
    "zip": _unzip,
}
