import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_vae.data.decoding import Decoded, Reject
from sd_vae.data.geometry import PictureTransform, largest_resize, placements, views
from sd_vae.errors import UserError
from sd_vae.images import to_tensor, to_unit_range

SHA = "5e" * 32


def decoded(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Decoded(Image.fromarray(noise), SHA, (height, width), False)


def as_array(x):
    return x.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("width", "height"), [(100, 64), (64, 101), (333, 500), (97, 97), (64, 64), (1000, 71)])
@pytest.mark.parametrize("name", ["bicubic", "lanczos"])
def test_center_view_equals_torchvision(width, height, name):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    picture = decoded(width, height)
    theirs = Compose([Resize(64, InterpolationMode(name)), CenterCrop(64)])(picture.image)

    (view,) = views(picture, PictureTransform(size=64, resize_filter=name))

    assert (as_array(view.x) == np.asarray(theirs)).all()


def test_view_is_the_crop_that_it_names():
    picture = decoded(150, 100)

    (view,) = views(picture, PictureTransform(size=64))

    top, left, height, width = view.crop
    resized = np.asarray(picture.image.resize(view.resized_size[::-1], Image.Resampling.BICUBIC))
    assert view.resized_size == (64, 96)
    assert (as_array(view.x) == resized[top : top + height, left : left + width]).all()


def test_view_is_contiguous_bytes():
    (view,) = views(decoded(80, 72), PictureTransform(size=64))

    assert view.x.dtype == torch.uint8
    assert view.x.shape == (3, 64, 64)
    assert view.x.is_contiguous()


def test_view_becomes_the_tensor_of_its_picture():
    picture = decoded(64, 64)

    (view,) = views(picture, PictureTransform(size=64))

    assert torch.equal(to_unit_range(view.x), to_tensor(picture.image)[0])


def test_flip_adds_the_mirror_image_behind_each_view():
    found = views(decoded(90, 80), PictureTransform(size=64, random_crops=2, flip=True))

    assert [(view.index, view.flipped) for view in found] == [(0, False), (0, True), (1, False), (1, True)]
    assert torch.equal(found[3].x, found[2].x.flip(-1))
    assert found[3].crop == found[2].crop


def test_native_cuts_to_multiples_of_the_factor():
    picture = decoded(45, 30)

    (view,) = views(picture, PictureTransform(native=True, factor=8))

    assert view.crop == (3, 2, 24, 40)
    assert (as_array(view.x) == np.asarray(picture.image)[3:27, 2:42]).all()


def test_native_rejects_what_is_smaller_than_a_cell():
    reject = views(decoded(45, 7), PictureTransform(native=True, factor=8))

    assert isinstance(reject, Reject)
    assert (reject.reason, reject.detail) == ("too-small", "7x45 is smaller than the crop 8x8")


def test_bucket_sizes_are_the_rectangles_of_one_area():
    transform = PictureTransform(size=512, buckets=True)

    assert transform.bucket_sizes == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))


@pytest.mark.parametrize(
    ("original", "bucket"),
    [((1000, 1000), (512, 512)), ((1200, 1600), (448, 576)), ((3000, 1000), (640, 384)), ((600, 900), (384, 640))],
)
def test_buckets_take_the_nearest_shape(original, bucket):
    (place,) = placements(original, PictureTransform(size=512, buckets=True), SHA)

    assert place.crop[2:] == bucket


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from(
        [
            PictureTransform(size=256),
            PictureTransform(size=256, allow_upscale=True),
            PictureTransform(size=256, random_crops=3, allow_upscale=True),
            PictureTransform(size=512, buckets=True, allow_upscale=True),
            PictureTransform(size=256, buckets=True, bucket_step=32, bucket_max_ratio=4.0),
            PictureTransform(native=True, factor=16),
        ]
    ),
)
def test_placements_lie_within_the_resized_picture(height, width, transform):
    places = placements((height, width), transform, SHA)

    if isinstance(places, Reject):
        assert not transform.allow_upscale
        return
    for place in places:
        top, left, *size = place.crop
        assert 0 <= top <= place.resized_size[0] - size[0]
        assert 0 <= left <= place.resized_size[1] - size[1]
        assert all(side % transform.factor == 0 for side in size)
        assert all(
            part <= whole
            for part, whole in zip(place.resized_size, largest_resize((height, width), transform), strict=True)
        )
        if not transform.allow_upscale:
            assert place.resized_size[0] <= height
            assert place.resized_size[1] <= width


@settings(max_examples=200, deadline=None)
@given(st.integers(512, 3000), st.integers(512, 3000))
def test_buckets_keep_the_shape_and_cut_one_direction_only(height, width):
    (place,) = placements((height, width), PictureTransform(size=512, buckets=True, allow_upscale=True), SHA)

    scales = place.resized_size[0] / height, place.resized_size[1] / width
    # one pixel of rounding on the shorter side of the smallest bucket
    assert abs(math.log(scales[0] / scales[1])) < 0.5 / 384
    assert place.resized_size[0] == place.crop[2] or place.resized_size[1] == place.crop[3]


@pytest.mark.parametrize("transform", [PictureTransform(size=64), PictureTransform(size=64, random_crops=2)])
def test_pictures_smaller_than_the_crop_are_rejected(transform):
    reject = views(decoded(200, 63), transform)

    assert (reject.reason, reject.detail) == ("too-small", "63x200 is smaller than the crop 64x64")


def test_buckets_reject_what_they_would_enlarge():
    reject = placements((600, 383), PictureTransform(size=512, buckets=True), SHA)

    assert reject.detail == "600x383 is smaller than the crop 640x384"


def test_allow_upscale_enlarges():
    (view,) = views(decoded(40, 32), PictureTransform(size=64, allow_upscale=True))

    assert view.resized_size == (64, 80)
    assert view.x.shape == (3, 64, 64)


def test_random_crops_depend_on_bytes_seed_and_number_alone():
    transform = PictureTransform(size=64, random_crops=3)

    first, again, other_bytes, other_seed = (
        placements((300, 400), chosen, sha256)
        for chosen, sha256 in [
            (transform, SHA),
            (PictureTransform(size=64, random_crops=5), SHA),
            (transform, "a0" * 32),
            (PictureTransform(size=64, random_crops=3, seed=1), SHA),
        ]
    )

    assert first == again[:3]
    assert len({tuple(places) for places in map(tuple, (first, other_bytes, other_seed))}) == 3
    assert len({place.crop for place in first}) == 3


def test_random_crops_keep_their_numbers():
    # Changing them changes every store that is resumed.
    (place,) = placements((300, 400), PictureTransform(size=64, random_crops=1), SHA)

    assert (place.resized_size, place.crop) == ((115, 153), (33, 33, 64, 64))


def test_random_crops_stay_within_their_scale():
    transform = PictureTransform(size=64, random_crops=200, crop_scale=(0.25, 0.5))

    shorter = [min(place.resized_size) for place in placements((300, 400), transform, SHA)]

    assert min(shorter) >= 128
    assert max(shorter) <= 256
    assert max(shorter) - min(shorter) > 64


def test_random_crops_take_no_fewer_pixels_than_they_return():
    transform = PictureTransform(size=64, random_crops=20, crop_scale=(0.1, 0.2))

    assert {place.resized_size for place in placements((80, 100), transform, SHA)} == {(80, 100)}


def test_transform_survives_json():
    transform = PictureTransform(size=256, random_crops=2, crop_scale=(0.6, 0.9), background=(0, 0, 0))

    assert PictureTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


def test_transform_names_unknown_fields():
    with pytest.raises(UserError, match=r"manifest\.json: unknown key 'siz', did you mean 'size'\?"):
        PictureTransform.from_dict({"siz": 512, "size": 512}, source="manifest.json")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, r"size is missing, give the side of the crops in pixels, or choose native"),
        ({"native": True, "size": 64}, r"native keeps every size, so it goes without size, buckets and random_crops"),
        ({"native": True, "buckets": True}, r"native keeps every size"),
        ({"native": True, "random_crops": 2}, r"native keeps every size"),
        ({"size": 512, "buckets": True, "random_crops": 2}, r"random_crops is 2 and buckets are centred, choose one"),
        ({"size": 0}, r"size is 0, it must be at least 1"),
        ({"size": 64, "bucket_step": 0}, r"bucket_step is 0, it must be at least 1"),
        ({"size": 64, "factor": 0}, r"factor is 0, it must be at least 1"),
        ({"size": 64, "max_pixels": 0}, r"max_pixels is 0, it must be at least 1"),
        ({"size": 100}, r"size is 100, it must be a multiple of factor 8"),
        ({"size": 512, "buckets": True, "bucket_step": 20}, r"bucket_step is 20, it must be a multiple of factor 8"),
        ({"size": 500, "buckets": True}, r"size is 500, with buckets it must be a multiple of bucket_step 64"),
        ({"size": 64, "bucket_max_ratio": 0.5}, r"bucket_max_ratio is 0\.5, it must be at least 1 and finite"),
        ({"size": 64, "bucket_max_ratio": math.nan}, r"bucket_max_ratio is nan, it must be at least 1 and finite"),
        ({"size": 64, "random_crops": -1}, r"random_crops is -1, it must be 0 or more"),
        ({"size": 64, "crop_scale": (0.9, 0.5)}, r"crop_scale is \(0\.9, 0\.5\), it must satisfy 0 < smallest"),
        ({"size": 64, "seed": -1}, r"seed is -1, it must be 0 or more"),
        ({"size": 64, "resize_filter": "box"}, r"resize_filter is 'box', choose bicubic or lanczos"),
        ({"size": 64, "background": (0, 0, 256)}, r"background is \(0, 0, 256\), every channel must be 0 to 255"),
        ({"size": 64, "max_pixels": 10**9}, r"max_pixels is 1000000000, Pillow opens at most 178956970"),
        ({"size": 64, "rules": 2}, r"rules is 2, this version has rules 1; use the version that wrote it"),
        ({"size": 100, "seed": -1}, r"size is 100.*; seed is -1"),
    ],
)
def test_transform_rejects(fields, complaint):
    with pytest.raises(UserError, match=complaint):
        PictureTransform(**fields)
