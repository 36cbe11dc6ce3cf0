"""The name table: a bijection for every config, and the one that diffusers and CompVis use."""

import csv
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints.keymap import key_table
from sd_vae.config import PRESETS, VAEConfig


@st.composite
def configs(draw: st.DrawFn) -> VAEConfig:
    num_levels = draw(st.integers(1, 4))
    attend = [draw(st.lists(st.booleans(), min_size=num_levels, max_size=num_levels)) for _ in range(2)]
    return VAEConfig(
        block_out_channels=tuple(draw(st.lists(st.sampled_from((4, 8)), min_size=num_levels, max_size=num_levels))),
        down_block_types=tuple("Attn" * flag + "DownEncoderBlock2D" for flag in attend[0]),
        up_block_types=tuple("Attn" * flag + "UpDecoderBlock2D" for flag in attend[1]),
        layers_per_block=draw(st.integers(1, 3)),
        latent_channels=draw(st.integers(1, 4)),
        in_channels=draw(st.integers(1, 3)),
        norm_num_groups=2,
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
        mid_block_add_attention=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None, database=None)
@given(configs())
def test_key_table_names_each_tensor_once_in_every_naming(config: VAEConfig) -> None:
    keys = key_table(config)

    for naming in ("diffusers", "deprecated", "ldm"):
        assert len({getattr(key, naming) for key in keys}) == len(keys)


@settings(max_examples=25, deadline=None, database=None)
@given(configs())
def test_key_table_has_the_models_names_and_shapes(config: VAEConfig) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**config.to_dict())

    table = {key.diffusers: key.shape for key in key_table(config)}

    assert table == {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_key_table_equals_diffusers_converter(name: str) -> None:
    config = PRESETS[name]
    keys = key_table(config)
    with torch.device("meta"):
        ldm = {f"first_stage_model.{key.ldm}": torch.empty(key.ldm_shape) for key in keys}

    converted = convert_ldm_vae_checkpoint(ldm, config.to_dict())

    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == {k.diffusers: k.shape for k in keys}
    tensor_names = {id(tensor._base if tensor._base is not None else tensor): n for n, tensor in ldm.items()}
    sources = {name: tensor_names[id(t._base if t._base is not None else t)] for name, t in converted.items()}
    assert sources == {key.diffusers: f"first_stage_model.{key.ldm}" for key in keys}


def test_key_table_reverses_the_decoders_levels() -> None:
    names = {key.diffusers: key.ldm for key in key_table(PRESETS["sd1"])}

    assert names["decoder.up_blocks.0.resnets.2.conv1.weight"] == "decoder.up.3.block.2.conv1.weight"


def test_key_table_names_attention_inside_levels_as_compvis_does() -> None:
    config = VAEConfig(down_block_types=("AttnDownEncoderBlock2D",), up_block_types=("AttnUpDecoderBlock2D",))

    names = {key.diffusers: key.ldm for key in key_table(config)}

    assert names["encoder.down_blocks.0.attentions.0.to_out.0.weight"] == "encoder.down.0.attn.0.proj_out.weight"
    assert names["decoder.up_blocks.0.attentions.1.group_norm.bias"] == "decoder.up.0.attn.1.norm.bias"


@pytest.mark.shared
def test_key_table_equals_the_published_map(shared: Path) -> None:
    with (shared / "reference" / "sd1_vae_keymap.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))

    table = {(k.diffusers, k.deprecated, k.ldm, k.shape, k.ldm_shape) for k in key_table(PRESETS["sd1"])}

    names = ("diffusers", "diffusers_deprecated", "ldm")
    shapes = ("shape_diffusers", "shape_ldm")
    assert len(rows) == 248
    assert table == {(*(r[name] for name in names), *(literal_eval(r[shape]) for shape in shapes)) for r in rows}
