"""The description of a store: its rules, what counts as another store, the scale of its latents."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from synthetic_store import describe

from sd_vae import posterior
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.latents import Numerics, StoreDescription
from sd_vae.latents.format import LOGVAR_RANGE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content": "latents"}, "content is 'latents', choose from moments, mode, sample"),
        ({"dtype": "int8"}, "dtype is 'int8', choose from float16, bfloat16, float32"),
        ({"compute_dtype": "tf32"}, "compute_dtype is 'tf32'"),
        ({"data": ""}, "data is empty"),
        ({"num_records": -1}, "num_records is -1"),
        ({"shard_items": 0}, "shard_items is 0, it must be at least 1"),
        ({"content": "sample"}, "seed is None with content sample"),
        ({"content": "sample", "seed": -1}, "seed is -1 with content sample"),
        ({"seed": 3}, "seed is 3 with content moments"),
        ({"encoder": "abc"}, "encoder is 'abc', it must be a sha256"),
        (
            {"numerics": Numerics(device="cpu", cpu="abacus", threads_per_picture=0, versions={})},
            "threads_per_picture is 0",
        ),
    ],
)
def test_description_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe(**changes)


def test_description_lists_every_problem() -> None:
    with pytest.raises(UserError, match=r"data is empty.*; shard_items is 0"):
        describe(data="", shard_items=0)


def test_description_survives_json() -> None:
    description = describe(content="sample", seed=1, vae=VAEConfig(latents_mean=(0.5,) * 4, latents_std=(2.0,) * 4))

    again = StoreDescription.from_dict(description.to_dict(), source="store.json")

    assert again == description
    assert again.digest == description.digest


def test_description_refuses_unknown_fields() -> None:
    with pytest.raises(UserError, match=r"store\.json: unknown key 'colour'"):
        StoreDescription.from_dict({**describe().to_dict(), "colour": "blue"}, source="store.json")


@pytest.mark.parametrize(
    ("changes", "field", "here", "there"),
    [
        ({"dtype": "float32"}, "dtype", "float16", "float32"),
        ({"transform": {"size": 32, "crop": "centre"}}, "transform.size", 16, 32),
        ({"transform": {"size": 16}}, "transform.crop", "centre", "absent"),
        ({"encoder": "f" * 64}, "encoder", "0123456789abcdef" * 4, "f" * 64),
        ({"vae": VAEConfig(scaling_factor=0.75, shift_factor=0.25)}, "vae.scaling_factor", 0.5, 0.75),
    ],
)
def test_differences_names_the_field_and_both_values(
    changes: dict[str, Any], field: str, here: Any, there: Any
) -> None:
    differences = describe().differences(describe(**changes))

    assert differences == [(field, here, there, False)]


def test_differences_marks_what_only_moves_the_last_bits() -> None:
    other = Numerics(device="cpu", cpu="slide rule", threads_per_picture=2, versions={"torch": "2.1"})

    differences = describe().differences(describe(numerics=other))

    assert [(name, is_numeric) for name, _, _, is_numeric in differences] == [
        ("numerics.cpu", True),
        ("numerics.threads_per_picture", True),
        ("numerics.versions.torch", True),
    ]


def test_differences_leaves_out_what_only_a_decoder_reads() -> None:
    vae = VAEConfig(
        scaling_factor=0.5,
        shift_factor=0.25,
        up_block_types=("AttnUpDecoderBlock2D",),
        out_channels=4,
        use_post_quant_conv=False,
        sample_size=64,
        force_upcast=False,
    )

    assert describe().differences(describe(vae=vae)) == []


def test_affine_is_scale_and_shift() -> None:
    offset, factor = describe().affine

    assert (offset, factor) == ([0.25] * 4, [0.5] * 4)


def test_affine_is_mean_and_std_where_the_config_has_them() -> None:
    mean, std = (1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 2.0, 4.0)

    offset, factor = describe(vae=VAEConfig(scaling_factor=2.0, latents_mean=mean, latents_std=std)).affine

    assert offset == [1.0, 2.0, 3.0, 4.0]
    assert factor == [4.0, 2.0, 1.0, 0.5]


def test_logvar_range_is_that_of_the_posterior() -> None:
    assert LOGVAR_RANGE == (posterior.LOGVAR_MIN, posterior.LOGVAR_MAX)
    assert torch.tensor(LOGVAR_RANGE).half().tolist() == list(LOGVAR_RANGE)  # rounding does not leave the range


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sd_vae.latents.format, sd_vae.latents.store, sd_vae.latents.verification", {"torch", "diffusers"}),
        ("from sd_vae.latents import LatentDataset as D; D(sys.argv[1])[0]", {"diffusers", "datasets", "transformers"}),
    ],
)
def test_latents_imports_what_it_needs_only(statement: str, absent: set[str], store_folder: Any) -> None:
    code = f"import sys; {statement}; print(*sorted({absent!r} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code, store_folder], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == ""
