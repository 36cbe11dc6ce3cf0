"""Mutations of configs and data folders: a run trains, or says in one line what to mend (bar: 500, exit code 0 or 2).

Each mutation changes one or two things of a run that works, by a seed: values of the wrong type, out of range, not
finite or absurd, keys that do not exist or are missing, YAML that is none; files that are empty, cut off, text, no
picture, of odd names, folders of no pictures, damaged tables and tars. A run is one step of a tiny VAE.

    python -m benchmarks.fuzz_training --num 500
"""

import argparse
import contextlib
import io
import logging
import random
import shutil
import tarfile
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

__all__ = ["Outcome", "fuzz", "main"]

Outcome = tuple[int, str, str]
"""Seed of the mutation, what it was, and what went wrong: empty where nothing did."""

JUNK: tuple[Any, ...] = (
    *(None, True, "", "x", "-1", "1e9", [], {}, [1], {"a": 1}, 0, -1, 1, 2**63, 2**70, 0.5),
    *(1e38, -1e38, 1e-45, float("nan"), float("inf"), "🙂", "../..", "/", "hf://", "a" * 300, "\x07", [None], [[]]),
)

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def recipe(folder: Path) -> dict[str, Any]:
    """A run of one step that works."""
    return {
        "out": str(folder / "run"),
        "steps": 1,
        "batch_size": 2,
        "tensorboard": False,
        "num_validation_images": 1,
        "model": {"pretrained": str(folder / "start")},
        "data": {"train": str(folder / "data"), "validation": str(folder / "photos"), "size": 16, "num_workers": 0},
        "loss": {"reconstruction": "l2", "perceptual": {"weight": 0.0}, "kl": {"weight": 1e-6}},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.99]},
    }


def mutate_config(config: dict[str, Any], rng: random.Random) -> str:
    """Change one value, key or section."""
    section: Any = config
    path: list[str] = []
    while True:
        name = rng.choice([*_known(path), *section]) if section else "x"
        path.append(name)
        if isinstance(section.get(name), dict) and rng.random() < 0.8:
            section = section[name]
            continue
        break
    kind = rng.choice(("junk", "junk", "junk", "drop", "misspell"))
    if kind == "drop":
        section.pop(name, None)
    elif kind == "misspell":
        section[name + "s"] = section.pop(name, 1)
    else:
        section[name] = rng.choice(JUNK)
    # what would only take long
    for key, largest in (("steps", 2), ("batch_size", 4), ("gradient_accumulation_steps", 2)):
        if type(config.get(key)) is int:
            config[key] = min(config[key], largest)
    return f"{kind} {'.'.join(path)}: {section.get(name, section.get(name + 's'))!r}"


def _known(path: list[str]) -> list[str]:
    """Fields of a section."""
    import dataclasses

    from training.config import TrainConfig

    cls: Any = TrainConfig
    for name in path:
        factories = {field.name: field.default_factory for field in dataclasses.fields(cls)}
        cls = factories.get(name)
        if name == "data":
            from sd_vae.data.config import DataConfig

            cls = DataConfig
        if not dataclasses.is_dataclass(cls):
            return ["x"]
    return [field.name for field in dataclasses.fields(cls)]


def mutate_data(folder: Path, rng: random.Random) -> str:
    """Change one file of the data, or all."""
    data = folder / "data"
    victim = rng.choice(sorted(data.iterdir()))
    content = victim.read_bytes()

    def tar(of: bytes) -> None:
        with tarfile.open(data / "a.tar", "w") as archive:
            info = tarfile.TarInfo("0.png")
            info.size = len(of)
            archive.addfile(info, io.BytesIO(of))

    def only(name: str, of: bytes) -> None:
        shutil.rmtree(data)
        data.mkdir()
        (data / name).write_bytes(of)

    def only_tar(keep: float) -> None:
        only("x", b"")
        (data / "x").unlink()
        tar(content)
        whole = (data / "a.tar").read_bytes()
        (data / "a.tar").write_bytes(whole[: int(keep * len(whole))])

    kinds: dict[str, Callable[[], Any]] = {
        "empty file": lambda: victim.write_bytes(b""),
        "cut off": lambda: victim.write_bytes(content[: rng.randrange(len(content))]),
        "bits flipped": lambda: victim.write_bytes(bytes(b ^ (rng.random() < 0.02) for b in content)),
        "text": lambda: victim.write_text("text"),
        "all cut off": lambda: [path.write_bytes(content[:60]) for path in data.iterdir()],
        "no files": lambda: [path.unlink() for path in data.iterdir()],
        "no folder": lambda: shutil.rmtree(data),
        "a file for a folder": lambda: (shutil.rmtree(data), data.write_text("text")),
        "a folder named as a picture": lambda: (data / "z.png").mkdir(),
        "a link to nowhere": lambda: (data / "z.png").symlink_to("nowhere"),
        "a link to itself": lambda: (data / "z.png").symlink_to("z.png"),
        "odd name": lambda: victim.rename(data / "a\nb\u202e🙂%s.png"),
        "a parquet file of text": lambda: only("a.parquet", b"text"),
        "a parquet file beside": lambda: (data / "a.parquet").write_bytes(b"PAR1"),
        "a tar": lambda: only_tar(1.0),
        "a tar, cut off": lambda: only_tar(rng.random()),
        "a tar of text": lambda: only("a.tar", b"text" * 200),
        "a tar beside": lambda: tar(content),
        "a picture of one pixel": lambda: Image.new("RGB", (1, 1)).save(victim),
        "a picture of one line": lambda: Image.new("RGB", (5000, 1)).save(victim),
        "a picture of floats": lambda: Image.new("F", (20, 20)).save(data / "z.tiff"),
        "metadata of text": lambda: (data / "metadata.jsonl").write_text("text"),
    }
    kind = rng.choice(sorted(kinds))
    kinds[kind]()
    return f"data: {kind}"


def attempt(seed: int, template: Path, folder: Path) -> Outcome:
    """Mutate by a seed, run, and judge."""
    from sd_vae.cli import main as sd_vae

    rng = random.Random(seed)
    shutil.copytree(template, folder)
    config, said = recipe(folder), []
    for _ in range(rng.choice((1, 1, 2))):
        is_data = rng.random() < 0.4 and not any(line.startswith("data:") for line in said)
        said.append(mutate_data(folder, rng) if is_data else mutate_config(config, rng))
    text = yaml.safe_dump(config)
    if rng.random() < 0.05:
        text, cut = text[: rng.randrange(len(text))], "recipe cut off"
        said.append(cut)
    (folder / "recipe.yaml").write_text(text)
    what, errors = "; ".join(said), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = sd_vae(["train", "--config", str(folder / "recipe.yaml")])
        except BaseException as error:
            return seed, what, "".join(traceback.format_exception(error))[-600:]
    line = errors.getvalue().strip().splitlines()[-1] if errors.getvalue().strip() else ""
    if code not in (0, 2):
        return seed, what, f"exit code {code}: {line}"
    if code == 2 and not ("error: " in line and line.endswith(".")):
        return seed, what, f"not one line that ends in a full stop: {line}"
    return seed, what, ""


def fuzz(num: int, place: Path, *, first: int = 0) -> tuple[list[Outcome], Counter[str]]:
    """Return the mutations that ended badly, and how many ended how."""
    from sd_vae.autoencoder import AutoencoderKL

    template = place / "template"
    for name in ("data", "photos"):
        (template / name).mkdir(parents=True)
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(template / name / f"{number}.png")
    AutoencoderKL(**TINY).save_pretrained(template / "start")
    bad, counts = [], Counter[str]()
    for seed in range(first, first + num):
        outcome = attempt(seed, template, place / "one")
        counts["bad" if outcome[2] else "good"] += 1
        bad += [outcome] if outcome[2] else []
        shutil.rmtree(place / "one")
    return bad, counts


def main() -> None:
    """Run as many mutations as asked for, print those that ended badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        bad, counts = fuzz(chosen.num, Path(place), first=chosen.first)
    for seed, what, problem in bad:
        print(f"--- {seed}: {what}\n{problem}")
    print(f"{chosen.num} mutations: {counts['good']} with exit code 0 or one clear line, {counts['bad']} otherwise")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
