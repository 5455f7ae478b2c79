"""ImageColumns of every kind come out as 8-bit RGB; what is no whole image is refused in one sentence."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from yoloxkd.data.io.image_headers import image_size
from yoloxkd.data.io.images import check_images, read_image
from yoloxkd.errors import UserError


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """RGB with a red left, a green right and a blue bottom, so that order and orientation show."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0], image[:, width // 2 :, 1], image[2 * height // 3 :, :, 2] = 200, 200, 200
    return image


def save(path: Path, array: np.ndarray, **options: object) -> str:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return str(path)


def test_colors_come_in_rgb_order(tmp_path: Path) -> None:
    image, factor = read_image(save(tmp_path / "a.png", picture()))
    assert factor == 1
    np.testing.assert_array_equal(image, picture())


def test_gray_alpha_and_palette_become_three_channels(tmp_path: Path) -> None:
    gray = picture()[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", gray))[0], np.stack([gray] * 3, -1))
    alpha = np.concatenate([picture(), np.full((24, 40, 1), 128, np.uint8)], -1)
    np.testing.assert_array_equal(read_image(save(tmp_path / "alpha.png", alpha))[0], picture())
    Image.fromarray(picture()).convert("P").save(tmp_path / "p.png")
    assert read_image(str(tmp_path / "p.png"))[0].shape == (24, 40, 3)


def test_sixteen_bits_keep_their_upper_byte(tmp_path: Path) -> None:
    deep = picture().astype(np.uint16) * 256 + 17
    assert cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_image(str(tmp_path / "deep.png"))[0], picture())


def turned_jpeg(path: Path) -> str:
    """Stored 24 high, 40 wide, with the EXIF note that it is to be turned by 90 degrees to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(path, picture(), quality=95, exif=exif.tobytes())


@pytest.mark.parametrize("reduce", [1, 2])
def test_exif_orientation_follows_the_annotated_size(tmp_path: Path, reduce: int) -> None:
    file = turned_jpeg(tmp_path / "t.jpg")
    upright, _ = read_image(file, (40, 24), reduce)
    assert upright.shape == (40 // reduce, 24 // reduce, 3)
    stored, _ = read_image(file, (24, 40), reduce)
    assert stored.shape == (24 // reduce, 40 // reduce, 3)
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))
    assert read_image(file)[0].shape == (40, 24, 3)


def test_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png is 40x24 px but its annotation file says 50x24"):
        read_image(save(tmp_path / "a.png", picture()), (24, 50))


@pytest.mark.parametrize(("height", "width"), [(37, 53), (48, 64), (33, 8)])
@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_a_reduced_jpeg_covers_the_same_pixels(tmp_path: Path, height: int, width: int, reduce: int) -> None:
    ramp = np.add.outer(np.arange(height) * 2, np.arange(width) * 2).astype(np.uint8)[..., None].repeat(3, -1)
    file = save(tmp_path / "r.jpg", ramp, quality=98)
    small, factor = read_image(file, (height, width), reduce)
    assert factor == reduce
    assert small.shape == (-(-height // reduce), -(-width // reduce), 3)
    whole_h, whole_w = height // reduce, width // reduce
    blocks = ramp[: whole_h * reduce, : whole_w * reduce, 0].reshape(whole_h, reduce, whole_w, reduce).mean((1, 3))
    assert np.abs(small[:whole_h, :whole_w, 0] - blocks).mean() < 2.0


def test_other_formats_are_read_whole(tmp_path: Path) -> None:
    image, factor = read_image(save(tmp_path / "a.png", picture()), (24, 40), 4)
    assert (factor, image.shape) == (1, (24, 40, 3))


def jpeg_with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds another, whole, JPEG."""
    small, large = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture(8, 8)).save(small, "JPEG")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(large, "JPEG")
    block = b"Exif\0\0" + small.getvalue()
    content = large.getvalue()
    return content[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + content[2:]


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = jpeg_with_thumbnail()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    save(folder / "whole.png", noise)
    contents = {
        "empty.jpg": (b"", "is empty"),
        "cut.jpg": (whole[: len(whole) // 2], "is cut short"),
        "cut.png": ((folder / "whole.png").read_bytes()[:6000], "is cut short"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, fault) for name, (_, fault) in contents.items()}


@pytest.mark.parametrize("name", ["empty.jpg", "cut.jpg", "cut.png"])
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file, fault = broken_files(tmp_path)[name]
    with pytest.raises(UserError, match=f"{name} {fault}"):
        read_image(str(file))
    with pytest.raises(UserError, match=f"{name}.*{fault}"):
        check_images([str(file)], "x.json")


def test_missing_files_and_files_that_are_no_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the image .*none\.jpg: No such file"):
        read_image(str(tmp_path / "none.jpg"))
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(UserError, match=r"text\.jpg is not an image"):
        read_image(str(tmp_path / "text.jpg"))


def test_whole_files_pass_the_check_even_with_bytes_after_their_end(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_with_thumbnail())
    (tmp_path / "b.jpg").write_bytes(jpeg_with_thumbnail() + b"\0\0tail")
    files = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"), save(tmp_path / "c.png", picture())]
    check_images(files, "x.json")
    assert all(read_image(file)[0].ndim == 3 for file in files)


def test_the_check_names_the_first_file_and_counts_the_others(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.png", picture()), str(tmp_path / "b.png"), str(tmp_path / "c.png")]
    with pytest.raises(UserError, match=r"b\.png.*x\.json.*is missing \(the first of 2 such files out of 3\)"):
        check_images(files, "x.json")


def plain_cmyk(path: Path) -> str:
    """A CMYK JPEG without Adobe's marker, where 255 is full ink."""
    buffer = io.BytesIO()
    inverted = Image.fromarray(255 - np.asarray(Image.fromarray(picture()).convert("CMYK")), "CMYK")
    inverted.save(buffer, "JPEG", quality=98)
    content = buffer.getvalue()
    at = content.find(b"Adobe") - 4
    length = int.from_bytes(content[at + 2 : at + 4])
    path.write_bytes(content[:at] + content[at + 2 + length :])
    return str(path)


def test_cmyk_of_both_kinds(tmp_path: Path) -> None:
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "adobe.jpg", quality=98)
    assert b"Adobe" in (tmp_path / "adobe.jpg").read_bytes()
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "ink.tif")
    for file in (str(tmp_path / "adobe.jpg"), plain_cmyk(tmp_path / "plain.jpg"), str(tmp_path / "ink.tif")):
        image, _ = read_image(file, (24, 40))
        inner = np.abs(image.astype(int) - picture())[4:12, 4:16]
        assert inner.max() < 12, file


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_is_dropped_in_every_format(tmp_path: Path, suffix: str) -> None:
    alpha = np.concatenate([picture(), np.full((24, 40, 1), 60, np.uint8)], -1)
    options = {"lossless": True} if suffix == "webp" else {}
    np.testing.assert_array_equal(read_image(save(tmp_path / f"a.{suffix}", alpha, **options))[0], picture())


def test_gray_of_sixteen_bits_and_of_one(tmp_path: Path) -> None:
    deep = picture()[..., 0].astype(np.uint16) * 256 + 9
    for suffix in ("png", "tif"):
        assert cv2.imwrite(str(tmp_path / f"d.{suffix}"), deep)
        np.testing.assert_array_equal(read_image(str(tmp_path / f"d.{suffix}"))[0][..., 2], picture()[..., 0])
    Image.fromarray(picture()[..., 0]).convert("1").save(tmp_path / "one.png")
    assert set(np.unique(read_image(str(tmp_path / "one.png"))[0])) <= {0, 255}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_image_read(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if suffix == "bmp" else {"exif": exif}
    file = save(tmp_path / f"a.{suffix}", picture(), **options)
    assert image_size(file) == read_image(file)[0].shape[:2]


def test_headers_that_are_none(tmp_path: Path) -> None:
    for name, content in {"a.jpg": b"\xff\xd8\xff\xe0", "b.png": b"\x89PNG", "c.jpg": b"nothing"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is not"):
            image_size(str(tmp_path / name))
    assert image_size(str(write(tmp_path / "d.jpg", jpeg_with_thumbnail()))) == (64, 64)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
