import hashlib
import io
import random

import numpy as np
import pytest
from PIL import Image

from sd_vae.data.decoding import REASONS, Decoded, Reject, decode_picture, decoder_versions
from sd_vae.images import FORMATS, open_image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_decode_picture_equals_open_image():
    data = stored(NOISE, "JPEG")

    decoded = decode_picture(data)

    assert decoded.image.tobytes() == open_image(io.BytesIO(data), "noise").tobytes()
    assert decoded.sha256 == hashlib.sha256(data).hexdigest()
    assert decoded.original_size == (24, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_decode_picture_gives_the_upright_size(kind):
    decoded = decode_picture(stored(NOISE, kind, exif=turned(6)))

    assert decoded.original_size == (32, 24)
    assert decoded.image.size == (24, 32)


def test_decode_picture_lays_transparency_over_the_background():
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))

    decoded = decode_picture(stored(clear, "PNG"), background=(1, 2, 3))

    assert decoded.image.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(("kind", "num_frames"), [("GIF", 1), ("GIF", 2), ("PNG", 2), ("WEBP", 2), ("TIFF", 2)])
def test_decode_picture_takes_the_first_frame_and_says_so(kind, num_frames):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = stored(red, kind, save_all=True, append_images=[blue][: num_frames - 1], **options)

    decoded = decode_picture(data)

    assert decoded.image.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.has_more_frames == (num_frames > 1)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty", "0 bytes"),
        (b"<html>404</html>", "not-a-picture", "no picture format is recognised"),
        (stored(NOISE, "JPEG")[:-300], "damaged", "OSError: image file is truncated"),
        (stored(NOISE, "PNG")[:-300], "damaged", "OSError: "),
        (stored(NOISE, "BMP")[:-300], "damaged", "OSError: image file is truncated"),
        (stored(Image.new("F", (4, 4)), "TIFF"), "unknown-colours", "a picture of floats has no known range"),
        (stored(NOISE, "EPS"), "not-a-picture", "no picture format is recognised"),
    ],
)
def test_decode_picture_rejects(data, reason, detail):
    reject = decode_picture(data)

    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert reject.detail.startswith(detail)
    assert reject.sha256 == hashlib.sha256(data).hexdigest()


def test_decode_picture_rejects_more_pixels_than_allowed():
    reject = decode_picture(stored(NOISE, "PNG"), max_pixels=24 * 32 - 1)

    assert reject.reason == "too-large"
    assert reject.detail == "24x32 is 768 pixels, the limit is 767"


def test_decode_picture_takes_as_many_pixels_as_allowed():
    assert isinstance(decode_picture(stored(NOISE, "PNG"), max_pixels=24 * 32), Decoded)


def test_decode_picture_rejects_what_pillow_refuses(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 768 pixels: above twice the limit

    reject = decode_picture(stored(NOISE, "PNG"))

    assert reject.reason == "too-large"


@pytest.mark.parametrize("kind", FORMATS)
def test_decode_picture_survives_every_damage(kind):
    # Pillow raises IndexError, OverflowError, RuntimeError and struct.error too; none may stop a run.
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    rng = random.Random(kind)
    frames = {"save_all": True, "append_images": [NOISE.rotate(90)]} if kind == "GIF" else {}
    exif = {} if kind in ("BMP", "PPM", "JPEG2000", "GIF") else {"exif": turned(6)}
    whole = stored(NOISE, kind, **frames, **exif)

    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), rng.choice([60, 200, len(data)])))] = rng.randrange(256)
        outcome = decode_picture(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]), max_pixels=10_000)

        assert isinstance(outcome, Decoded) or outcome.reason in REASONS


def test_decode_picture_says_the_same_of_the_same_file():
    data = stored(NOISE, "WEBP")[:20]

    assert decode_picture(data) == decode_picture(data)


@pytest.mark.parametrize(
    ("target", "expected"),
    [((100, 200), (200, 400)), ((99, 199), (200, 400)), ((101, 200), (400, 800)), ((50, 90), (100, 200))],
)
def test_decode_picture_shrinks_to_no_less_than_twice_the_target(target, expected):
    data = stored(NOISE.resize((800, 400)), "JPEG")

    decoded = decode_picture(data, shrink_to=lambda size: target)

    assert decoded.image.size[::-1] == expected
    assert decoded.original_size == (400, 800)


def test_decode_picture_shrinks_a_turned_picture_in_its_stored_direction():
    data = stored(NOISE.resize((800, 400)), "JPEG", exif=turned(6))

    decoded = decode_picture(data, shrink_to=lambda size: (200, 100))

    assert decoded.original_size == (800, 400)
    assert decoded.image.size[::-1] == (400, 200)


def test_reject_is_plain_values():
    reject = Reject("empty", "0 bytes", "e3b0", position=3, id="a.png", source="photos/a.png")

    assert reject.to_dict() == {
        "reason": "empty",
        "detail": "0 bytes",
        "sha256": "e3b0",
        "position": 3,
        "id": "a.png",
        "source": "photos/a.png",
    }


def test_decoder_versions_name_pillow_and_its_jpeg_library():
    assert {"pillow", "libjpeg_turbo"} <= decoder_versions().keys()
    assert all(isinstance(version, str) for version in decoder_versions().values())
