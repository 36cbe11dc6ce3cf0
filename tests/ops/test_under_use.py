"""The compiled model as people use it: threads, nested calls, processes, errors half-way, and memory when idle."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import draw, error, narrow_vae, needs_compiled
from torch import Tensor

from sd_vae import ops, tiling
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.banded.engines import CompiledEngine

pytestmark = [needs_compiled, pytest.mark.usefixtures("any_size")]

BOUND = 1e-4  # worst seen 6e-6, of the largest magnitude


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def vae() -> AutoencoderKL:
    return narrow_vae()


def decode(vae: AutoencoderKL, seed: int = 0) -> Tensor:
    return vae.decode(draw(1, 4, 17, 14, seed=seed)).sample


def exact(vae: AutoencoderKL, seed: int = 0) -> Tensor:
    with ops.reference():
        return decode(vae, seed)


def test_a_result_stays_when_others_are_made(vae: AutoencoderKL) -> None:
    results = [decode(vae), vae.encode(draw(1, 3, 32, 36)).latent_dist.mean]
    before = [result.clone() for result in results]

    for seed in range(1, 4):
        decode(vae, seed)
        vae.encode(draw(1, 3, 32, 36, seed=seed))

    assert all(torch.equal(*pair) for pair in zip(results, before, strict=True))


def test_the_callers_tensor_is_left_alone(vae: AutoencoderKL) -> None:
    z, x = draw(1, 4, 17, 14), draw(1, 3, 32, 36)

    vae.decode(z)
    vae.encode(x)

    assert torch.equal(z, draw(1, 4, 17, 14))
    assert torch.equal(x, draw(1, 3, 32, 36))


def test_threads_at_once_give_what_they_give_alone(vae: AutoencoderKL) -> None:
    alone = [decode(vae, seed) for seed in range(6)]

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: torch.no_grad()(decode)(vae, seed), range(6)))

    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("tiling", [False, True])
def test_a_decode_inside_a_decode_disturbs_nothing(vae: AutoencoderKL, tiling: bool) -> None:
    inner: list[Tensor] = []
    theirs, other = exact(vae), exact(vae, 1)
    if tiling:
        vae.enable_tiling()

    def nested(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = decode(vae, 1)

    vae.decoder.mid_block.attentions[0].register_forward_hook(nested)
    ours = decode(vae)

    assert error(ours, theirs) < BOUND
    assert error(inner[0], other) < BOUND


@pytest.mark.parametrize("step", ["convolve", "double", "statistics", "norm", "pointwise"])
def test_an_error_half_way_leaves_nothing_behind(
    vae: AutoencoderKL, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = decode(vae)
    calls, run = [0], getattr(CompiledEngine, step)

    def fails(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if step in ("double", "pointwise") else 2):
            raise MemoryError("half-way")
        return run(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(CompiledEngine, step, fails)
        with pytest.raises(MemoryError, match="half-way"):
            decode(vae)

    assert torch.equal(decode(vae), before)


def test_threads_and_runs_do_not_change_a_bit(vae: AutoencoderKL) -> None:
    count, results = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        h = draw(1, 32, 17, 30)
        conv = vae.decoder.up_blocks[-1].resnets[-1].conv1.requires_grad_(False)
        results.append(ops.upsample_conv(ops.conv3x3(h, conv, h), conv))
    torch.set_num_threads(count)

    assert all(torch.equal(results[0], result) for result in results[1:])


def test_a_picture_does_not_depend_on_its_batch(vae: AutoencoderKL) -> None:
    z = draw(3, 4, 16, 15)

    together = tiling.in_bands(vae, "decode", z)
    alone = tiling.in_bands(vae, "decode", z[1:2])

    assert together is not None
    assert alone is not None
    assert torch.equal(together[1:2], alone)


def test_a_circular_padding_is_kept(vae: AutoencoderKL) -> None:
    straight = decode(vae)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]

    ours = decode(vae)

    assert error(ours, exact(vae)) < BOUND
    assert error(ours, straight) > 0.1


def run_script(script: str, **environment: str) -> Any:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


WORKERS = """
import json, sys, torch
import torch.utils.data
from sd_vae import ops
from sd_vae.ops import dispatch, threads

dispatch.MIN_PIXELS = dispatch.MIN_FLOPS = 0
torch.manual_seed(0)
module = torch.nn.Conv2d(32, 32, 3, padding=1).eval()

class Pictures(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, index):
        with torch.no_grad():
            seen = []
            torch.set_num_threads(2)
            threads.run_together(seen.append)
            assert sorted(seen) == [0, 1]
            torch.set_num_threads(1)
            return ops.conv3x3(torch.linspace(-1, index, 32 * 256).view(1, 32, 16, 16).sin(), module)

def main():
    torch.set_num_threads(2)
    before = [Pictures()[index] for index in range(3)]
    torch.set_num_threads(2)
    threads.run_together(lambda _: None)
    loader = torch.utils.data.DataLoader(Pictures(), None, num_workers=1, multiprocessing_context="{way}", timeout=120)
    print(json.dumps([torch.equal(*pair) for pair in zip(before, loader)]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_give_what_the_parent_gives(way: str, tmp_path: Path) -> None:
    script = tmp_path / "workers.py"  # spawn reads it again
    script.write_text(WORKERS.format(way=way))

    found = (
        run_script(f"import runpy; runpy.run_path({str(script)!r}, run_name='workers')['main']()")
        if (way == "fork")
        else run_script(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import workers; workers.main()")
    )

    assert found == [True] * 3


IDLE = """
import json, torch
from ops_cases import draw, narrow_vae

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

vae = narrow_vae()
with torch.no_grad():
    for _ in range(2):
        vae.decode(draw(1, 4, 48, 64))
        vae.decode(draw(1, 4, 64, 48))
    before = resident()
    for _ in range(4):
        vae.decode(draw(1, 4, 48, 64))
        vae.decode(draw(1, 4, 64, 48))
print(json.dumps(resident() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_an_idle_process_does_not_grow() -> None:
    assert run_script(IDLE) < 16  # MiB; seen -9 to 3, and one workspace is 30


NARROW_VECTORS = """
import json, torch
from ops_cases import conv, draw, error, narrow_vae, group_norm
from sd_vae import ops
from sd_vae.ops import dispatch, vectors

torch.set_num_threads(1)
vae = narrow_vae()
with torch.no_grad():
    z, x = draw(1, 4, 17, 14), draw(2, 3, 32, 36)
    ours = vae.decode(z).sample, vae.encode(x).latent_dist.mean
    with ops.reference():
        theirs = vae.decode(z).sample, vae.encode(x).latent_dist.mean
print(json.dumps([vectors.LANES, dispatch.compiled_unavailable(), max(map(error, ours, theirs))]))
"""


@pytest.mark.slow
def test_kernels_run_in_vectors_of_eight(tmp_path: Path) -> None:
    features = "+avx,+avx2,+fma,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+bmi,+bmi2,+lzcnt,+f16c,+cx16"

    lanes, reason, worst = run_script(
        NARROW_VECTORS, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path)
    )

    assert (lanes, reason) == (8, None)
    assert worst < BOUND
