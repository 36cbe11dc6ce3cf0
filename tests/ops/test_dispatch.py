"""Which version of an operation runs, and the words that say why."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ops_cases import conv, draw, group_norm, needs_compiled
from torch import Tensor, nn

from sd_vae import ops
from sd_vae.ops import dispatch


def change(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module: nn.Module, register: str) -> nn.Module:
    getattr(module, register)(lambda *_: None)
    return module


def three(x: Tensor, module: nn.Module) -> dispatch.Choice:
    return dispatch.choose_conv3x3(x, module, None)


class Subclass(Tensor):
    pass


X = (1, 32, 16, 16)


@needs_compiled
@torch.no_grad()
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    "choice",
    [
        lambda: three(draw(*X), conv(32, 32)),
        lambda: dispatch.choose_upsample(draw(*X), conv(32, 32)),
        lambda: dispatch.choose_downsample(draw(*X), conv(32, 32, stride=2)),
        lambda: dispatch.choose_norm(draw(*X), group_norm(4, 32), nn.SiLU()),
    ],
)
def test_choice_is_compiled_inside_the_domain(choice: Callable[[], dispatch.Choice]) -> None:
    assert choice().version == "compiled", choice().why


@needs_compiled
@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "module", "why"),
    [
        (draw(*X), nn.Identity(), "Identity is not a plain convolution, or carries a hook"),
        (draw(*X), hooked(conv(32, 32), "register_forward_hook"), "carries a hook"),
        (draw(*X), hooked(conv(32, 32), "register_forward_pre_hook"), "carries a hook"),
        (draw(*X), hooked(conv(32, 32), "register_full_backward_hook"), "carries a hook"),
        (draw(*X), change(conv(32, 32), _conv_forward=lambda *_: None), "carries a hook"),
        (draw(*X), change(conv(32, 32), padding_mode="circular"), "not a plain 3x3 convolution"),
        (draw(*X), change(conv(32, 32), padding=(0, 0)), "not a plain 3x3 convolution"),
        (draw(*X), change(conv(32, 32), dilation=(2, 2)), "not a plain 3x3 convolution"),
        (draw(*X), conv(32, 32, size=1), "not a plain 3x3 convolution"),
        (draw(*X), conv(32, 32, stride=2), "not a plain 3x3 convolution"),
        (draw(*X), nn.Conv2d(32, 32, 3, padding=1, bias=False), "the bias is missing"),
        (draw(*X), conv(32, 32).bfloat16(), "the weights are torch.bfloat16 on cpu"),
        (draw(*X), change(conv(32, 32), bias=nn.Parameter(torch.zeros(32).half())), "the weights are torch.float16"),
        (draw(1, 20, 16, 16), conv(20, 32), "20 input channels are not a multiple of"),
        (draw(*X), conv(32, 3), "3 output channels are not a multiple of"),
        (draw(*X).double(), conv(32, 32), "x is float64 on cpu, not float32 on the CPU"),
        (draw(*X).bfloat16(), conv(32, 32), "x is bfloat16 on cpu, not float32 on the CPU"),
        (draw(32, 16, 16), conv(32, 32), r"x has shape \(32, 16, 16\), not \(B, D, H, W\)"),
        (draw(0, 32, 16, 16), conv(32, 32), r"x has shape \(0, 32, 16, 16\)"),
        (draw(*X).to("meta"), conv(32, 32), "Tensor on meta has no memory to read"),
        (draw(*X).as_subclass(Subclass), conv(32, 32), "Subclass on cpu has no memory to read"),
    ],
)
@pytest.mark.usefixtures("any_size")
def test_choose_conv3x3_says_what_is_outside(x: Tensor, module: nn.Module, why: str) -> None:
    choice = three(x, module)

    assert choice.version == "reference"
    assert re.search(why, choice.why), choice.why


@needs_compiled
@torch.no_grad()
def test_choose_conv3x3_leaves_small_maps_to_the_reference() -> None:
    choice = three(draw(1, 32, 15, 17), conv(32, 32))

    assert choice == dispatch.Choice("reference", "(1, 32, 15, 17) is too small to gain")


@needs_compiled
@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_choose_conv3x3_refuses_weights_that_stand_for_others() -> None:
    module = conv(32, 32)
    module.weight = nn.Parameter(module.weight.data.as_subclass(Subclass), requires_grad=False)

    assert three(draw(*X), module).why == "the weights are Subclass"


@needs_compiled
@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_choose_conv3x3_refuses_a_residual_of_another_dtype() -> None:
    choice = dispatch.choose_conv3x3(draw(*X), conv(32, 32), draw(*X).half())

    assert choice.why == "the residual is torch.float16, x is torch.float32"


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Identity(), "Identity is not a plain convolution, or carries a hook"),
        (change(conv(32, 32), padding_mode="circular"), "not a plain 3x3 convolution"),
        (change(conv(32, 32), _conv_forward=lambda *_: None), "Conv2d is not a plain convolution, or carries a hook"),
    ],
)
def test_choose_upsample_leaves_other_modules_to_the_reference(module: nn.Module, why: str) -> None:
    choice = dispatch.choose_upsample(draw(*X), module)

    assert choice == dispatch.Choice("reference", why)


def test_choose_upsample_folds_where_the_kernels_cannot_run() -> None:
    trained, half = conv(32, 32).requires_grad_(), conv(32, 32)

    choices = [dispatch.choose_upsample(draw(*X), trained), dispatch.choose_upsample(draw(*X).bfloat16(), half)]

    assert [choice.version for choice in choices] == ["four-phase"] * 2
    assert choices[0].why == "exact on any device; not compiled: gradients are on"
    assert "x is bfloat16 on cpu" in choices[1].why


@needs_compiled
def test_choose_conv3x3_wants_more_work_where_gradients_are_recorded() -> None:
    x, module = draw(1, 64, 128, 128), conv(64, 64)  # 1.2e9 operations, between the two thresholds

    frozen, trained = three(x, module), three(x, conv(64, 64).requires_grad_())

    assert (frozen.version, trained.version) == ("compiled", "reference")
    assert trained.why == "(1, 64, 128, 128) is too small to gain"


def test_choose_downsample_has_no_gradient() -> None:
    choice = dispatch.choose_downsample(draw(*X), conv(32, 32, stride=2).requires_grad_())

    assert choice == dispatch.Choice("reference", "gradients are on")


@pytest.mark.parametrize(
    ("x", "norm", "nonlinearity", "why"),
    [
        (draw(*X), group_norm(4, 32), nn.ReLU(), "not a plain GroupNorm with SiLU"),
        (draw(*X), hooked(group_norm(4, 32), "register_forward_hook"), None, "not a plain GroupNorm with SiLU"),
        (draw(*X), group_norm(4, 32).requires_grad_(), None, "gradients are on"),
        pytest.param(draw(*X), group_norm(4, 32).half(), None, "the weights are torch.float16", marks=needs_compiled),
        pytest.param(
            draw(1, 20, 4, 4), group_norm(4, 20), None, "20 channels are not a multiple of 16", marks=needs_compiled
        ),
        (draw(*X).double(), group_norm(4, 32), None, "x is float64 on cpu, not float32 on the CPU"),
    ],
)
def test_choose_norm_says_what_is_outside(x: Tensor, norm: nn.Module, nonlinearity: Any, why: str) -> None:
    assert dispatch.choose_norm(x, norm, nonlinearity) == dispatch.Choice("reference", why)


def test_opaque_names_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.opaque(draw(*X)) == "autocast is on"


def test_opaque_names_function_transforms() -> None:
    seen: list[str | None] = []

    torch.func.vmap(lambda x: seen.append(dispatch.opaque(x)) or x)(draw(2, *X))

    assert seen[0] is not None


def test_opaque_names_forward_mode() -> None:
    with torch.autograd.forward_ad.dual_level():
        assert dispatch.opaque(draw(*X)) == "forward-mode differentiation is active"


def test_opaque_names_dispatch_modes() -> None:
    from sd_vae.banded.planning import PeakMemory

    with PeakMemory():
        assert dispatch.opaque(draw(*X)) == "a dispatch mode or function transform is active"


def test_opaque_names_compilation() -> None:
    seen: list[str | None] = []

    def ask(x: Tensor) -> Tensor:
        seen.append(dispatch.opaque(x))
        return x + 1

    torch.compile(ask, backend="eager")(draw(*X))

    assert seen == ["being compiled or traced"]


def test_reference_nests_and_ends() -> None:
    x = draw(*X)

    with ops.reference():
        with ops.reference():
            pass
        inside = dispatch.opaque(x)

    assert (inside, dispatch.opaque(x)) == ("the reference is forced", None)


def test_reference_ends_with_an_error() -> None:
    with pytest.raises(KeyError), ops.reference():
        raise KeyError

    assert not dispatch.reference_is_forced()


def test_reference_holds_in_its_own_thread() -> None:
    with ops.reference(), ThreadPoolExecutor(1) as other:
        assert other.submit(dispatch.reference_is_forced).result() is False


@pytest.fixture
def _fresh_answer() -> Any:
    dispatch.compiled_unavailable.cache_clear()
    yield
    dispatch.compiled_unavailable.cache_clear()


@pytest.mark.usefixtures("_fresh_answer")
def test_compiled_unavailable_names_a_missing_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert dispatch.compiled_unavailable() == 'numba is not installed; pip install "sd-vae[fast]"'


@pytest.mark.usefixtures("_fresh_answer")
@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Darwin", "x86_64"), ("Windows", "AMD64")])
def test_compiled_unavailable_names_another_platform(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(dispatch.platform, "system", lambda: system)
    monkeypatch.setattr(dispatch.platform, "machine", lambda: machine)

    expected = f"the compiled kernels are for Linux on x86_64, not {system} on {machine}"
    assert dispatch.compiled_unavailable() == expected


@needs_compiled
@pytest.mark.usefixtures("_fresh_answer")
def test_compiled_unavailable_names_missing_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_vae.ops import vectors

    monkeypatch.setattr(vectors, "has_fused_vectors", lambda: False)

    assert dispatch.compiled_unavailable() == "this processor lacks AVX2 or FMA"


WITHOUT_NUMBA = """
import sys, torch
sys.modules["numba"] = None
import sd_vae
from sd_vae.ops import dispatch
vae = sd_vae.AutoencoderKL.from_preset("mini", block_out_channels=[32, 32, 32, 32], norm_num_groups=8).eval()
z = torch.randn(1, vae.config.latent_channels, 4, 4)
with torch.no_grad():
    ours = vae.decode(z).sample
    with sd_vae.ops.reference():
        theirs = vae.decode(z).sample
    vae.enable_tiling()
    banded = vae.decode(z).sample
assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
assert (banded - ours).abs().max() < 1e-4 * ours.abs().max()
assert sd_vae.plan_memory(vae.config, 32, 32).banded_gib > 0
assert "sd_vae.ops.kernels" not in sys.modules
print(dispatch.compiled_unavailable())
"""
BROKEN_NUMBA = """
import sys, torch
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            import importlib.machinery
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec): return None
    def exec_module(self, module): raise ImportError("Numba needs NumPy 1.0 or less")
sys.meta_path.insert(0, Broken())
from sd_vae import ops
from sd_vae.ops import dispatch
conv, x = torch.nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False), torch.randn(1, 64, 128, 128)
assert torch.equal(ops.conv3x3(x, conv), conv(x))
print(dispatch.compiled_unavailable())
"""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (WITHOUT_NUMBA, "numba is not installed"),
        (BROKEN_NUMBA, "numba cannot be used: Numba needs NumPy 1.0 or less"),
    ],
    ids=["missing", "broken"],
)
def test_everything_works_by_the_reference_without_numba(script: str, why: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
    assert why in done.stdout
