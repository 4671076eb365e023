"""Image files of every kind to RGB pictures: by pixel values, and by the reason where there is no picture."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from fastcam.jobs.sources import ItemError  # noqa: E402
from fastcam.jobs.sources._decode import decode, read_file  # noqa: E402

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(picture, kind="PNG", **options):
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def two(mode="RGB"):
    """2 x 1 pixels: red, blue."""
    picture = Image.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), BLUE)
    return picture.convert(mode)


def chunk(kind, content):
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pixels(data, **options):
    picture = decode(data, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture).tolist()


def test_palette_and_first_frame():
    assert pixels(encoded(two("P"))) == [[[255, 0, 0], [0, 0, 255]]]
    frames = [Image.new("RGB", (1, 1), RED), Image.new("RGB", (1, 1), BLUE)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with Image.open(BytesIO(data)) as file:
            assert file.n_frames == 2
        np.testing.assert_allclose(pixels(data), [[RED]], atol=3)


def test_cmyk():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(pixels(encoded(cmyk, "JPEG", quality=100)), np.full((8, 8, 3), RED), atol=3)
    assert pixels(encoded(cmyk, "TIFF"))[0][0] == [255, 0, 0]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257 + 128, 65535, 40000]], np.uint16)
    grey = [0, 1, 128, 255, round(40000 / 257)]
    for kind in ("PNG", "TIFF", "PPM"):
        assert pixels(encoded(Image.fromarray(values), kind)) == [[[g] * 3 for g in grey]], kind


def png16(values, kind):
    """A PNG file of uint16 (H, W, channels), made by hand; kind: 2 RGB, 4 grey with opacity, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_are_scaled_not_cut_off():
    """round(v / 257) of every value; the high byte alone, v >> 8, is another for a quarter of them."""
    colour = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    colour = np.stack([colour, colour[::-1], np.roll(colour, 77)], axis=2)
    expected = np.rint(colour / 257.0)
    assert (expected != colour >> 8).mean() > 0.2
    assert np.array_equal(pixels(png16(colour, 2)), expected)
    opaque = np.full((*colour.shape[:2], 1), 65535, np.uint16)
    assert np.array_equal(pixels(png16(np.concatenate([colour, opaque], 2), 6)), expected)
    grey = pixels(png16(np.concatenate([colour[..., :1], opaque], 2), 4))
    assert np.array_equal(grey, expected[..., :1].repeat(3, 2))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_colour_in_tiff(order, compression):
    tifffile = pytest.importorskip("tifffile")
    colour = np.random.default_rng(0).integers(0, 65536, (40, 30, 3)).astype(np.uint16)
    file = BytesIO()
    tifffile.imwrite(file, colour, photometric="rgb", byteorder=order, compression=compression, rowsperstrip=16)
    assert np.array_equal(pixels(file.getvalue()), np.rint(colour / 257.0))


def test_floating_point_and_wide_integers_need_a_known_white():
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert pixels(encoded(Image.fromarray(unit), "TIFF")) == [[[0] * 3, [128] * 3, [255] * 3]]
    for wrong in (unit * 300, np.full((1, 2), np.nan, np.float32), np.array([[0, 1 << 20]], np.int32)):
        with pytest.raises(ItemError, match="known white"):
            decode(encoded(Image.fromarray(wrong), "TIFF"))


def test_transparency_lies_on_white():
    picture = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (7, 7, 7, 0))
    picture.putpixel((2, 0), (0, 0, 0, 51))
    assert pixels(encoded(picture)) == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert pixels(encoded(Image.new("LA", (1, 1), (9, 0)))) == [[[255] * 3]]
    keyed = Image.new("L", (1, 1), 5)
    assert pixels(encoded(keyed, transparency=5)) == [[[255] * 3]]


@pytest.mark.parametrize(
    ("orientation", "shape", "corner"), [(1, (1, 2), RED), (3, (1, 2), BLUE), (6, (2, 1), RED), (8, (2, 1), BLUE)]
)
def test_exif_rotation(orientation, shape, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = np.asarray(decode(encoded(two(), exif=exif)))
    assert got.shape[:2] == shape
    assert tuple(got[0, 0]) == corner


def test_damaged_exif_leaves_the_picture_as_it_lies():
    data = encoded(two(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert pixels(data) == [[[255, 0, 0], [0, 0, 255]]]


def test_one_pixel_grey_and_bilevel():
    assert pixels(encoded(Image.new("L", (1, 1), 77))) == [[[77] * 3]]
    assert pixels(encoded(Image.new("1", (1, 1), 1))) == [[[255] * 3]]


def test_the_name_does_not_decide(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(two(), "PNG"))
    assert pixels(read_file(path)) == [[[255, 0, 0], [0, 0, 255]]]


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, world", "no image: 12 bytes that begin with b'hello, w'"),
        (encoded(noise(), "JPEG")[:2000], "broken JPEG image: .*truncated"),
        (encoded(noise(), "PNG")[:5000], "broken PNG image"),
        (encoded(noise(), "JPEG")[:30], "broken image: Truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    ],
)
def test_what_is_no_picture_has_a_reason(data, reason):
    with pytest.raises(ItemError, match=reason):
        decode(data)


def bomb(side):
    """A PNG header that promises side x side pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_before_decoding():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ItemError, match=r"400000000 pixels|20000 x 20000 pixels"):
        decode(bomb(20000))
    with pytest.raises(ItemError, match="1000 x 1000 pixels are more than the 999999 allowed"):
        decode(bomb(1000), max_pixels=999_999)
    with pytest.raises(ItemError, match="broken PNG"):  # within the limit it is decoded, and found short
        decode(bomb(1000), max_pixels=1_000_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    for name, reason in (
        ("pipe.jpg", "a pipe"),
        ("folder.jpg", "folder"),
        ("loop.jpg", "round in circles"),
        ("gone.jpg", "no such file"),
        ("a" * 300 + ".jpg", "longer than"),
        ("nul\0.jpg", "no valid path"),
    ):
        with pytest.raises(ItemError, match=reason):
            read_file(str(tmp_path / name))
    (tmp_path / "big.jpg").write_bytes(b"x" * 100)
    with pytest.raises(ItemError, match="100 bytes are more than the 99"):
        read_file(tmp_path / "big.jpg", max_bytes=99)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(two()))
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ItemError, match="permission denied"):
        read_file(path)
