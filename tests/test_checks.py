"""What the model refuses at its door, in one line with the rule, both values and the remedy."""

from collections.abc import Iterator

import pytest
import torch

from sd_vae import UserError, set_checks
from sd_vae.checks import ensure_finite, require_image, require_latent


@pytest.fixture
def everywhere() -> Iterator[None]:
    """`set_checks(True)` for one test."""
    set_checks(True)
    yield
    set_checks(False)


def test_require_image_accepts_every_multiple_of_the_factor() -> None:
    for height, width in ((8, 8), (72, 136), (8, 800)):
        require_image(torch.zeros(1, 3, height, width), 3, 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 3, 65, 64),
            r"image size 65x64 is not a multiple of 8 in both directions; pad it with sd_vae.pad_to_factor",
        ),
        ((1, 3, 64, 63), r"image size 64x63 is not a multiple of 8 .* crop the reconstruction back, or resize it\."),
        ((1, 3, 0, 64), r"image size 0x64 is not a multiple of 8"),
        ((1, 4, 64, 64), r"x has 4 channels, this VAE takes 3; convert the picture to RGB, or load the VAE that"),
        ((3, 64, 64), r"x has shape \(3, 64, 64\), it must be \(batch, 3, height, width\) .* unsqueeze\(0\)\."),
        ((0, 3, 64, 64), r"x has shape \(0, 3, 64, 64\), .* with at least one item"),
    ],
)
def test_require_image_rejects_a_wrong_shape(shape, message) -> None:
    with pytest.raises(UserError, match=message):
        require_image(torch.zeros(shape), 3, 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 8, 8), r"z has 16 channels, this VAE takes 4"),
        ((4, 8, 8), r"z has shape \(4, 8, 8\), it must be \(batch, 4, height, width\)"),
        ((1, 4, 0, 8), r"z has shape \(1, 4, 0, 8\), which holds no latent cell; give it at least 1x1\."),
        ((1, 4, 8, 0), r"which holds no latent cell"),
    ],
)
def test_require_latent_rejects_a_wrong_shape(shape, message) -> None:
    with pytest.raises(UserError, match=message):
        require_latent(torch.zeros(shape), 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_require_image_rejects_a_dtype_that_is_no_float(dtype) -> None:
    with pytest.raises(
        UserError, match=rf"x has dtype {dtype}, it must be a float type; pictures go through to_tensor"
    ):
        require_image(torch.zeros(1, 3, 8, 8, dtype=dtype), 3, 8)


def test_require_image_rejects_what_is_no_tensor() -> None:
    from PIL import Image

    with pytest.raises(UserError, match=r"x is of type Image, it must be a tensor; pictures go through to_tensor\."):
        require_image(Image.new("RGB", (8, 8)), 3, 8)


@pytest.fixture
def module() -> torch.nn.Module:
    return torch.nn.Identity().eval()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_ensure_finite_blames_the_input_that_was_bad(module, bad) -> None:
    given = torch.zeros(1, 1, 2, 2)
    given[..., 0, 0] = bad

    with pytest.raises(
        UserError, match=r"encode was given 1 values that are not finite, of 4; clean its input first\."
    ):
        ensure_finite(module, "encode", given, given)


def test_ensure_finite_blames_weights_or_range_where_the_input_was_finite(module) -> None:
    given, result = torch.full((2,), 3e9), torch.full((2,), float("nan"))

    with pytest.raises(
        UserError,
        match=r"decode gave values that are not finite in float32 from an input of largest magnitude 3.0e\+09",
    ):
        ensure_finite(module, "decode", given, result)


def test_ensure_finite_returns_finite_values_as_they_are(module) -> None:
    result = torch.zeros(2)

    assert ensure_finite(module, "encode", torch.zeros(2), result) is result


def test_ensure_finite_does_not_look_while_training(module) -> None:
    ensure_finite(module.train(), "encode", torch.zeros(2), torch.full((2,), float("nan")))


class Elsewhere:
    """Stands for a tensor on another device, where looking at values would cost a synchronisation."""

    device = torch.device("xpu")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.was_looked_at = False

    def isfinite(self) -> torch.Tensor:
        self.was_looked_at = True
        return torch.tensor([True])


def test_ensure_finite_does_not_look_at_other_devices(module) -> None:
    result = Elsewhere()

    ensure_finite(module, "decode", torch.zeros(1), result)

    assert not result.was_looked_at


@pytest.mark.usefixtures("everywhere")
def test_set_checks_looks_at_other_devices_too(module) -> None:
    result = Elsewhere()

    ensure_finite(module, "decode", torch.zeros(1), result)

    assert result.was_looked_at


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ensure_finite_looks_at_half_precision_on_every_device(module, dtype) -> None:
    result = Elsewhere(dtype)

    ensure_finite(module, "decode", torch.zeros(1), result)

    assert result.was_looked_at


@pytest.mark.usefixtures("everywhere")
def test_meta_tensors_pass_through_the_model() -> None:
    from sd_vae import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_preset("mini").eval()

    assert vae(torch.zeros(1, 3, 16, 16, device="meta")).sample.shape == (1, 3, 16, 16)
