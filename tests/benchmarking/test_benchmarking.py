"""What the benchmarks measure with."""

import os
import statistics
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking import (
    Ceilings,
    compare,
    count_flops,
    measure_ceilings,
    median_ratio,
    memory,
    peak_memory,
    relative_difference,
    take_turns,
    versions_in_use,
)
from sd_vae.benchmarking.comparison import count_steps
from sd_vae.benchmarking.inputs import random_input
from sd_vae.config import PRESETS, VAEConfig
from sd_vae.errors import UserError
from sd_vae.ops.dispatch import compiled_unavailable

CPU = torch.device("cpu")
CEILINGS = Ceilings(matmul_gflop_per_s=100.0, copy_gb_per_s=10.0)


@pytest.fixture
def wide_vae() -> AutoencoderKL:
    """Wide enough for the compiled kernels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ).eval()


def test_take_turns_turns_the_order_round() -> None:
    order: list[str] = []
    steps: list[None] = []

    turns = take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU, on_turn=lambda: steps.append(None)
    )

    assert "".join(order) == "abbaab"
    assert {name: len(taken) for name, taken in turns.items()} == {"a": 3, "b": 3}
    assert len(steps) == 6
    assert all(turn.wall_s >= 0 and turn.cpu_s >= 0 for taken in turns.values() for turn in taken)


def test_median_ratio_pairs_rounds() -> None:
    slow_machine_in_the_middle = ([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])

    assert median_ratio(*slow_machine_in_the_middle) == 2.0
    assert statistics.median(slow_machine_in_the_middle[0]) / statistics.median(slow_machine_in_the_middle[1]) == 3.0


def test_relative_difference_is_of_the_largest_magnitude() -> None:
    assert relative_difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -5.0])) == pytest.approx(0.2)


def test_relative_difference_shows_nan() -> None:
    found = relative_difference(torch.tensor([1.0, float("nan")]), torch.ones(2))

    assert found != found


# As counted in the reference to performance, in units of 1e9.
@pytest.mark.parametrize(("action", "total"), [("encode", 1117), ("decode", 2515)])
def test_count_flops_of_sd1_is_as_published(action, total: int) -> None:
    assert round(count_flops(PRESETS["sd1"], action, 512, 512).total / 1e9) == total


def test_count_flops_attention_grows_with_the_square_of_the_pixels() -> None:
    small, large = (count_flops(PRESETS["mini"], "decode", side, side) for side in (64, 128))

    assert large.attention == 16 * small.attention > 0
    assert large.total - large.attention == 4 * (small.total - small.attention)


def test_measure_ceilings_gives_positive_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_vae.benchmarking.ceilings.MIN_SECONDS", 0.0)
    monkeypatch.setattr("sd_vae.benchmarking.ceilings.MAX_SIDE", {"cpu": 512})

    found = measure_ceilings(CPU, torch.float32, copy_bytes=2**16)

    assert found.matmul_gflop_per_s > 0
    assert found.copy_gb_per_s > 0


def test_compare_computes_differences(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_vae.benchmarking.comparison.peak_memory", lambda *_: None)
    plain_decode = tiny_vae._decode
    monkeypatch.setattr(tiny_vae, "_decode", lambda z: plain_decode(z) * 1.5)
    steps: list[None] = []

    found = compare(tiny_vae, "decode", 16, CEILINGS, rounds=2, on_step=lambda: steps.append(None))

    assert found.ours.difference == pytest.approx(0.5, rel=1e-3)
    assert found.diffusers.difference == 0
    assert len(steps) == count_steps(2)


def test_compare_measures_half_precision_against_float32(
    tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_vae.benchmarking.comparison.peak_memory", lambda *_: None)

    found = compare(tiny_vae.bfloat16(), "encode", 16, CEILINGS, rounds=1)

    # bfloat16 has 8 bits: neither exact, nor another network
    assert 1e-4 < found.diffusers.difference < 0.2
    assert 1e-4 < found.ours.difference < 0.2


def test_compare_gives_the_fraction_of_the_ceiling(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_vae.benchmarking.comparison.peak_memory", lambda *_: None)

    found = compare(tiny_vae, "encode", 16, CEILINGS, rounds=1)

    config = VAEConfig.from_dict(dict(tiny_vae.config))
    assert found.gflop == count_flops(config, "encode", 16, 16).total / 1e9
    assert found.ours.of_ceiling == pytest.approx(found.gflop / found.ours.median_s / 100)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the high-water mark is read as Linux tells it")
def test_peak_memory_of_a_fresh_process_holds_the_feature_maps() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)

    taken = peak_memory(vae, "diffusers", "decode", 512, 512)

    one_map = 8 * 512 * 512 * 4 / 2**30
    assert taken is not None
    assert 2 * one_map < taken < 40 * one_map


def test_in_fresh_process_raises_what_the_function_raises() -> None:
    with pytest.raises(UserError, match="unknown preset 'sd9'"):
        memory.in_fresh_process(VAEConfig.from_preset, "sd9")


def test_peak_memory_says_that_the_system_ended_the_process(
    tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> float:
        raise BrokenProcessPool

    monkeypatch.setattr(memory, "in_fresh_process", ended)

    with pytest.raises(UserError, match="ended the process that measured the memory of decode at 64x32 in ours"):
        peak_memory(tiny_vae, "ours", "decode", 64, 32)


def test_versions_name_every_layer_once(tiny_vae: AutoencoderKL) -> None:
    used = versions_in_use(tiny_vae, "decode", 32)

    named = [name for group in used.groups for name in group.layers]
    kinds = (torch.nn.Conv2d, torch.nn.GroupNorm)
    layers = [
        name
        for name, module in tiny_vae.named_modules()
        if isinstance(module, kinds) and ".attentions." not in name and ("decoder" in name or name == "post_quant_conv")
    ]
    assert sorted(named) == sorted([*layers, "decoder.mid_block.attentions.0"])


@pytest.mark.skipif(compiled_unavailable() is not None, reason="needs the compiled kernels")
def test_versions_in_bands_are_the_compiled_kernels(wide_vae: AutoencoderKL) -> None:
    used = versions_in_use(wide_vae, "decode", 64)

    versions = {group.operation: group.version for group in used.groups if group.operation != "conv"}
    assert used.whole is None
    assert versions == {
        "conv3x3": "compiled",
        "group_norm_silu": "compiled",
        "attention": "reference",
        "upsample_conv": "compiled",
    }


def test_versions_outside_the_domain_say_why(wide_vae: AutoencoderKL) -> None:
    used = versions_in_use(wide_vae.bfloat16(), "encode", 64)

    choices = {group.operation: group for group in used.groups}
    assert used.whole == "x is bfloat16 on cpu, not float32 on the CPU"
    assert choices["conv3x3"].version == "reference"
    assert choices["conv3x3"].why == "x is bfloat16 on cpu, not float32 on the CPU"
    assert choices["downsample_conv"].widths == ("32->32",)


def test_random_input_is_the_same_each_time_and_in_range(tiny_vae: AutoencoderKL) -> None:
    x = random_input(tiny_vae, "encode", 16, 32, batch_size=2)

    assert x.shape == (2, 3, 16, 32)
    assert x.abs().max() <= 1
    assert torch.equal(x, random_input(tiny_vae, "encode", 16, 32, batch_size=2))
    assert random_input(tiny_vae, "decode", 16, 32).shape == (1, 4, 8, 16)
