"""Plans of memory, and budgets: the first measure that fits is taken, or an error says what would be enough."""

import json
import resource

import pytest
import torch
from banded_cases import BOUND, NARROW, TWO_LEVELS, draw, make_vae, plain, relative, run

from sd_vae import PRESETS, plan_memory
from sd_vae.banded.measures import CPU_BANDS, GIB, GPU_BANDS, Measure, choose_measure
from sd_vae.banded.planning import HEAP_BYTES, LIBRARY_BYTES, predict
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.ops import reference
from sd_vae.ops.dispatch import compiled_unavailable

CONFIG = VAEConfig.from_dict(TWO_LEVELS)
SIZE = (256, 256)
LATENT = (1, 4, 128, 128)


def plan(device: str = "cpu", dtype: torch.dtype = torch.float32, **options):
    return plan_memory(CONFIG, *SIZE, dtype, device, **options)


def chosen(budget_gib: float | None, x: torch.Tensor) -> Measure:
    vae = make_vae()
    vae.enable_tiling(max_memory_gib=budget_gib)
    return choose_measure(vae, "decode", x)


@pytest.mark.parametrize("index", range(len(CPU_BANDS)))
def test_budget_takes_the_first_measure_that_fits(index) -> None:
    x = torch.empty(LATENT)
    taken = [gib for _, gib in plan().measures]

    measure = chosen(taken[index], x)

    assert str(measure) == plan().measures[taken.index(next(gib for gib in taken if gib <= taken[index]))][0]


def test_without_a_budget_the_largest_bands_are_taken() -> None:
    assert chosen(None, torch.empty(LATENT)).band_bytes == CPU_BANDS[0]


def test_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    vae = make_vae()
    vae.enable_tiling(max_memory_gib=1e-4)
    z = draw(vae, "decode", 48, 64)

    with pytest.raises(UserError, match=r"max_memory_gib is 0\.0001, and to decode 96x128 pixels takes at least") as e:
        run(vae, "decode", z)

    least = float(str(e.value).split("at least ")[1].split()[0])
    vae.enable_tiling(max_memory_gib=least)
    assert relative(run(vae, "decode", z), plain(vae, "decode", z)) <= BOUND


def test_budget_that_cannot_be_met_names_the_least_of_all_measures() -> None:
    least, most = (f"{pick(gib for _, gib in plan().measures) + 0.005:.2f}" for pick in (min, max))
    assert least != most

    with pytest.raises(UserError, match=f"takes at least {least} GiB"):
        chosen(1e-4, torch.empty(LATENT))


def test_budget_is_of_the_whole_batch(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("sd_vae.banded.planning.predict", lambda *request: asked.append(request[2]) or 2**40)

    with pytest.raises(UserError, match=r"to decode 3 times 256x256 pixels takes at least 1024\.0"):
        chosen(1.0, torch.empty(3, *LATENT[1:]))

    assert set(asked) == {3}


def test_plan_of_the_kernels_counts_their_libraries() -> None:
    text = json.dumps(CONFIG.to_dict(), sort_keys=True)

    found = predict(text, "decode", 1, 8, 8, torch.float32, "cpu", Measure(2**20, compiled=True))

    assert LIBRARY_BYTES + HEAP_BYTES < found < LIBRARY_BYTES + HEAP_BYTES + 2**25


def test_budget_that_cannot_be_met_allocates_nothing(monkeypatch) -> None:
    vae = make_vae()
    vae.enable_tiling(max_memory_gib=1e-4)
    x = draw(vae, "encode", 128, 128)
    monkeypatch.setattr(Measure, "run", _refuse_memory(Measure.run))

    with pytest.raises(UserError, match="to encode 256x256 pixels takes at least"):
        run(vae, "encode", x)


def _refuse_memory(original):
    """Let plans through, which run on "meta"."""

    def run(self, half, action, x, **options):
        assert x.is_meta, "something ran"
        return original(self, half, action, x, **options)

    return run


def test_tiling_off_forgets_the_budget() -> None:
    vae = make_vae()
    vae.enable_tiling(max_memory_gib=1e-4)

    vae.enable_tiling(False)

    assert vae.max_memory_gib is None
    assert (
        relative(run(vae, "decode", draw(vae, "decode", 4, 4)), plain(vae, "decode", draw(vae, "decode", 4, 4)))
        <= BOUND
    )


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), True, "2", 1 + 1j])
def test_enable_tiling_refuses_a_budget_that_is_no_positive_number(budget) -> None:
    with pytest.raises(UserError, match=r"max_memory_gib is .*, it must be a positive number of GiB, or None for no b"):
        make_vae().enable_tiling(max_memory_gib=budget)


@pytest.mark.parametrize("switch", [1.5, "yes", None])
def test_enable_tiling_refuses_a_budget_in_place_of_the_switch(switch) -> None:
    with pytest.raises(UserError, match=r"use_tiling is .*, it must be True or False; a budget is max_memory_gib=1\.5"):
        make_vae().enable_tiling(switch)


def test_measures_on_a_gpu_keep_maps_there_first_and_in_host_memory_last() -> None:
    found = [name for name, _ in plan("cuda").measures]

    assert len(found) == 2 * len(GPU_BANDS)
    assert [("host memory" in name) for name in found] == [False] * len(GPU_BANDS) + [True] * len(GPU_BANDS)


def test_spilling_takes_less_of_the_gpu() -> None:
    big = plan_memory(PRESETS["sd1"], 512, 512, torch.bfloat16, "cuda")
    kept, spilled = ([gib for name, gib in big.measures if ("host memory" in name) == there] for there in (False, True))

    assert all(there < here for there, here in zip(spilled, kept, strict=True))
    assert spilled[-1] < 0.5 * kept[-1]


def test_plan_of_tiling_is_below_half_of_the_untiled() -> None:
    big = plan_memory(PRESETS["sd1"], 512, 512)

    assert big.banded_gib < 0.5 * big.untiled_gib


@pytest.mark.parametrize("action", ["encode", "decode"])
def test_plan_is_of_the_action(action) -> None:
    text = json.dumps(CONFIG.to_dict(), sort_keys=True)

    found = plan(action=action)

    assert found.untiled_gib == predict(text, action, 1, *SIZE, torch.float32, "cpu", None) / GIB


def test_plan_of_the_reference_has_no_compiled_kernels() -> None:
    with reference():
        inside = plan()

    if compiled_unavailable():
        pytest.skip(str(compiled_unavailable()))
    assert inside.banded_gib != plan().banded_gib
    assert plan().banded_gib * GIB > LIBRARY_BYTES


@pytest.mark.parametrize("action", ["encode", "decode"])
def test_plan_of_a_batch_holds_inputs_and_results_of_all(action) -> None:
    one, three = (plan(action=action, batch_size=count) for count in (1, 3))

    more = GIB * (three.banded_gib - one.banded_gib)
    picture = 256 * 256 * 3 * 4
    assert picture < more < 8 * picture
    maps = one.untiled_gib * GIB - HEAP_BYTES
    assert 2.5 * maps < three.untiled_gib * GIB - HEAP_BYTES < 3.5 * maps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 255}, "image size 255x256 is not a whole positive multiple of 2 in both directions."),
        ({"width": 0}, "image size 256x0 is not a whole positive multiple of 2 in both directions."),
        ({"width": 2.0}, "image size 256x2.0 is not a whole positive multiple of 2 in both directions."),
        ({"dtype": torch.int8}, "dtype is torch.int8, it must be a float type such as torch.float32."),
        ({"dtype": "float16"}, "dtype is 'float16', it must be a float type such as torch.float32."),
        ({"device": "gpu"}, "device is 'gpu', it must be one such as cpu or cuda."),
        ({"device": "meta"}, "device is 'meta', it must be one such as cpu or cuda."),
        ({"device": None}, "device is None, it must be one such as cpu or cuda."),
        ({"action": "train"}, "unknown action 'train'; choose encode or decode."),
        ({"batch_size": 0}, "batch_size is 0, it must be a whole number of at least 1."),
        ({"batch_size": 1.5}, "batch_size is 1.5, it must be a whole number of at least 1."),
        ({"config": "sd1"}, "config is 'sd1', it must be a VAEConfig; take vae.config or PRESETS['sd1']."),
    ],
)
def test_plan_refuses(arguments, words) -> None:
    with pytest.raises(UserError) as error:
        plan_memory(**{"config": CONFIG, "height": 256, "width": 256} | arguments)

    assert str(error.value) == words


def test_plan_takes_the_config_of_a_model() -> None:
    assert plan_memory(make_vae().config, *SIZE) == plan()


def test_plan_of_a_large_picture_allocates_nothing_large() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    found = plan_memory(VAEConfig.from_dict(PRESETS["sd1"].to_dict() | NARROW), 1024, 1024)

    taken_gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert taken_gib < 0.1 < 0.3 < found.banded_gib
