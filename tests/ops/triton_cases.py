"""Figures about the Triton kernels, as JSON: `triton_cases.py figures` in Triton's interpreter, `compile` for a GPU.

Triton reads TRITON_INTERPRET when it is imported, and torch imports it, so `test_triton_norm` runs this in a process of
its own. Errors are against fp64, of the largest magnitude.
"""

import json
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_vae.ops import triton_norm

EPS = 1e-6
TILES = (
    {"TILE_SIZE": 256, "MAX_COLUMNS": 16, "TARGET_PROGRAMS": 2},
    {"TILE_SIZE": 64, "MAX_COLUMNS": 16, "TARGET_PROGRAMS": 1024},
)
"""So small that a map of some hundred pixels takes several tiles a block, the last one partly, with the first, and with
the second several times as many blocks as are merged at a time."""


def draw(seed: int, dtype: torch.dtype, *, mean: float = 0, scale: float = 1) -> tuple[Tensor, Tensor, Tensor, int]:
    """A channels_last map of random shape, log-normal gains, shifts, and groups; few sizes are powers of two."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_groups = pick(1, 8)
    shape = (pick(1, 3), num_groups * pick(1, 9), pick(1, 18), pick(1, 18))
    x = (torch.randn(shape, generator=generator) * scale + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], generator=generator).exp()
    return x, weight, torch.randn(shape[1], generator=generator), num_groups


def reference(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *, silu: bool = True) -> Tensor:
    normalised = F.group_norm(x.double(), num_groups, weight.double(), bias.double(), EPS)
    return F.silu(normalised) if silu else normalised


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def choose_tiles(index: int) -> None:
    for name, value in TILES[index % len(TILES)].items():
        setattr(triton_norm, name, value)


def worst_error(dtype: torch.dtype, *, silu: bool = True, mean: float = 0, scale: float = 1) -> float:
    """Over 4 seeds."""
    worst = 0.0
    for seed in range(4):
        choose_tiles(seed)
        x, weight, bias, num_groups = draw(seed, dtype, mean=mean, scale=scale)
        ours = triton_norm.group_norm_silu(x, weight, bias, num_groups, EPS, silu=silu)
        worst = max(worst, error(ours, reference(x, weight, bias, num_groups, silu=silu)))
    return worst


def residual_sum(dtype: torch.dtype) -> dict[str, float]:
    """The fused add against torch's, and the norm of the sum by the three ways there are."""
    choose_tiles(0)
    x, weight, bias, num_groups = draw(3, dtype)
    residual = draw(3, dtype, mean=5)[0].flip(0)
    total, statistics = triton_norm.add_with_statistics(x, residual)
    norm = triton_norm.group_norm_silu
    plain = norm(x + residual, weight, bias, num_groups, EPS, silu=True)
    reused = norm(total, weight, bias, num_groups, EPS, silu=True, statistics=statistics)
    fused = norm(x, weight, bias, num_groups, EPS, silu=True, residual=residual)
    return {
        "sums_equal": torch.equal(total, x + residual),
        "norms_equal": torch.equal(plain, reused) and torch.equal(plain, fused),
    }


def batch_equals_images() -> bool:
    x, weight, bias, num_groups = draw(4, torch.float32)
    x = torch.cat([x, 3 * x + 7, x]).contiguous(memory_format=torch.channels_last)
    norm = triton_norm.group_norm_silu
    batch = norm(x, weight, bias, num_groups, EPS, silu=True)
    singles = [norm(image, weight, bias, num_groups, EPS, silu=True) for image in x.split(1)]
    # Fewer blocks in a smaller batch merge in another order.
    return error(batch, torch.cat(singles).double()) < 1e-6


def keeps_format() -> bool:
    x, weight, bias, num_groups = draw(5, torch.bfloat16)
    ours = triton_norm.group_norm_silu(x, weight.bfloat16(), bias.bfloat16(), num_groups, EPS, silu=True)
    return ours.dtype == x.dtype and ours.shape == x.shape and ours.stride() == x.stride()


def leaves_x_alone() -> bool:
    x, weight, bias, num_groups = draw(6, torch.float32)
    before = x.clone()
    triton_norm.group_norm_silu(x, weight, bias, num_groups, EPS, silu=True, residual=x)
    return torch.equal(x, before)


def figures() -> dict[str, object]:
    found: dict[str, object] = {}
    x, weight, bias = torch.randn(1, 128, 9, 9).contiguous(memory_format=torch.channels_last), *torch.randn(2, 128)
    ours = triton_norm.group_norm_silu(x, weight, bias, 32, EPS, silu=True)
    found["full_tiles"] = error(ours, reference(x, weight, bias, 32))
    for name in ("float32", "float16", "bfloat16"):
        dtype = getattr(torch, name)
        found[name] = worst_error(dtype)
        found[f"{name}_residual"] = residual_sum(dtype)
    found["without_silu"] = worst_error(torch.float32, silu=False)
    found["mean_100"] = worst_error(torch.float32, mean=100)
    found["mean_10000"] = worst_error(torch.float32, mean=10000)
    found["near_overflow"] = worst_error(torch.float16, scale=12000)
    found["batch_equals_images"] = batch_equals_images()
    found["keeps_format"] = keeps_format()
    found["leaves_x_alone"] = leaves_x_alone()
    constant = torch.full((1, 8, 5, 5), 3.0).contiguous(memory_format=torch.channels_last)
    flat = triton_norm.group_norm_silu(constant, torch.ones(8), torch.full((8,), 2.0), 4, EPS, silu=False)
    found["constant_map"] = float((flat - 2).abs().max())
    return found


def compile_for_gpu() -> list[str]:
    """Compile every kernel to machine code for Hopper, which needs no GPU; the names of those that went through."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sd_vae.ops import triton_kernels as kernels

    tile = {"ROWS": 32, "COLUMNS": 128}
    compiled = []
    for dtype in ("bf16", "fp32"):
        for kernel, constants in (
            (kernels.row_block_moments, {"ADD": True, **tile}),
            (kernels.group_scales, {"BLOCKS": 1024, "COLUMNS": 4}),
            (kernels.normalise, {"SILU": True, **tile}),
        ):
            pointers = dict.fromkeys(("x", "residual", "total", "weight", "bias", "out"), f"*{dtype}")
            pointers |= {"moments": "*fp32", "scales": "*fp32", "eps": "fp32"}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: pointers.get(name, "i32") for name in names}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            if compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]:
                compiled.append(f"{kernel.__name__} {dtype}")
    return compiled


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # numpy's, of the interpreter: exp overflows where a sigmoid is zero
    json.dump({"figures": figures, "compile": compile_for_gpu}[sys.argv[1]](), sys.stdout)
