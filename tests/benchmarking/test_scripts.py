"""The scripts in benchmarks/: what they compute, on tiny models; their times mean nothing here."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks import bars, gpu, half_precision, memory, plot_cost, speed, trainer_step, training_step
from benchmarks.figures import Figure, all_met, append, to_markdown
from benchmarks.memory import Outcome, Run
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.config import PRESETS
from sd_vae.losses import LossConfig, Objective, PerceptualConfig


def _figure(value: float | None, *, is_correct: bool = True) -> Figure:
    return Figure(name="decode", value=value, must=2.0, aim=3.0, note="difference 1e-5", is_correct=is_correct)


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (_figure(None), "not run"),
        (_figure(1.99), "MISSED"),
        (_figure(2.0), "met, aim missed"),
        (_figure(3.0), "met"),
        (_figure(3.0, is_correct=False), "MISSED"),
    ],
)
def test_figure_verdict(figure: Figure, verdict: str) -> None:
    assert figure.verdict == verdict
    assert f"| {verdict} |" in to_markdown([figure])


def test_all_met_leaves_out_what_did_not_run() -> None:
    assert all_met([_figure(2.5), _figure(None)]) is True
    assert all_met([_figure(2.5), _figure(1.0)]) is False
    assert all_met([_figure(None)]) is None


@pytest.mark.parametrize("name", ["shared_tests", "mini", "mini_perceptual", "compression", "anomaly"])
def test_bars_that_need_shared_say_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SHARED", tmp_path / "none")

    result = bars.BARS[name]()

    assert result.met is None
    assert result.figure == "not run: needs the folder shared/ beside the checkout"


def test_append_keeps_older_sections(tmp_path: Path) -> None:
    path = tmp_path / "speed.md"

    append(path, "# Speed\n", "| first |", "python -m benchmarks.speed")
    append(path, "# Speed\n", "| second |", "python -m benchmarks.speed")

    text = path.read_text()
    assert text.count("# Speed\n") == 1
    assert text.index("| first |") < text.index("| second |")
    assert "cores" in text
    assert "`python -m benchmarks.speed`" in text


def test_speed_figures_hold_the_computed_difference(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_decode = tiny_vae._decode
    monkeypatch.setattr(tiny_vae, "_decode", lambda z: plain_decode(z) * 1.5)

    decode, encode = speed.measure_float32(tiny_vae, 16, 1, keep=False)

    assert (decode.name, decode.is_correct, decode.met) == ("decode 16, fp32", False, False)
    assert "difference 5.0e-01" in decode.note
    assert encode.is_correct


def test_speed_says_why_bfloat16_was_not_run(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "lacks_bfloat16", lambda: "this CPU has neither")

    figures = speed.measure_bfloat16(tiny_vae, 16, 1)

    assert [(figure.value, figure.note) for figure in figures] == [(None, "this CPU has neither")] * 3


def test_speed_measures_bfloat16_where_there_is_one(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "lacks_bfloat16", lambda: None)

    figures = speed.measure_bfloat16(tiny_vae, 16, 1)

    assert all(figure.value is not None for figure in figures)
    assert 20 < (figures[2].value or 0) < 100  # dB


def test_psnr_is_of_the_range_of_the_reference() -> None:
    reference = torch.tensor([0.0, 10.0])

    assert speed.psnr_db(reference + 0.1, reference) == pytest.approx(40.0, abs=1e-3)


def test_gradient_difference_is_of_the_largest_gradient() -> None:
    theirs = {"a": torch.tensor([4.0]), "b": torch.tensor([1.0])}

    assert training_step.gradient_difference({"a": torch.tensor([4.0]), "b": torch.tensor([2.0])}, theirs) == 0.25


def test_training_step_gives_both_models_the_same_gradients(tiny_vae: AutoencoderKL) -> None:
    objective = Objective(LossConfig(reconstruction="l1", perceptual=PerceptualConfig(weight=0.0)))
    trainers = training_step._trainers(tiny_vae, objective, in_bfloat16=True)
    x, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)

    gradients = {name: trainer.gradients(x, noise) for name, trainer in trainers.items()}

    assert list(gradients) == ["ours", "diffusers", "ours, autocast", "diffusers, autocast, channels_last"]
    # worst seen 2e-6
    assert training_step.gradient_difference(gradients["ours"], gradients["diffusers"]) < 1e-4
    assert training_step.gradient_difference(gradients["ours, autocast"], gradients["diffusers"]) > 1e-4


def test_training_step_trains(tiny_vae: AutoencoderKL) -> None:
    objective = Objective(LossConfig(reconstruction="l1", perceptual=PerceptualConfig(weight=0.0)))
    trainer = training_step.Trainer(copy.deepcopy(tiny_vae), objective, autocast=False)

    trainer.step(torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8))

    assert not torch.equal(trainer.vae.decoder.conv_out.weight, tiny_vae.decoder.conv_out.weight)


def test_trainer_step_is_compared_on_the_same_losses(tiny_vae: AutoencoderKL) -> None:
    figure = trainer_step._measure(tiny_vae, "no", 16, 2, 1, lpips=False)

    assert figure.is_correct
    assert "steps/s" in figure.note


def test_trainer_step_sees_another_noise(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_step, "posterior_noise", lambda *_: torch.zeros(2, 4, 8, 8))

    assert not trainer_step._measure(tiny_vae, "no", 16, 2, 1, lpips=False).is_correct


def test_plot_cost_counts_and_draws(tmp_path: Path) -> None:
    seconds = {"sd-vae": 1.0, "diffusers": 3.0}
    points = [plot_cost._point(PRESETS["mini"], 64, seconds), plot_cost._point(PRESETS["mini"], 128, {})]

    plot_cost.draw(points, tmp_path / "cost.png")

    assert 0 < points[0].attention["decode"] < points[1].attention["decode"] < 1
    assert points[1].gflop["decode"] > 4 * points[0].gflop["decode"]
    assert 1000 < (tmp_path / "cost.png").stat().st_size < 100_000
    assert "| 64 | 1.00 | 3.00 |" in plot_cost.to_markdown(points)
    assert "| 128 | - | - |" in plot_cost.to_markdown(points)


def test_memory_compares_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([(4.0, 10.0), (1.0, 5.0), (8.0, 40.0), (4.0, 10.0), (4.0, 10.0), (1.0, 8.0)])

    def measure(run: Run, result: Path) -> Outcome:
        torch.save(torch.tensor([1.0, 2.0 if run.way == memory.BASELINE else 2.5]), result)
        peak_gib, seconds = next(outcomes)
        return Outcome(peak_gib=peak_gib, seconds=seconds)

    monkeypatch.setattr(memory, "measure", measure)

    theirs, ours = memory.compare("decode", 64, 3, (memory.BASELINE, "ours tiling"))

    assert (theirs.memory_ratio, theirs.time_ratio, theirs.difference) == (1.0, 1.0, 0.0)
    assert (ours.memory_ratio, ours.time_ratio, ours.difference) == (0.25, 0.5, 0.25)
    assert "| decode 64x64 | ours tiling | 1.000 | 0.25x | 8.0 | 0.50x | 2.5e-01 |" in memory.to_markdown([ours])


def test_memory_without_the_baseline_has_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(run: Run, result: Path) -> Outcome:
        torch.save(torch.ones(2), result)
        return Outcome(peak_gib=5.5, seconds=60.0)

    monkeypatch.setattr(memory, "measure", measure)

    (ours,) = memory.compare("decode", 2048, 1, ("ours tiling",))

    assert "| decode 2048x2048 | ours tiling | 5.500 | - | 60.0 | - | - |" in memory.to_markdown([ours])


def test_memory_says_how_a_run_ended() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)task='sleep'.* ended with 1: .*AttributeError"):
        memory.measure(Run(way="diffusers tiling", task="sleep", height=-8, width=8, dtype="float17"))


def test_memory_needs_the_fields_that_linux_has() -> None:
    with pytest.raises(RuntimeError, match=r"/proc/self/status has no VmNothing; this needs Linux\."):
        memory._memory_bytes("VmNothing")


def test_plan_runs_are_twelve_that_differ() -> None:
    assert len(set(memory.PLAN_RUNS)) == 12
    assert {(run.task, run.dtype) for run in memory.PLAN_RUNS} == {
        (task, dtype) for task in ("encode", "decode") for dtype in ("float32", "bfloat16")
    }


def test_gpu_measures_every_way_against_the_compiled_baseline(tiny_vae: AutoencoderKL) -> None:
    with torch.no_grad():
        rows = gpu.measure(tiny_vae, "decode", 16, 1, rounds=2)

    assert [row.way for row in rows] == ["ours", "ours compiled", "diffusers", gpu.BASELINE]
    assert rows[-1].speedup == 1.0
    assert all(row.difference < 1e-4 for row in rows)  # worst seen 1e-6
    assert all((row.floor, row.memory_gib) == (None, None) for row in rows)
    assert f"| decode | 16x16 | 1 | {gpu.BASELINE} |" in gpu.to_markdown(rows)


def test_gpu_needs_one(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert gpu.main([]) == 2
    assert "needs a CUDA device, and there is none" in capsys.readouterr().err


def test_half_precision_mends_what_overflows() -> None:
    table = half_precision.measure("mini", 16)

    assert "| as they are | not finite | not finite |" in table
    assert "4 streams in" in table
    assert "layers overflowed, 0 do now" in table
    mean, decode = (float(cell) for cell in table.split("| rescaled | ")[1].split(" |\n")[0].split(" | "))
    assert max(mean, decode) < 2e-2  # float16 itself; worst seen 9.2e-3
