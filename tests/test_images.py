import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sd_vae.errors import UserError
from sd_vae.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    crop,
    list_images,
    open_image,
    pad_to_factor,
    to_pil,
    to_rgb,
    to_tensor,
    to_unit_range,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def stored(image, kind, **options):
    """A picture as the open file it would be stored in."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def test_open_image_repeats_greyscale():
    rgb = pixels(open_image(stored(Image.fromarray(RAMP), "PNG"), "grey"))

    assert (rgb == RAMP[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_open_image_scales_16_bit_grey(kind):
    grey = Image.fromarray(RAMP.astype(np.uint16) * 257)

    rgb = pixels(open_image(stored(grey, kind), "16 bit"))

    assert (rgb == RAMP[..., None]).all()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_to_rgb_rounds_16_bit_grey_to_nearest(mode):
    grey = np.arange(65536).reshape(256, 256)
    image = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32))

    rgb = pixels(to_rgb(image))

    assert image.mode == mode
    assert (rgb[..., 0] == np.round(grey / 257)).all()


def test_open_image_looks_palettes_up():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)

    rgb = pixels(open_image(stored(palette, "PNG"), "palette"))

    assert rgb.tolist() == [[[0, 0, 0], [10, 20, 30]]]


def test_open_image_looks_bits_up():
    rgb = pixels(open_image(stored(Image.new("1", (2, 2), 1), "PNG"), "bits"))

    assert (rgb == 255).all()


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_open_image_converts_cmyk(kind):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))

    rgb = pixels(open_image(stored(red, kind), "cmyk"))

    assert np.abs(rgb.astype(int) - [255, 0, 0]).max() <= 1


def cmyk_profile():
    """A printer profile in which cyan ink is pure green: a look-up table of two points an ink, as CIE Lab."""
    same = bytes(range(256))
    inks = [(cyan, black) for cyan in (0, 1) for _ in range(4) for black in (0, 1)]
    table = b"".join(bytes([255 - 200 * k - 100 * c * (1 - k), 128 - 60 * c, 128 + 60 * c]) for c, k in inks)
    matrix = struct.pack(">9i", *(65536, 0, 0, 0) * 2, 65536)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + same * 4 + table + same * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    offset, entries, body = 128 + 4 + 3 * 12, struct.pack(">I", 3), b""
    for tag, value in ((b"desc", name), (b"wtpt", white), (b"A2B0", lut)):
        entries += tag + struct.pack(">II", offset + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(">I4sI", offset + len(body), b"test", 0x02100000) + b"prtrCMYKLab "
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + entries + body


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_open_image_converts_cmyk_by_its_profile(kind):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))

    rgb = pixels(open_image(stored(cyan, kind, icc_profile=cmyk_profile()), "cmyk"))

    # Pillow's own formula would say (0, 255, 255).
    assert np.abs(rgb.astype(int) - [0, 171, 0]).max() <= 2


@pytest.mark.parametrize("form", ["garbage", "rgb"])
def test_open_image_names_a_cmyk_profile_that_cannot_be_used(form):
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = stored(Image.new("CMYK", (8, 8)), "JPEG", icc_profile=b"none" if form == "garbage" else rgb_profile)

    with pytest.raises(UserError, match=r"cannot read the picture cmyk: its CMYK profile cannot be used \(.*\); save"):
        open_image(file, "cmyk")


def test_to_rgb_leaves_the_profile_of_rgb_alone():
    image = Image.new("RGB", (1, 1), (10, 200, 30))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()

    assert to_rgb(image).getpixel((0, 0)) == (10, 200, 30)


def test_to_rgb_lays_alpha_over_the_background():
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))

    assert to_rgb(half, background=(0, 100, 200)).getpixel((0, 0)) == (0, 80, 160)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_open_image_lays_alpha_over_white(mode):
    half = Image.new(mode, (1, 1), (0, 0, 0, 51) if mode == "RGBA" else (0, 51))

    rgb = pixels(open_image(stored(half, "PNG"), "alpha"))

    assert rgb.tolist() == [[[204, 204, 204]]]


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_open_image_lays_a_transparent_colour_over_white(mode):
    colour = {"L": 7, "RGB": (7, 7, 7), "P": 1}[mode]
    image = Image.new(mode, (1, 1), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 7, 7, 7])

    rgb = pixels(open_image(stored(image, "PNG", transparency=colour), "transparent"))

    assert rgb.tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 3)), (6, (0, 1)), (8, (3, 0))])
def test_open_image_turns_upright_by_exif(orientation, corner):
    # The stored picture is 4 wide and 2 high, white at its upper left.
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation

    rgb = pixels(open_image(stored(image, "PNG", exif=exif), "turned"))

    assert rgb.shape[:2] == ((2, 4) if orientation in (1, 3) else (4, 2))
    assert tuple(np.argwhere(rgb[..., 0] == 255)[0]) == corner


def test_open_image_takes_the_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]

    rgb = pixels(open_image(stored(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animation"))

    assert (rgb == [255, 0, 0]).all()


def test_open_image_rejects_floats_of_unknown_range():
    floats = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))

    with pytest.raises(UserError, match=r"cannot read the picture hdr\.tif: a picture of floats has no known range"):
        open_image(stored(floats, "TIFF"), "hdr.tif")


def test_open_image_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"there is no picture .*gone\.png; check the path\."):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_open_image_names_a_picture_cut_short(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = stored(noise, kind).getvalue()

    with pytest.raises(UserError, match=r"cannot read the picture half: .*; convert it or leave it out\."):
        open_image(io.BytesIO(whole[: len(whole) // 2]), "half")


def test_open_image_names_a_text_file(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")

    with pytest.raises(UserError, match=r"cannot read the picture .*text\.png: cannot identify image file"):
        open_image(tmp_path / "text.png")


def test_open_image_never_starts_ghostscript():
    # Pillow would hand a file that says it is EPS to a program, whatever its name.
    assert "EPS" not in FORMATS

    with pytest.raises(UserError, match=r"cannot read the picture page: cannot identify image file"):
        open_image(stored(Image.new("RGB", (4, 4)), "EPS"), "page")


def test_open_image_names_damage_that_pillow_has_no_word_for():
    pytest.importorskip("PIL._avif", reason="this Pillow was built without AVIF")
    whole = stored(Image.new("RGB", (4, 4)), "AVIF").getvalue()

    # Without its table of places, Pillow raises RuntimeError.
    with pytest.raises(UserError, match=r"cannot read the picture avif: .*; convert it or leave it out\."):
        open_image(io.BytesIO(whole.replace(b"iloc", b"free")), "avif")


def test_open_image_names_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the picture .*Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize(("limit", "remedy"), [(100, "make it smaller"), (50, "convert it or leave it out")])
def test_open_image_refuses_decompression_bombs(monkeypatch, limit, remedy):
    # 144 pixels: Pillow warns above its limit and refuses above twice the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    with pytest.raises(UserError, match=rf"cannot read the picture huge: .*decompression bomb.*; {remedy}\."):
        open_image(stored(Image.new("RGB", (12, 12)), "PNG"), "huge")


def test_to_tensor_maps_bytes_to_the_unit_range():
    x = to_tensor(Image.fromarray(RAMP))

    assert x.shape == (1, 3, 16, 16)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1.0, 1.0)


def test_to_unit_range_maps_any_shape():
    x = to_unit_range(torch.tensor([[0, 255]], dtype=torch.uint8))

    assert x.tolist() == [[-1.0, 1.0]]


def test_to_pil_is_the_inverse_of_to_tensor():
    image = to_rgb(Image.fromarray(RAMP))

    assert to_pil(to_tensor(image)).tobytes() == image.tobytes()


def test_to_pil_clamps_and_rounds_to_nearest():
    x = torch.tensor([-9.0, 0.5 / 255, 9.0]).view(3, 1, 1)

    assert to_pil(x).getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 4, 4), (4, 4)])
def test_to_pil_rejects_other_shapes(shape):
    with pytest.raises(UserError, match=r"x has shape .*, it must be \(1, 3, H, W\) or \(3, H, W\)"):
        to_pil(torch.zeros(shape))


@pytest.mark.parametrize(("height", "width"), [(5, 12), (8, 8), (1, 3), (17, 9)])
def test_crop_undoes_pad_to_factor(height, width):
    x = torch.rand(1, 3, height, width)

    padded = pad_to_factor(x, 8)

    assert (padded.shape[-2] % 8, padded.shape[-1] % 8) == (0, 0)
    assert torch.equal(crop(padded, height, width), x)


def test_list_images_is_sorted_and_goes_below(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.JPG", "notes.txt"):
        (tmp_path / name).touch()

    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["b/a.JPG", "z.png"]


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_image_suffixes_name_formats_that_are_decoded(suffix):
    Image.init()
    kind = Image.registered_extensions().get(suffix, "PNG" if suffix == ".apng" else None)

    assert kind in FORMATS or (suffix == ".avif" and "AVIF" not in Image.OPEN)  # Pillow built without it


@pytest.mark.parametrize("suffix", ["jfif", "JP2", "avif", "png"])
def test_list_images_finds_what_pillow_reads(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.init()
    kind = Image.registered_extensions().get(f".{suffix.lower()}")
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {suffix}")
    Image.fromarray(RAMP).convert("RGB").save(path)

    assert list_images(tmp_path) == [path]
    assert open_image(path).size == (16, 16)


def test_list_images_names_a_folder_without_pictures(tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(UserError, match=r"holds no pictures \(apng, avif, bmp, .*\); give a folder that does"):
        list_images(tmp_path)


def test_list_images_names_what_is_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone is not a folder; give a folder of pictures"):
        list_images(tmp_path / "gone")
