import pytest
import skimage.data
from PIL import Image

from eval.codecs import CODECS, compress
from eval.metrics import psnr_db
from eval.routes import CodecRoute
from sd_vae.errors import UserError


@pytest.fixture
def photo():
    return Image.fromarray(skimage.data.chelsea()).resize((128, 96))


@pytest.mark.parametrize("codec", list(CODECS))
def test_compress_takes_the_quality_nearest_in_size(codec, photo):
    wanted = 128 * 96

    coded = compress(photo, codec, wanted)

    sizes = {
        quality: 8 * compress(photo, codec, 8 * _size(photo, codec, quality)).num_bytes for quality in (20, 50, 80)
    }
    assert coded.recon.size == photo.size
    assert all(abs(8 * coded.num_bytes - wanted) <= abs(size - wanted) for size in sizes.values())


def _size(photo, codec, quality):
    import io

    kind, options = CODECS[codec]
    buffer = io.BytesIO()
    photo.save(buffer, kind, quality=quality, **options)
    return len(buffer.getvalue())


@pytest.mark.parametrize("codec", list(CODECS))
def test_compress_out_of_reach_takes_the_end(codec, photo):
    smallest, largest = compress(photo, codec, 1), compress(photo, codec, 1e9)

    assert (smallest.quality, largest.quality) == (0, 100)
    assert psnr_db(smallest.recon, photo) < psnr_db(largest.recon, photo)


def test_compress_refuses_an_unknown_codec(photo):
    with pytest.raises(UserError, match="unknown codec 'GIF'; choose one of: JPEG, WebP"):
        compress(photo, "GIF", 100)


def test_codec_route_needs_a_vae(photo):
    with pytest.raises(UserError, match="JPEG at equal bits needs a VAE"):
        CodecRoute("JPEG")(photo, "cat", None)
