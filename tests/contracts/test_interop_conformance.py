"""The script that runs diffusers' tests on our class: it must see a difference where there is one."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "upstream_conformance.py"

UPSTREAM = """
import pytest
from diffusers import AutoencoderKL

class TestKL:
    def test_same(self):
        assert AutoencoderKL().encoder

    def test_theirs_only(self):
        assert AutoencoderKL.__module__.startswith("diffusers")

    @pytest.mark.skip(reason="no GPU")
    def test_skipped(self):
        pass
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("upstream_conformance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # two processes that import everything: half a minute on a busy machine
def test_interop_conformance_sees_a_difference(script, tmp_path: Path, monkeypatch, capsys) -> None:
    test_file = tmp_path / "tests" / script.TEST_FILE
    test_file.parent.mkdir(parents=True)
    test_file.write_text(UPSTREAM)
    monkeypatch.setattr(sys, "argv", ["script", "--json", "--diffusers-tests", str(tmp_path / "tests")])

    code = script.main()

    result = json.loads(capsys.readouterr().out)
    assert code == 1
    assert result["different"] == ["TestKL::test_theirs_only"]
    assert result["counts"]["diffusers"] == {"passed": 2, "skipped": 1}
    assert result["counts"]["sd_vae"] == {"passed": 1, "failed": 1, "skipped": 1}


def test_interop_conformance_names_a_missing_test_file(script, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--diffusers-tests", str(tmp_path)])

    assert script.main() == 2
    assert "test_models_autoencoder_kl.py; give the folder tests/ of a diffusers checkout." in capsys.readouterr().err


def test_interop_conformance_says_why_the_tests_do_not_start(script, tmp_path: Path) -> None:
    test_file = tmp_path / script.TEST_FILE
    test_file.parent.mkdir(parents=True)
    test_file.write_text("import a_package_nobody_has\n")

    with pytest.raises(
        script.UserError, match=r"could not run diffusers' tests: .*No module named 'a_package_nobody_has'"
    ):
        script.run_tests(tmp_path, ours_in_place=False)


def test_interop_conformance_prints_a_line_a_test(script, capsys) -> None:
    theirs, ours = {"A::a": "passed", "A::b": "passed"}, {"A::a": "passed", "A::b": "failed"}

    script.print_outcomes(theirs, ours, {"diffusers": script.Counter(theirs.values())})

    assert capsys.readouterr().out.splitlines() == [
        "test  diffusers  sd_vae",
        "A::a  passed     passed   ",
        "A::b  passed     failed     <- differs",
        "diffusers: 2 passed, 0 skipped, 0 failed",
    ]
