"""Our VAE inside diffusers' pipelines: the same pictures as theirs, and saved pipelines that open without us."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray

from sd_vae import AutoencoderKL, ops

NARROW = {"block_out_channels": (8, 8, 8, 16), "norm_num_groups": 4, "layers_per_block": 1, "force_upcast": True}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
ABSENT = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))

RELOAD = """
import numpy, torch
from diffusers import StableDiffusionPipeline
absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
pipe = StableDiffusionPipeline.from_pretrained("pipe", local_files_only=True, **absent)
pipe.set_progress_bar_config(disable=True)
inputs = torch.load("inputs.pt", weights_only=True)
picture = pipe(**inputs, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
numpy.save("picture.npy", picture)
print(type(pipe.vae).__module__)
"""


def make_vae(preset: str = "sd1") -> AutoencoderKL:
    return AutoencoderKL.from_preset(preset, **NARROW).eval()


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline around our VAE, without text encoder and safety checker."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        unet=UNet2DConditionModel(**UNET).eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        **ABSENT,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.randn(1, 4, 8)}


@pytest.fixture
def photo() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64)


def draw(pipe: Any, **inputs: Any) -> NDArray[np.float32]:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**inputs, generator=generator, num_inference_steps=2, output_type="np").images


def with_plain_vae(pipe: Any) -> Any:
    """The same pipeline around diffusers' own class, with the same weights."""
    return type(pipe)(**pipe.components | {"vae": pipe.vae.to_diffusers()}, requires_safety_checker=False)


def test_pipeline_text_to_image_equals_diffusers(pipe, prompts, assert_close) -> None:
    picture = draw(pipe, **prompts)

    assert picture.shape == (1, 64, 64, 3)
    assert_close(picture, draw(with_plain_vae(pipe), **prompts))


def test_pipeline_image_to_image_equals_diffusers(pipe, prompts, photo, assert_close) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)

    picture = draw(pipe, image=photo, strength=1.0, **prompts)

    assert_close(picture, draw(with_plain_vae(pipe), image=photo, strength=1.0, **prompts))


def test_pipeline_image_to_image_takes_one_generator_per_image(pipe, prompts, photo, assert_close) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    prompts = {name: value.repeat(2, 1, 1) for name, value in prompts.items()}

    def draw_pair(pipe: Any) -> NDArray[np.float32]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        images = photo.repeat(2, 1, 1, 1)
        return pipe(image=images, generator=generators, num_inference_steps=2, output_type="np", **prompts).images

    assert_close(draw_pair(pipe), draw_pair(with_plain_vae(pipe)))


def test_pipeline_inpainting_equals_diffusers(pipe, prompts, photo, assert_close) -> None:
    pipe = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    inputs = {"image": photo, "mask_image": mask, "height": 64, "width": 64, **prompts}

    assert_close(draw(pipe, **inputs), draw(with_plain_vae(pipe), **inputs))


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # the pipeline's own call
def test_pipeline_sdxl_upcasts_our_vae_from_half_precision() -> None:
    torch.manual_seed(0)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "transformer_layers_per_block": 1}
    pipe = StableDiffusionXLPipeline(
        vae=make_vae("sdxl").half(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=UNet2DConditionModel(**UNET, **added, projection_class_embeddings_input_dim=6 * 4 + 8).eval().half(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )
    prompts = {"prompt_embeds": torch.randn(1, 4, 8).half(), "pooled_prompt_embeds": torch.randn(1, 8).half()}
    negatives = {f"negative_{name}": torch.zeros_like(value) for name, value in prompts.items()}
    dtypes: list[torch.dtype] = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, x: dtypes.append(x.dtype))

    picture = draw(pipe, **prompts, **negatives)

    assert dtypes == [torch.float32]
    assert pipe.vae.dtype is torch.float16
    assert np.isfinite(picture).all()


def test_pipeline_saved_with_our_vae_opens_without_us(pipe, prompts, tmp_path: Path, plain_diffusers) -> None:
    with ops.reference():  # what diffusers computes, bit for bit
        picture = draw(pipe, **prompts)
    torch.save(prompts, tmp_path / "inputs.pt")

    pipe.save_pretrained(tmp_path / "pipe")
    module = plain_diffusers(RELOAD, tmp_path).strip()

    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert module == "diffusers.models.autoencoders.autoencoder_kl"
    assert np.array_equal(np.load(tmp_path / "picture.npy"), picture)


def test_pipeline_from_pretrained_takes_our_vae(pipe, prompts, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    vae = AutoencoderKL.from_pretrained(tmp_path / "pipe", subfolder="vae")

    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", vae=vae, **ABSENT)

    assert reloaded.vae is vae
    assert np.array_equal(draw(reloaded, **prompts), draw(pipe, **prompts))


def test_pipeline_saved_with_a_copied_or_compiled_vae_still_names_diffusers(pipe, tmp_path: Path) -> None:
    import copy

    for number, vae in enumerate((copy.deepcopy(pipe.vae), torch.compile(pipe.vae, backend="eager"))):
        pipe.register_modules(vae=vae)
        pipe.save_pretrained(tmp_path / str(number))

        index = json.loads((tmp_path / str(number) / "model_index.json").read_text())
        assert index["vae"] == ["diffusers", "AutoencoderKL"]
