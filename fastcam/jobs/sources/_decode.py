"""Bytes of an image file to an RGB picture, or the reason why not.

    picture = decode(read_file("photo.jpg"))

What a file's name promises is not asked; its first bytes decide. Nothing of Pillow's global settings is read into the
result or changed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcam._pictures import UnknownWhite, upright_rgb
from fastcam.models.prepare import MAX_PIXELS, ItemError, too_many_pixels
from fastcam.nn.data import SUFFIXES as COMMON

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_BYTES", "MAX_PIXELS", "SUFFIXES", "ItemError", "decode", "open_file", "read_file"]

#: An image file above this is refused unread.
MAX_BYTES = 1 << 29
#: Names that a folder or a tar lists as images, in lower case.
SUFFIXES = COMMON | {".avif", ".gif", ".jfif", ".jp2", ".pbm", ".pgm", ".pnm", ".tga"}
#: Decoders that need no other program (EPS starts Ghostscript) and read pixels, not containers of something else.
FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP"
#: errno -> what a person says
_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "its symbolic links go round in circles",
    errno.ENAMETOOLONG: "a part of its path is longer than the file system allows",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ENXIO: "it is a pipe, socket or device, not a file",
}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture (mode RGB) that the bytes of an image file hold.

    Turned as EXIF says; the first frame of an animation, the first page of a document; palettes and CMYK converted;
    what is transparent laid on white; 16 bits a channel scaled to 8 (v / 257, rounded), floating point from [0, 1].
    Colour profiles are not applied, as training pipelines do not.

    Raises ItemError with a reason in plain words for what is no image, is cut short or damaged, has more than
    `max_pixels` pixels (found before anything is decompressed), or has values without a known white.
    Cost: the decoding, and one copy for each conversion that is needed.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ItemError("the file is empty (0 bytes)")
    what = "image"
    try:
        with Image.open(BytesIO(data), formats=_formats()) as picture:
            what = f"{picture.format} image"
            width, height = picture.size
            if width * height > max_pixels:
                raise ItemError(too_many_pixels(width, height, max_pixels))
            fine = _sixteen_bits(picture, data, Image)
            picture.load()
            if fine is not None:
                picture.paste(fine)
            return upright_rgb(picture)
    except ItemError:
        raise
    except UnknownWhite as error:
        raise ItemError(str(error)) from error
    except UnidentifiedImageError as error:
        raise ItemError(f"no image: {len(data)} bytes that begin with {data[:8]!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError(f"{error}; PIL.Image.MAX_IMAGE_PIXELS and max_pixels set the limits") from error
    except MemoryError as error:
        raise ItemError(f"not enough memory to decode this {what}") from error
    except Exception as error:  # decoders raise all sorts: OSError, SyntaxError, struct.error, ValueError, ...
        cut = " (cut short?)" if isinstance(error, (EOFError, IndexError)) else ""
        raise ItemError(f"broken {what}: {_text(error)}{cut}") from error


def read_file(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole content of a regular file. Never waits: a pipe named like an image is refused, not opened for reading.

    Paths longer than the system takes at once are walked part by part. Raises ItemError.
    """
    try:
        descriptor = open_file(os.fspath(path))
    except OSError as error:
        raise ItemError(_REASONS.get(error.errno or 0, error.strerror or str(error))) from error
    except ValueError as error:  # a zero byte in the path
        raise ItemError(f"no valid path: {error}") from error
    facts = os.fstat(descriptor)
    wrong = None
    if stat.S_ISDIR(facts.st_mode):
        wrong = "it is a folder, not a file"
    elif not stat.S_ISREG(facts.st_mode):
        wrong = _REASONS[errno.ENXIO]
    elif facts.st_size > max_bytes:
        wrong = f"{facts.st_size} bytes are more than the {max_bytes} an image file may have"
    if wrong is not None:
        os.close(descriptor)
        raise ItemError(wrong)
    try:
        with open(descriptor, "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise ItemError(f"reading failed: {error.strerror or error}") from error


def open_file(path: str, flags: int = os.O_RDONLY) -> int:
    """`os.open` without waiting for a pipe's other end, also of a path longer than PATH_MAX. Raises OSError."""
    flags |= os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or os.open not in os.supports_dir_fd:
            raise
    *folders, name = (part for part in path.split("/") if part)
    at = os.open("/" if path.startswith("/") else ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = deeper
        return os.open(name, flags, dir_fd=at)
    finally:
        os.close(at)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS.split() if name in Image.OPEN)


#: Pillow's unpackers of 16-bit samples (big-endian, little-endian, native) keep the high byte; -> those of the low one.
_LOW_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def _sixteen_bits(picture: Any, data: bytes, module: Any) -> Image | None:
    """An opened picture of 16 bits a channel scaled to 8, of which Pillow itself keeps the high bytes; of others None.

    The low bytes come from decoding a second time with another unpacker.
    """
    tiles, low_tiles, grey = list(picture.tile), [], False
    for tile in tiles:
        arguments = tile[3]
        raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        found = re.fullmatch(r"(LA|RGB|RGBA|RGBX|CMYK);16([BLN])", raw) if isinstance(raw, str) else None
        if found is None:
            return None
        grey = found[1] == "LA"
        # There is one unpacker of grey with opacity only; as RGBA its four bytes stand side by side.
        swapped = "RGBA" if grey else f"{found[1]};16{_LOW_BYTE[found[2]]}"
        changed = swapped if isinstance(arguments, str) else (swapped, *arguments[1:])
        # Older releases of Pillow have plain tuples.
        low_tiles.append(tile._replace(args=changed) if hasattr(tile, "_replace") else (*tile[:3], changed))
    if not tiles:
        return None
    with module.open(BytesIO(data), formats=_formats()) as again:
        again.tile = low_tiles
        low = np.asarray(again)
    values = np.asarray(picture).astype(np.uint16) * np.uint16(256) + (low[..., [1, 1, 1, 3]] if grey else low)
    quotient = values // np.uint16(257)
    return module.fromarray((quotient + (values - quotient * np.uint16(257) > 128)).astype(np.uint8), picture.mode)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
