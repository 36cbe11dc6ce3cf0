"""What the benchmarks of training share: short runs from one checkpoint that differ in one thing, each finished once.

A run that is finished is not repeated and one that was interrupted goes on, so such a benchmark can be stopped at any
time and started again with the same arguments.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import ROOT, append
from sd_vae.data import DataConfig
from sd_vae.errors import UserError
from sd_vae.files import read_json, write_json
from sd_vae.losses import KLConfig, LossConfig, PerceptualConfig
from training import TrainConfig, resume, train
from training.config import ModelConfig, OptimConfig
from training.records import read_metrics

__all__ = ["add_arguments", "base_config", "finish", "keep_table", "kept", "last_means"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where the runs begin, what they train on and how long they are."""
    parser.add_argument("vae", help="checkpoint that every run starts from: a diffusers folder")
    parser.add_argument("--train", required=True, help="photos to train on")
    parser.add_argument("--photos", required=True, help="photos that the results are judged by")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=64, help="side of the crops")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--keep", action="store_true", help="add the table to the file in benchmarks/")


def base_config(args: argparse.Namespace, name: str, seed: int) -> TrainConfig:
    """Return the run that the others are changes of: L2 and KL, averaged weights, a rate that ends at 0."""
    return TrainConfig(
        out=str(args.work / name),
        steps=args.steps,
        batch_size=args.batch_size,
        seed=seed,
        ema_decay=0.98,
        log_every=1,
        validate_every=args.steps,
        checkpoint_every=max(1, args.steps // 4),
        keep_checkpoints=1,
        num_validation_images=1,
        tensorboard=False,
        model=ModelConfig(pretrained=args.vae),
        data=DataConfig(train=args.train, size=args.size, crop_scale=(args.size / 400, args.size / 160), num_workers=0),
        loss=LossConfig(
            reconstruction="l2",
            perceptual=PerceptualConfig(net="alex", weight=0.0),
            kl=KLConfig(weight=1e-6, convention="ldm"),
        ),
        optim=OptimConfig(lr=args.lr, betas=(0.9, 0.98), schedule="cosine", warmup_steps=20, max_grad_norm=1.0),
    )


def finish(config: TrainConfig) -> Path:
    """Bring a run to its end and return its folder.

    Raises:
        UserError: There is a run of another config.
    """
    folder = Path(config.out)
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if (known := folder.with_suffix(".json")).exists() and read_json(known) != settings:
        raise UserError(f"{folder} is a run with other settings; name another --work.")
    write_json(known, settings)
    if (folder / "report.json").exists():
        return folder
    if any((folder / "checkpoints").glob("step-*")):
        resume(folder)
    else:
        train(config, overwrite=folder.exists())
    return folder


def kept(path: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return a measurement, from its file where it has been made before."""
    if not path.exists():
        write_json(path, measure())
    values: dict[str, float] = read_json(path)
    return values


def last_means(folder: Path, share: float = 0.25) -> dict[str, float]:
    """Return the means of what a run logged over the last part of its steps."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    rows = rows[-max(1, round(share * len(rows))) :]
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[-1]}


def keep_table(name: str, title: str, table: str, argv: list[str]) -> None:
    """Add a benchmark's table to its file, under the command that made it, without the folders of this machine."""
    head = f"# {title}\n\nAppended by `python -m benchmarks.{name}`; the newest run is last.\n"
    command = " ".join([f"python -m benchmarks.{name}", *(arg.rstrip("/").rpartition("/")[2] for arg in argv)])
    append(ROOT / "benchmarks" / f"{name}.md", head, table, command)
