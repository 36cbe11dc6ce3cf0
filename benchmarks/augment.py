"""Does augmenting in the latent space help a classifier of few pictures? On scikit-learn's digits, whatever the answer.

    python -m benchmarks.augment VAE [VAE ...] --out benchmarks/augment.md

Digits of 8x8 pixels are enlarged to 64x64, which is 8x8 latent cells at factor 8. A few of each class are for training,
the others for testing, drawn anew in each of several rounds. A classifier (support vectors, or logistic regression, on
16x16 pixels) learns from the training pictures alone, and with variants added: shifted by pixels and turned, which is
what anybody does without a VAE; through the VAE unchanged, which is what a VAE costs; noise of the posterior; mixing
within the class; and all of `sd-vae augment`. Every arm has as many pictures. Differences to no augmentation are paired
by round, with a 95% interval of the mean by Student's t.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

import sd_vae
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.files import write_text
from sd_vae.latents.augment import augment
from sd_vae.latents.sample import generator_of

__all__ = ["ARMS", "Round", "accuracies", "load_digits", "main", "shifted", "to_markdown", "varied"]

SIDE, SEEN_SIDE = 64, 16
"""Pixels that the VAE and the classifier see."""

ARMS: dict[str, dict[str, float]] = {
    "through the VAE": {"temperature": 0.0, "mix": 0.0},
    "posterior, temperature 1": {"temperature": 1.0, "mix": 0.0},
    "posterior, temperature 10": {"temperature": 10.0, "mix": 0.0},
    "mixing 0.5": {"temperature": 0.0, "mix": 0.5},
    "sd-vae augment (1, 0.3)": {"temperature": 1.0, "mix": 0.3},
}
"""Name of each arm with a VAE to what it does."""

MAX_SHIFT, MAX_DEGREES = 0.125, 10.0
"""Of the arm without a VAE: share of the side, one pixel of eight; and degrees."""

Scores = dict[tuple[str, str], float]


class Round:
    """Which digits are for training and which for testing.

    Args:
        x: Pictures (N, 3, S, S) in [-1, 1].
        labels: (N,).
        num_per_class: Training pictures of each class.
        seed: Which.
    """

    def __init__(self, x: Tensor, labels: Tensor, num_per_class: int, seed: int) -> None:
        order = torch.randperm(len(x), generator=generator_of(seed, "round"))
        places = [order[labels[order] == label][:num_per_class] for label in labels.unique()]
        train = torch.cat(places)
        is_test = torch.ones(len(x), dtype=torch.bool)
        is_test[train] = False
        self.seed = seed
        self.x, self.labels = x[train], labels[train]
        self.test_x, self.test_labels = x[is_test], labels[is_test]


def load_digits(side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits as pictures (N, 3, side, side) in [-1, 1], and their labels (N,)."""
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] / 8.0 - 1.0
    large = interpolate(grey, size=(side, side), mode="bicubic", align_corners=False).clamp(-1.0, 1.0)
    return large.expand(-1, 3, -1, -1), torch.from_numpy(digits.target)


def shifted(x: Tensor, seed: int, number: int) -> Tensor:
    """Return pictures (N, 3, S, S) turned and shifted at random: augmentation without a VAE."""
    draws = 2.0 * torch.rand(len(x), 3, generator=generator_of(seed, "shift", number)) - 1.0
    angle = draws[:, 0] * MAX_DEGREES * torch.pi / 180.0
    across, down = (2.0 * MAX_SHIFT * draws[:, column] for column in (1, 2))
    rows = [torch.stack([angle.cos(), -angle.sin(), across]), torch.stack([angle.sin(), angle.cos(), down])]
    grid = affine_grid(torch.stack(rows).permute(2, 0, 1), list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def varied(vae: AutoencoderKL, round_: Round, arm: Mapping[str, float], num_variants: int) -> Tensor:
    """Return so many variants of each training picture, (num_variants * N, 3, S, S)."""
    posterior = vae.encode(round_.x.to(vae.device, vae.dtype)).latent_dist
    means, stds = posterior.mean.float().cpu(), posterior.std.float().cpu()
    made = []
    for number in range(num_variants):
        for index, label in enumerate(round_.labels):
            generator = generator_of(round_.seed, "augment", index, number)
            chosen, share = torch.rand(2, generator=generator).tolist()
            others = [other for other in (round_.labels == label).nonzero()[:, 0].tolist() if other != index]
            made.append(
                augment(
                    means[index],
                    stds[index],
                    generator=generator,
                    temperature=arm["temperature"],
                    partner=means[others[int(chosen * len(others))]] if others else None,
                    share=share * arm["mix"],
                )
            )
    batches = torch.stack(made).split(64)
    return torch.cat([vae.decode(z.to(vae.device, vae.dtype)).sample.float().cpu().clamp(-1.0, 1.0) for z in batches])


def accuracies(round_: Round, added: Tensor | None) -> dict[str, float]:
    """Return each classifier's share of right answers on the test pictures, trained with `added` variants."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    x, labels = _seen(round_.x), round_.labels.numpy()
    if added is not None:
        x = np.concatenate([x, _seen(added)])
        labels = np.concatenate([labels, np.tile(labels, len(added) // len(labels))])
    test, truth = _seen(round_.test_x), round_.test_labels.numpy()
    classifiers: dict[str, Any] = {
        "support vectors": SVC(C=10.0),
        "logistic regression": LogisticRegression(max_iter=1000),
    }
    return {name: float((one.fit(x, labels).predict(test) == truth).mean()) for name, one in classifiers.items()}


def to_markdown(scores: Sequence[Scores], title: str, note: str) -> str:
    """Return the table: mean accuracy of each arm and classifier, and the paired difference to no augmentation."""
    classifiers = list(dict.fromkeys(name for _, name in scores[0]))
    arms = list(dict.fromkeys(arm for arm, _ in scores[0]))
    lines = [f"## {title}", "", note, "", "| | " + " | ".join(f"{name} | difference" for name in classifiers) + " |"]
    lines.append("|---|" + "---|" * (2 * len(classifiers)))
    for arm in arms:
        cells = []
        for name in classifiers:
            values = [one[arm, name] for one in scores]
            differences = [one[arm, name] - one[arms[0], name] for one in scores]
            cells += [f"{statistics.mean(values):.1%}", "" if arm == arms[0] else _interval(differences)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and add the table to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "vae", nargs="+", help="VAEs: folders, files, or names that ship; NAME=VAE says what to call one"
    )
    parser.add_argument("--per-class", type=int, default=10, help="training pictures of each class")
    parser.add_argument("--variants", type=int, default=5, help="variants of each training picture")
    parser.add_argument("--rounds", type=int, default=10, help="draws of the training pictures")
    parser.add_argument("--out", type=Path, help="file that the table is added to")
    args = parser.parse_args(argv)
    x, labels = load_digits()
    vaes = {}
    for spec in args.vae:
        name, _, path = spec.rpartition("=")
        vaes[name or Path(path).name] = sd_vae.load_vae(path)
    scores = [
        _measure(Round(x, labels, args.per_class, seed), vaes, args.variants, lambda text: print(text, flush=True))
        for seed in range(args.rounds)
    ]
    title = f"{datetime.date.today().isoformat()}: {args.per_class} digits a class, {args.variants} variants of each"
    note = (
        f"Accuracy on the other {len(x) - 10 * args.per_class:,} digits, mean of {args.rounds} rounds; differences to "
        "no augmentation in percentage points, with 95% intervals."
    )
    table = to_markdown(scores, title, note)
    print(table)
    if args.out is not None:
        before = args.out.read_text(encoding="utf-8") + "\n" if args.out.exists() else "# Augmentation\n\n"
        write_text(args.out, before + table)


def _measure(
    round_: Round, vaes: Mapping[str, AutoencoderKL], num_variants: int, report: Callable[[str], None]
) -> Scores:
    """All arms of one round."""
    pictures: dict[str, Tensor | None] = {
        "none": None,
        "shifted and turned": torch.cat([shifted(round_.x, round_.seed, number) for number in range(num_variants)]),
    }
    for vae_name, vae in vaes.items():
        for arm_name, arm in ARMS.items():
            pictures[f"{vae_name}: {arm_name}"] = varied(vae, round_, arm, num_variants)
    scores = {
        (arm, name): value for arm, added in pictures.items() for name, value in accuracies(round_, added).items()
    }
    report(
        f"round {round_.seed}: "
        + ", ".join(f"{arm} {value:.3f}" for (arm, name), value in scores.items() if name[0] == "s")
    )
    return scores


def _seen(x: Tensor) -> NDArray[np.float32]:
    """What a classifier sees: (N, 16 * 16), grey."""
    return avg_pool2d(x.mean(dim=1, keepdim=True), x.shape[-1] // SEEN_SIDE).flatten(1).numpy()


def _interval(differences: Sequence[float]) -> str:
    """Mean and 95% interval, in percentage points."""
    from scipy import stats

    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{100 * mean:+.1f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * mean:+.1f} ±{100 * float(stats.t.ppf(0.975, len(differences) - 1)) * error:.1f}"


if __name__ == "__main__":
    main()
