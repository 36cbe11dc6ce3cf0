import pytest
import torch

from eval.roundtrip import decode_picture, encode_picture, evaluating
from sd_vae.errors import UserError
from sd_vae.images import crop, pad_to_factor, to_pil, to_tensor


def test_encode_picture_pads_to_the_factor(tiny_vae, photos):
    encoded = encode_picture(tiny_vae, photos["cat"])

    assert encoded.z.shape == (1, 4, 13, 19)  # 25x37 at factor 2, rounded up


def test_round_trip_equals_the_padded_forward_cropped_back(tiny_vae, photos):
    x = photos["cat"]

    recon = decode_picture(tiny_vae, encode_picture(tiny_vae, x).z, x.size)

    with torch.no_grad():
        expected = to_pil(crop(tiny_vae(pad_to_factor(to_tensor(x), 2)).sample, x.height, x.width))
    assert recon.size == x.size
    assert recon.tobytes() == expected.tobytes()


def test_round_trip_takes_plain_diffusers_models_and_half_precision(tiny_vae, photos):
    theirs = tiny_vae.to_diffusers().to(torch.bfloat16)
    x = photos["coffee"]

    recon = decode_picture(theirs, encode_picture(theirs, x).z, x.size)

    assert recon.size == x.size


def test_decode_picture_refuses_values_that_are_not_finite(tiny_vae, monkeypatch):
    # as on a GPU, where `decode` itself does not look
    monkeypatch.setattr("sd_vae.autoencoder.ensure_finite", lambda *given: given[-1])
    torch.nn.init.constant_(tiny_vae.decoder.conv_out.bias, float("nan"))

    with pytest.raises(UserError, match="not finite in float32"):
        decode_picture(tiny_vae, torch.zeros(1, 4, 4, 4), (8, 8))


def test_evaluating_restores_the_mode_also_after_an_error(tiny_vae):
    def fail():
        with evaluating([tiny_vae]):
            assert not tiny_vae.training
            raise KeyboardInterrupt

    tiny_vae.train()

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tiny_vae.training
