"""What is imported is declared: an undeclared package is there on the developer's machine and nowhere else."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"sd_vae", "training", "eval", "benchmarks", "examples"}
OPTIONAL = {
    "triton",
    "streaming",
    "ray",
    "wandb",
    "constriction",
    "gradio",
    "av",
    "xformers",
}  # imported where they are, and said to be missing where not
TRANSITIVE = {"llvmlite": "numba", "mpl_toolkits": "matplotlib"}


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """(module, file) for every absolute import below a folder, also inside functions."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            yield from ((name.split(".")[0], str(file.relative_to(ROOT))) for name in names)


def declared(*extras: str) -> set[str]:
    """Names of the distributions that installing the project with these extras brings directly, normalised."""
    wanted = [
        requirement
        for requirement in requires("sd-vae") or []
        if "extra ==" not in requirement
        or any(re.search(f"extra == ['\"]{extra}['\"]", requirement) for extra in extras)
    ]
    return {normal(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("sd_vae", ()), ("training", ()), ("eval", ()), ("benchmarks", ("test",)), ("tests", ("test",))],
)
def test_every_import_is_a_declared_dependency(folder: str, extras: tuple[str, ...]) -> None:
    ours = OURS | OPTIONAL | {file.stem for file in (ROOT / "tests").rglob("*.py")} | set(sys.stdlib_module_names)
    distributions = packages_distributions()
    names = declared(*extras)

    undeclared = {
        module: file
        for module, file in imported(folder)
        if module not in ours
        and not {normal(name) for name in distributions.get(TRANSITIVE.get(module, module), [module])} & names
    }

    assert undeclared == {}
