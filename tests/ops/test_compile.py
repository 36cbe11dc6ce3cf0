"""A compiled model: both halves run compiled, with the same numbers, hooks and files, and results that stay."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sd_vae import ops
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.compiling import compile_halves
from sd_vae.errors import UserError


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def static_buffers(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A backend that returns the same memory at every call, as a CUDA graph does."""
    buffers: list[Tensor] = []

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        results = graph(*arguments)
        if not buffers:
            buffers.extend(torch.empty_like(result) for result in results)
        for buffer, result in zip(buffers, results, strict=True):
            buffer.copy_(result)
        return tuple(buffers)

    return replay


@torch.no_grad()
def test_compile_halves_reaches_encode_and_decode(tiny_vae: AutoencoderKL) -> None:
    counter = CompileCounter()
    compile_halves(tiny_vae, backend=counter)

    z = tiny_vae.encode(draw(2, 3, 16, 16)).latent_dist.mode()
    after_encode = counter.frame_count
    tiny_vae.decode(z)

    assert (after_encode, counter.frame_count) == (1, 2)  # one graph each: nothing in between breaks one


@torch.no_grad()
def test_compile_halves_keeps_the_numbers(tiny_vae: AutoencoderKL) -> None:
    plain = copy.deepcopy(tiny_vae)
    x, z = draw(2, 3, 16, 24), draw(2, 4, 8, 12)
    compile_halves(tiny_vae, backend="aot_eager")

    moments = tiny_vae.encode(x).latent_dist.parameters
    pictures = tiny_vae.decode(z).sample

    with ops.reference():  # what is traced is the plain path
        expected = plain.encode(x).latent_dist.parameters, plain.decode(z).sample
    # worst seen 0, the same operations in the same order; 1e-6 leaves room for another decomposition
    torch.testing.assert_close((moments, pictures), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at z's
def test_compile_halves_keeps_the_gradients(tiny_vae: AutoencoderKL) -> None:
    plain = copy.deepcopy(tiny_vae)
    x = draw(2, 3, 16, 16)
    compile_halves(tiny_vae, backend="aot_eager")

    tiny_vae(x).sample.square().mean().backward()
    with ops.reference():
        plain(x).sample.square().mean().backward()

    expected = dict(plain.named_parameters())
    for name, parameter in tiny_vae.named_parameters():
        # worst seen 3e-8
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-6)


@torch.no_grad()
def test_compile_halves_bounds_recompilation(tiny_vae: AutoencoderKL) -> None:
    counter = CompileCounter()
    compile_halves(tiny_vae, backend=counter)

    for height, width in [(8, 8), (12, 8), (8, 12), (16, 16), (20, 12), (24, 28), (32, 16), (10, 22)]:
        tiny_vae.decode(draw(2, 4, height, width))

    # The first size, another height, another width; torch falls back to eager beyond eight.
    assert counter.frame_count == 3


@torch.no_grad()
@pytest.mark.parametrize("quant_convs", [True, False])
def test_compiled_results_are_the_callers(quant_convs: bool) -> None:
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), use_quant_conv=quant_convs).eval()
    x, z = draw(1, 3, 4, 4), draw(1, 4, 4, 4)
    compile_halves(vae, backend=static_buffers)

    first = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    kept = [part.clone() for part in first]
    vae.encode(-x), vae.decode(-z)

    assert all(torch.equal(*pair) for pair in zip(first, kept, strict=True))


@torch.no_grad()
def test_compiled_model_runs_hooks(tiny_vae: AutoencoderKL) -> None:
    seen: list[str] = []
    compile_halves(tiny_vae, backend="eager")
    tiny_vae.decoder.register_forward_hook(lambda *_: seen.append("decoder"))
    tiny_vae.decoder.conv_in.register_forward_hook(lambda *_: seen.append("conv_in"))

    for _ in range(2):
        tiny_vae.decode(draw(1, 4, 8, 8))

    assert seen == ["conv_in", "decoder"] * 2


def through_pickle(vae: AutoencoderKL) -> Any:
    return pickle.loads(pickle.dumps(vae))  # noqa: S301


@torch.no_grad()
@pytest.mark.parametrize("twin", [copy.deepcopy, through_pickle])
def test_compiled_model_copies_as_a_plain_one(tiny_vae: AutoencoderKL, twin: Callable[..., Any]) -> None:
    counter = CompileCounter()
    z = draw(1, 4, 8, 8)
    compile_halves(tiny_vae, backend=counter)
    expected = tiny_vae.decode(z).sample

    with ops.reference():
        actual = twin(tiny_vae).decode(z).sample

    assert torch.equal(actual, expected)
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_model_saves_and_converts(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    names = list(tiny_vae.state_dict())
    z = draw(1, 4, 8, 8)
    with ops.reference():  # what diffusers computes, bit for bit
        expected = tiny_vae.decode(z).sample
    compile_halves(tiny_vae, backend="eager")
    tiny_vae.to(memory_format=torch.channels_last)  # as on a GPU

    tiny_vae.save_pretrained(tmp_path)

    assert list(tiny_vae.state_dict()) == names
    assert torch.equal(diffusers.AutoencoderKL.from_pretrained(tmp_path).decode(z).sample, expected)
    assert set(tiny_vae.to_diffusers().state_dict()) == set(names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fastest"}, r"torch\.compile does not take \{'mode': 'fastest'\}: Unrecognized mode=fastest"),
        ({"speed": 9}, r"torch\.compile does not take \{'speed': 9\}: .*unexpected keyword argument 'speed'"),
        ({"backend": "none"}, r"torch\.compile does not take \{'backend': 'none'\}: Invalid backend: 'none'"),
    ],
)
def test_compile_refuses_options_that_torch_does_not_take(
    tiny_vae: AutoencoderKL, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        tiny_vae.compile(**options)

    assert tiny_vae.encoder._compiled_call_impl is tiny_vae.decoder._compiled_call_impl is None


def halves_options(monkeypatch: pytest.MonkeyPatch, vae: AutoencoderKL, **options: Any) -> list[dict[str, Any]]:
    """What `torch.compile` is asked for."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda call, **chosen: asked.append(chosen) or call)
    compile_halves(vae, **options)
    return asked


@pytest.fixture
def vae_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny_vae: AutoencoderKL) -> AutoencoderKL:
    """A model that says it is on a GPU."""
    monkeypatch.setattr(AutoencoderKL, "device", torch.device("cuda"))
    return tiny_vae


@pytest.mark.parametrize(
    ("options", "asked"),
    [({}, {"mode": "reduce-overhead"}), ({"mode": "default"}, {"mode": "default"}), ({"backend": "eager"},) * 2],
)
def test_compile_halves_uses_cuda_graphs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, vae_on_a_gpu: AutoencoderKL, options: dict[str, str], asked: dict[str, str]
) -> None:
    assert halves_options(monkeypatch, vae_on_a_gpu, **options) == [asked, asked]


def test_compile_halves_puts_a_gpus_weights_in_channels_last(
    monkeypatch: pytest.MonkeyPatch, vae_on_a_gpu: AutoencoderKL
) -> None:
    halves_options(monkeypatch, vae_on_a_gpu)

    assert vae_on_a_gpu.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_halves_leaves_the_mode_alone_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tiny_vae: AutoencoderKL
) -> None:
    assert halves_options(monkeypatch, tiny_vae) == [{}, {}]
