"""Run diffusers' own tests of its `AutoencoderKL` on diffusers' class and on ours in its place, and compare.

The tests are not in this repository. Fetch them beside it, from the diffusers release that is nearest the installed
one, and name the folder:

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers /tmp/diffusers
    python benchmarks/upstream_conformance.py --diffusers-tests /tmp/diffusers/tests

The tests want `pip install pytest parameterized`. Two of them download a model and fail both ways without a hub. Exit
codes: 0 the same outcome test by test, 1 a difference, 2 the tests could not be run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from sd_vae.errors import UserError

TEST_FILE = Path("models", "autoencoders", "test_models_autoencoder_kl.py")

PLUGIN = """
import diffusers

from sd_vae.autoencoder import AutoencoderKL

diffusers.AutoencoderKL = AutoencoderKL  # before the tests import the name


def pytest_collection_modifyitems(items):
    assert all(item.module.AutoencoderKL is AutoencoderKL for item in items), "the tests do not run on our class"
"""


def main() -> int:
    """Compare outcomes and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers-tests", type=Path, required=True, help="the folder tests/ of a diffusers checkout")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    arguments = parser.parse_args()
    try:
        theirs = run_tests(arguments.diffusers_tests, ours_in_place=False)
        ours = run_tests(arguments.diffusers_tests, ours_in_place=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    counts = {"diffusers": Counter(theirs.values()), "sd_vae": Counter(ours.values())}
    if arguments.json:
        outcomes = {name: {"diffusers": theirs.get(name), "sd_vae": ours.get(name)} for name in theirs | ours}
        print(json.dumps({"counts": counts, "different": different, "outcomes": outcomes}))
    else:
        print_outcomes(theirs, ours, counts)
    return 1 if different else 0


def run_tests(tests: Path, *, ours_in_place: bool) -> dict[str, str]:
    """Return test name to outcome (passed, failed, skipped), from a pytest of its own.

    Raises:
        UserError: The test file is not there, or pytest could not collect it.
    """
    tests = tests.resolve()
    if not (tests / TEST_FILE).is_file():
        raise UserError(f"there is no {tests / TEST_FILE}; give the folder tests/ of a diffusers checkout.")
    with tempfile.TemporaryDirectory() as folder:
        settings, plugin, report = (Path(folder, name) for name in ("pytest.ini", "ours_in_place.py", "report.xml"))
        settings.write_text("[pytest]\n")
        plugin.write_text(PLUGIN)
        command = [sys.executable, "-m", "pytest", str(tests / TEST_FILE), "-q", "-c", str(settings)]
        command += ["--rootdir", str(tests.parent), "--junitxml", str(report)]
        command += ["-p", "no:cacheprovider", "-p", "no:randomly", *(["-p", plugin.stem] if ours_in_place else [])]
        search_path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: some tests failed, which is an outcome
            reason = next((line for line in done.stdout.splitlines() if line.startswith("E  ")), done.stderr[-300:])
            raise UserError(
                f"pytest could not run diffusers' tests: {reason.removeprefix('E').strip()}; mend that first."
            )
        return {name_of(case): outcome_of(case) for case in ET.parse(report).iter("testcase")}


def name_of(case: ET.Element) -> str:
    """Class and name of a test in a JUnit report."""
    return f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"


def outcome_of(case: ET.Element) -> str:
    """Passed, failed or skipped; an error outside the test counts as failed."""
    tags = {child.tag for child in case}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def print_outcomes(theirs: dict[str, str], ours: dict[str, str], counts: dict[str, Counter[str]]) -> None:
    """One line a test, differences marked, then the counts."""
    width = max(map(len, theirs | ours))
    print(f"{'test':{width}}  diffusers  sd_vae")
    for name in sorted(theirs | ours):
        mine, other = ours.get(name, "absent"), theirs.get(name, "absent")
        print(f"{name:{width}}  {other:9}  {mine:9}{'' if mine == other else '  <- differs'}")
    for name, outcomes in counts.items():
        print(f"{name}: {', '.join(f'{outcomes[kind]} {kind}' for kind in ('passed', 'skipped', 'failed'))}")


if __name__ == "__main__":
    sys.exit(main())
