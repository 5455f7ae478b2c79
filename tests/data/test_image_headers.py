"""Broken files of every format are found by their headers; an image reads alike whatever its kind, or is refused by name."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.test_images import jpeg_with_thumbnail, picture
from yoloxkd.data.check import COMPLAINTS, check_data
from yoloxkd.data.data_spec import find_data
from yoloxkd.data.io.image_headers import image_size, read_header
from yoloxkd.data.io.images import _check_files, check_images, measure_images, read_image
from yoloxkd.data.io.jpeg import JPEG_END, data_is_whole, jpeg_fault
from yoloxkd.data.problems import Faults
from yoloxkd.errors import UserError

PHOTO = np.clip(
    np.add.outer(np.arange(96), np.arange(128))[..., None] + np.random.default_rng(0).integers(0, 60, (96, 128, 3)),
    0,
    255,
).astype(np.uint8)


def encoded(kind: str, image: np.ndarray = PHOTO, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).convert(mode).save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def file_of(folder: Path, content: bytes, name: str = "a.img") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


WHOLE = {
    "webp": encoded("WEBP"),
    "webp-lossless": encoded("WEBP", lossless=True),
    "webp-exif": encoded("WEBP", exif=Image.Exif().tobytes(), icc_profile=b"x" * 90),
    "webp-moving": encoded("WEBP", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
    "bmp": encoded("BMP"),
    "bmp-palette": encoded("BMP", mode="P"),
    "tiff": encoded("TIFF"),
    "tiff-lzw": encoded("TIFF", compression="tiff_lzw"),
    "tiff-big": encoded("TIFF", big_tiff=True),
    "gif": encoded("GIF"),
    "gif-moving": encoded("GIF", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
    "png": encoded("PNG"),
    "png-16": cv2.imencode(".png", PHOTO.astype(np.uint16) * 257)[1].tobytes(),
    "mpo": encoded("MPO", save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
    "jpeg": encoded("JPEG"),
    "jpeg-progressive": encoded("JPEG", progressive=True),
    "jpeg-restart": encoded("JPEG", restart_marker_blocks=3),
    "jpeg-gray": encoded("JPEG", mode="L", progressive=True),
    "jpeg-cmyk": encoded("JPEG", mode="CMYK"),
    "jpeg-thumbnail": jpeg_with_thumbnail(),
}

TWO_PICTURES = ("mpo", "gif-moving", "webp-moving")  # the first of them counts


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_pass_and_cut_ones_do_not(tmp_path: Path, kind: str) -> None:
    content = WHOLE[kind]
    whole = file_of(tmp_path, content)
    check_images([whole], "x.json", np.array([image_size(whole)]))
    assert read_image(whole)[0].shape[:2] == image_size(whole)
    for share in (0.3, 0.7):
        cut = file_of(
            tmp_path, content[: int(len(content) * (share / 3 if kind in TWO_PICTURES else share))], "cut.img"
        )
        for refuse in (lambda cut: check_images([cut], "x.json"), read_image):
            with pytest.raises(UserError, match=r"cut\.img.* is cut short|cut\.img.* is not a"):
                refuse(cut)


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind.startswith("jpeg")])
def test_a_third_of_a_jpeg_with_an_end_marker_is_not_whole(tmp_path: Path, kind: str) -> None:
    content = WHOLE[kind]
    cut = file_of(tmp_path, content[: len(content) // 3] + JPEG_END, "cut.jpg")
    for refuse in (lambda path: check_images([path], "x.json"), read_image):
        with pytest.raises(UserError, match=r"cut\.jpg.* is cut short"):
            refuse(cut)


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind.startswith("jpeg")])
def test_a_motion_photo_is_whole(tmp_path: Path, kind: str) -> None:
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xd9\xff\xda\0\x0c" * 40
    file = file_of(tmp_path, WHOLE[kind] + film)
    check_images([file], "x.json")
    np.testing.assert_array_equal(read_image(file)[0], read_image(file_of(tmp_path, WHOLE[kind], "b.img"))[0])
    assert jpeg_fault(WHOLE[kind] + film) == ""
    assert data_is_whole(WHOLE[kind] + film)


def test_a_gray_corner_alone_is_no_fault(tmp_path: Path) -> None:
    gray = np.full((64, 64, 3), 128, np.uint8)
    file = file_of(tmp_path, encoded("JPEG", gray))
    check_images([file], "x.json")
    assert (read_image(file)[0] == 128).all()


def test_of_many_jpegs_those_with_little_data_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = WHOLE["jpeg"]
    files = [file_of(tmp_path, content, f"{i}.jpg") for i in range(4)]
    files.append(file_of(tmp_path, content[: len(content) * 2 // 5] + JPEG_END, "cut.jpg"))
    monkeypatch.setattr("yoloxkd.data.io.images._DECODED", 1)
    decoded = []
    monkeypatch.setattr(
        "yoloxkd.data.io.images._data_is_whole",
        lambda path: decoded.append(path) or data_is_whole(Path(path).read_bytes()),
    )
    assert [one.fault for one in _check_files(files, decode=True)] == [""] * 4 + ["is cut short"]
    assert decoded == files[4:]


NOT_IMAGES = {
    "is empty": b"",
    "is a Git LFS pointer, .*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    r"is a web page \(HTML\)": b"\n<!DOCTYPE html><html></html>",
    "holds nothing but zeros": bytes(4000),
    "is not an image": b"%PDF-1.7 and so on",
}


@pytest.mark.parametrize("words", NOT_IMAGES)
def test_other_files_called_jpg_are_told_apart(tmp_path: Path, words: str) -> None:
    file = file_of(tmp_path, NOT_IMAGES[words], "a.jpg")
    with pytest.raises(UserError, match=f"a\\.jpg.*{words}"):
        check_images([file], "x.json")
    with pytest.raises(UserError, match=f"a\\.jpg {words}"):
        read_image(file)


@pytest.mark.parametrize("kind", WHOLE)
def test_the_suffix_does_not_matter(tmp_path: Path, kind: str) -> None:
    file = file_of(tmp_path, WHOLE[kind], "a.jpg")
    check_images([file], "x.json")
    assert read_image(file, image_size(file))[0].dtype == np.uint8


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj()
    data = b"".join(packer.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_sizes_beyond_pillows_limit(tmp_path: Path) -> None:
    """Nothing is decoded, so the pixels of BMP, TIFF and WebP need not be there to tell their size."""
    assert image_size(file_of(tmp_path, huge_png(14000))) == (14000, 14000)
    webp = bytearray(WHOLE["webp-exif"])
    webp[24:30] = (13999).to_bytes(3, "little") * 2
    bmp = bytearray(WHOLE["bmp"])
    bmp[18:26] = struct.pack("<ii", 14000, -14000)
    tiff = WHOLE["tiff"].replace(struct.pack("<HHIHH", 256, 4, 1, 128, 0), struct.pack("<HHIHH", 256, 4, 1, 14000, 0))
    tiff = tiff.replace(struct.pack("<HHIHH", 256, 3, 1, 128, 0), struct.pack("<HHIHH", 256, 3, 1, 14000, 0))
    tiff = tiff.replace(struct.pack("<HHIHH", 257, 4, 1, 96, 0), struct.pack("<HHIHH", 257, 4, 1, 14000, 0))
    tiff = tiff.replace(struct.pack("<HHIHH", 257, 3, 1, 96, 0), struct.pack("<HHIHH", 257, 3, 1, 14000, 0))
    for content in (bytes(webp), bytes(bmp), tiff):
        header = read_header(io.BytesIO(content), len(content))
        assert header.upright == (14000, 14000)


def test_more_pixels_than_can_be_decoded_are_refused_by_name(tmp_path: Path) -> None:
    file = file_of(tmp_path, huge_png(40000), "scene.png")
    with pytest.raises(UserError, match=r"scene\.png.* is 40000x40000 px, more than can be decoded; cut it into tiles"):
        measure_images([file], "x", Faults())


def tiff_of(array: np.ndarray) -> bytes:
    return cv2.imencode(".tiff", array)[1].tobytes()


def packed_12_bit_tiff() -> bytes:
    tags = [(256, 16), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, 96)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 104) + bytes(96) + struct.pack("<H", len(tags)) + entries + bytes(4)


UNREAD = {
    "floating-point samples": tiff_of(picture().astype(np.float32) / 255),
    "signed samples": tiff_of(picture().astype(np.int16)),
    "12-bit samples": packed_12_bit_tiff(),
    "12 bits": WHOLE["jpeg"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "lossless or hierarchical": WHOLE["jpeg"].replace(b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"),
}


@pytest.mark.parametrize("words", UNREAD)
def test_samples_of_unknown_scale_are_refused_by_name(tmp_path: Path, words: str) -> None:
    file = file_of(tmp_path, UNREAD[words], "a.tif")
    for refuse in (lambda path: check_images([path], "x.json"), read_image):
        with pytest.raises(UserError, match=rf"a\.tif.*{words}.*save it"):
            refuse(file)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_twelve_bits_in_sixteen_are_told(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yoloxkd.data.io.images._dark", [])
    for name, factor in (("full", 257), ("dark", 16), ("dark2", 16)):
        assert cv2.imwrite(str(tmp_path / f"{name}.{suffix}"), picture().astype(np.uint16) * factor)
        with caplog.at_level(logging.WARNING):
            read_image(str(tmp_path / f"{name}.{suffix}"))
    assert len(caplog.messages) == 1
    assert f"dark.{suffix} has 16 bits and values below 4096 alone" in caplog.messages[0]


def test_palette_and_gray_with_alpha(tmp_path: Path) -> None:
    palette = Image.fromarray(picture()).quantize(8)
    palette.save(tmp_path / "p.png", transparency=bytes([0] * 4 + [255] * 4))
    assert np.abs(read_image(str(tmp_path / "p.png"))[0].astype(int) - picture()).max() < 8
    Image.fromarray(picture()[..., 0]).convert("LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "la.png"))[0][..., 1], picture()[..., 0])


def test_the_first_frame_of_a_moving_image_is_read(tmp_path: Path) -> None:
    flat, other = picture(), picture()[:, ::-1].copy()
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        file = file_of(tmp_path, encoded(kind, flat, save_all=True, append_images=[Image.fromarray(other)], **options))
        np.testing.assert_array_equal(read_image(file)[0], flat)


def exchanged(root: Path, kind: str) -> Path:
    """A set of one image, 128 wide and 96 high, whose annotations say it is 96 wide and 128 high."""
    (root / "images").mkdir(parents=True)
    file_of(root / "images", WHOLE[kind], "a.jpg")
    (root / "a.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg", "width": 96, "height": 128}], "annotations":'
        ' [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 40, 40]}], "categories": [{"id": 1, "name": "person"}]}'
    )
    (root / "data.yaml").write_text("names: [person]\ntrain: {images: images, annotations: a.json}\n")
    return root / "data.yaml"


@pytest.mark.parametrize("kind", ["jpeg", "webp", "bmp", "tiff", "gif", "png"])
def test_exchanged_sides_are_told_before_a_run(tmp_path: Path, kind: str) -> None:
    from yoloxkd.data.data_spec import load_split

    spec = find_data(exchanged(tmp_path, kind))
    with pytest.raises(UserError, match=r"a\.jpg.* is 128x96 px .* says 96x128 \(width and height exchanged\)"):
        load_split(spec, "train")
    (report,) = check_data(spec)
    assert report.breaking == 1


def damaged(content: bytes) -> bytes:
    """A JPEG with bytes too many, of which libjpeg complains on stderr."""
    return content[:-2] + b"\x55" * 50 + content[-2:]


def test_what_decoders_print_gets_the_name_of_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = file_of(tmp_path, damaged(WHOLE["jpeg"]), "odd.jpg")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read_image(file)
    assert len(caplog.messages) == 1
    assert "odd.jpg is damaged: its decoder says 'Corrupt JPEG data" in caplog.messages[0]
    assert "Corrupt" not in capfd.readouterr().err
    file_of(tmp_path, WHOLE["jpeg"], "b.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "data.yaml").write_text("names: [person]\ntrain: .\n")
    (report,) = check_data(find_data(tmp_path / "data.yaml"))
    assert report.faults.counts[COMPLAINTS] == 1
    assert report.faults.examples[COMPLAINTS][0].file == file
    assert "Corrupt" not in capfd.readouterr().err


def test_changed_and_cut_headers_end_in_a_sentence() -> None:
    """Seeded: bytes of the headers of every kind are changed, most of the files cut; nothing but ValueError comes out."""
    rng = np.random.default_rng(0)
    for number in range(1500):
        content = bytearray(WHOLE[list(WHOLE)[number % len(WHOLE)]])
        for at in rng.integers(0, min(len(content), (64, 700, len(content))[number % 3]), 4):
            content[at] = rng.choice([0, 255, rng.integers(256)])
        content = content[: int(rng.integers(1, 2 * len(content)))]
        try:
            fault = read_header(io.BytesIO(content), len(content)).fault
        except ValueError as error:
            fault = str(error)
        assert not fault or fault.startswith(("is ", "holds "))
