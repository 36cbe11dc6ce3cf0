import numpy as np
import pytest
import skimage.data
from PIL import Image
from torchvision.transforms import v2

from eval.photos import fit_photo
from eval.protocols import IMAGE_METRICS, NETWORKS, PROTOCOLS, SET_METRICS, Protocol, get_protocol
from sd_vae.errors import UserError


def test_protocols_are_the_named_ones():
    assert list(PROTOCOLS) == ["pixels", "native", "coco5k-256", "imagenet50k-256", "sd-512"]
    assert {name: protocol.size for name, protocol in PROTOCOLS.items()} == {
        "pixels": None,
        "native": None,
        "coco5k-256": 256,
        "imagenet50k-256": 256,
        "sd-512": 512,
    }


def test_imagenet_protocol_has_the_conventions_of_its_table():
    protocol = PROTOCOLS["imagenet50k-256"]

    assert (protocol.resize_filter, protocol.latents, protocol.rounding) == ("bilinear", "sample", "down")
    assert protocol.ssim_window == "uniform-7"
    assert {"lpips_vgg", "rfid"} <= set(protocol.metrics)


def test_stamp_says_every_setting():
    stamp = PROTOCOLS["imagenet50k-256"].stamp()

    assert stamp["name"] == "imagenet50k-256"
    assert "bilinear, antialiased" in stamp["photo"]
    assert "seed 0" in stamp["latents"]
    assert "down" in stamp["reconstruction"]
    assert "uniform-7" in stamp["SSIM"]


def test_get_protocol_says_that_another_size_is_another_protocol():
    assert get_protocol("native", size=512).name == "native at 512"
    assert get_protocol("sd-512", size=512).name == "sd-512"
    assert get_protocol("native", metrics=["ssim"]).image_metrics == ("ssim",)


def test_every_metric_with_a_network_is_known():
    assert set(NETWORKS) <= {*IMAGE_METRICS, *SET_METRICS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "mine"}, "unknown protocol 'mine'; choose one of: pixels, native"),
        ({"metrics": ["psnr"]}, "unknown metric 'psnr'; choose from: psnr_db"),
        ({"metrics": []}, "no metric to measure"),
        ({"metrics": ["ssim", "ssim"]}, "metric ssim is given 2 times"),
        ({"size": 0}, "size is 0 pixels, it must be at least 1"),
    ],
)
def test_get_protocol_refuses(options, message):
    with pytest.raises(UserError, match=message):
        get_protocol(**{"protocol": "native"} | options)


def test_protocol_takes_one_of_your_own():
    mine = Protocol(name="mine", version=3, size=64, metrics=("rfid", "psnr_db"))

    assert get_protocol(mine) is mine
    assert (mine.image_metrics, mine.set_metrics) == (("psnr_db",), ("rfid",))


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(451, 300), (299, 451), (100, 300), (256, 256)])
def test_fit_photo_is_torchvisions_resize_and_center_crop(name, size):
    photo = Image.fromarray(skimage.data.chelsea()).resize(size)
    interpolation = getattr(v2.InterpolationMode, name.upper())

    ours = fit_photo(photo, 256, name)

    theirs = v2.CenterCrop(256)(v2.Resize(256, interpolation)(photo))
    assert (np.asarray(ours) == np.asarray(theirs)).all()
