"""What tools do to a model at run time: copy, pickle, spawn, compile, hook, offload, cast."""

import copy
import io
import operator
import pickle

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module

from sd_vae import AutoencoderKL, ops
from sd_vae._diffusers import DiffusersAutoencoderKL


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(1, 3, 16, 24) * 2 - 1


class CountingHook(ModelHook):
    """Stands for CPU offload: moves nothing, counts how often it would have."""

    def __init__(self) -> None:
        self.num_calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.num_calls += 1
        return args, kwargs


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def test_interop_is_an_instance_of_diffusers_class(tiny_vae) -> None:
    assert isinstance(tiny_vae, DiffusersAutoencoderKL)


def test_interop_pickle_keeps_class_and_numbers(tiny_vae, x) -> None:
    copied = pickle.loads(pickle.dumps(tiny_vae))  # noqa: S301

    assert type(copied) is AutoencoderKL
    assert torch.equal(reconstruct(copied, x), reconstruct(tiny_vae, x))


def test_interop_torch_save_of_the_whole_model_keeps_class_and_numbers(tiny_vae, x) -> None:
    file = io.BytesIO()
    torch.save(tiny_vae, file)
    file.seek(0)

    copied = torch.load(file, weights_only=False)

    assert torch.equal(reconstruct(copied, x), reconstruct(tiny_vae, x))


def test_interop_deepcopy_shares_no_weight(tiny_vae, x) -> None:
    copied = copy.deepcopy(tiny_vae)
    copied.encoder.conv_in.weight.data.zero_()

    assert copied.__module__ == tiny_vae.__module__ == DiffusersAutoencoderKL.__module__
    assert not torch.equal(reconstruct(copied, x), reconstruct(tiny_vae, x))


def test_interop_spawned_process_gives_the_same_numbers(tiny_vae, x) -> None:
    tiny_vae.requires_grad_(False)

    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        recon = pool.apply(operator.methodcaller("forward", x, return_dict=False), (tiny_vae,))[0]

    # one thread there, perhaps several here: worst seen 0 with one thread both ways
    torch.testing.assert_close(recon, tiny_vae(x).sample, rtol=0, atol=1e-5)


def test_interop_compiles_without_graph_break(tiny_vae, x) -> None:
    torch._dynamo.reset()
    with ops.reference():  # what is traced is the plain path
        expected = reconstruct(tiny_vae, x)

    with torch.no_grad():
        z = torch.compile(tiny_vae.encode, backend="eager", fullgraph=True)(x).latent_dist.mode()
        recon = torch.compile(tiny_vae.decode, backend="eager", fullgraph=True)(z).sample

    assert torch.equal(recon, expected)


def test_interop_compiled_training_step_gives_the_same_gradients(tiny_vae, x) -> None:
    torch._dynamo.reset()
    tiny_vae.train()
    with ops.reference():  # what is traced is the plain path
        tiny_vae(x).sample.square().mean().backward()
    expected = [weight.grad.clone() for weight in tiny_vae.parameters()]
    tiny_vae.zero_grad()

    torch.compile(tiny_vae, backend="aot_eager", fullgraph=True)(x).sample.square().mean().backward()

    largest = max(gradient.abs().max() for gradient in expected)
    for weight, gradient in zip(tiny_vae.parameters(), expected, strict=True):
        assert (weight.grad - gradient).abs().max() <= 1e-6 * largest


def test_interop_exports(tiny_vae, x) -> None:
    with ops.reference():  # what is traced is the plain path
        expected = tiny_vae(x).sample

    program = torch.export.export(tiny_vae, (x,))

    assert torch.equal(program.module()(x).sample, expected)


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_interop_offload_hook_runs_before(tiny_vae, call) -> None:
    hook = add_hook_to_module(tiny_vae, CountingHook())._hf_hook

    getattr(tiny_vae, call)(torch.zeros(1, 3 if call == "encode" else 4, 8, 8))

    assert hook.num_calls == 1


def test_interop_accelerate_cpu_offload_gives_the_same_numbers(tiny_vae, x) -> None:
    expected = reconstruct(tiny_vae, x)

    offloaded, hook = cpu_offload_with_hook(tiny_vae, execution_device="cpu")

    assert torch.equal(reconstruct(offloaded, x), expected)
    hook.offload()


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_interop_group_offload_gives_the_same_numbers(tiny_vae, x, assert_close, offload_type) -> None:
    expected = reconstruct(tiny_vae, x)

    settings = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    tiny_vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type=offload_type, **settings)

    # hooked modules run plainly; worst seen 3.4e-6, 20 seeds
    assert_close(reconstruct(tiny_vae, x), expected)


def test_interop_layerwise_casting_stores_in_eight_bits(tiny_vae, x) -> None:
    tiny_vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    recon = reconstruct(tiny_vae, x)

    assert tiny_vae.encoder.down_blocks[0].resnets[0].conv1.weight.dtype is torch.float8_e4m3fn
    assert recon.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_interop_upcast_path_of_pipelines_reads_the_dtype(tiny_vae, dtype) -> None:
    tiny_vae.to(dtype)

    assert tiny_vae.dtype is dtype
    assert next(iter(tiny_vae.post_quant_conv.parameters())).dtype is dtype
    assert tiny_vae.config.force_upcast


def test_interop_gradient_checkpointing_reaches_the_blocks_that_diffusers_names(tiny_vae) -> None:
    tiny_vae.enable_gradient_checkpointing()

    switched = {
        type(module).__name__ for module in tiny_vae.modules() if getattr(module, "gradient_checkpointing", False)
    }
    assert {"Encoder", "Decoder", "UNetMidBlock2D"} <= switched
    tiny_vae.disable_gradient_checkpointing()
    assert not tiny_vae.is_gradient_checkpointing
