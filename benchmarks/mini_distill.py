"""Teach the distilled perceptual network what LPIPS says of damaged photos.

    python -m benchmarks.mini_distill ../mini_data/train --holdout ../mini_data/holdout --alex ALEXNET
        --squeeze SQUEEZENET --vae VAE [VAE ...] --out sd_vae/weights/distilled

The network begins with AlexNet's first two layers, which stay, and LPIPS' heads on them; it learns all heads and the
third layer.
Damage is that of `benchmarks.mini_distortions` and reconstructions of VAEs at several stages of training. Distances are
compared as logarithms, for whole crops and for each of 4x4 parts. As the network will be minimised, and a minimum is
where a taught distance can be wrong unnoticed, every other batch holds images that one step along the network's own
gradient has brought nearer in its eyes; LPIPS says what they are.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.mini_distortions import distort
from benchmarks.mini_release import write_sums
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.checkpoints.formats import write_safetensors
from sd_vae.data import DataConfig, open_source, training_loader
from sd_vae.files import atomic_file, make_folder
from sd_vae.losses import PerceptualConfig, build_perceptual
from sd_vae.losses.distilled import FILE_NAME, FeatureNet
from sd_vae.losses.perceptual import LPIPS

__all__ = [
    "begin_",
    "damage",
    "distance_parts",
    "distil",
    "log_error",
    "mislead",
    "rank_correlation",
    "save",
    "target_parts",
]

PARTS = 4
"""Parts of a crop in each direction that are compared on their own."""
FLOOR = 1e-3
"""Added to distances before their logarithm: below it they count as equal."""
TEACHERS = {"alex": 0.75, "squeeze": 0.25}
"""Which LPIPS counts how much; alex is the one that papers report."""


def distance_parts(net: FeatureNet, recon: Tensor, x: Tensor) -> Tensor:
    """Return the network's distance of each part of each image, (B, PARTS, PARTS); their mean is that of the image."""
    maps = net.compare(net(recon), net(x))
    return torch.stack([F.adaptive_avg_pool2d(each, PARTS) for each in maps]).sum(dim=0)


@torch.no_grad()
def target_parts(teachers: dict[str, LPIPS], recon: Tensor, x: Tensor) -> Tensor:
    """Return the weighted LPIPS of each part of each image, (B, PARTS, PARTS)."""
    total = torch.zeros(len(x), PARTS, PARTS, device=x.device)
    for name, teacher in teachers.items():
        maps = [F.adaptive_avg_pool2d(each, PARTS) for each in teacher.cell_distances(recon, x)]
        total += TEACHERS[name] * torch.stack(maps).sum(dim=0)
    return total / sum(TEACHERS[name] for name in teachers)


def log_error(ours: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of logarithms, of images and of their parts, a scalar."""
    whole = _log(ours.mean(dim=(1, 2))) - _log(target.mean(dim=(1, 2)))
    parts = _log(ours) - _log(target)
    return whole.square().mean() + 0.5 * parts.square().mean()


def _log(distance: Tensor) -> Tensor:
    return (distance + FLOOR).log()


@torch.no_grad()
def damage(x: Tensor, vaes: Sequence[AutoencoderKL], generator: torch.Generator) -> Tensor:
    """Return images that are worse than x: half of the time by a distortion, half by a VAE where there is one."""
    if vaes and float(torch.rand((), generator=generator)) < 0.5:
        vae = vaes[int(torch.randint(len(vaes), (), generator=generator))]
        return vae(x).sample.clamp(-1, 1)
    return distort(x, generator)[0]


def mislead(net: FeatureNet, recon: Tensor, x: Tensor, step: float) -> Tensor:
    """Return images that the network holds to be nearer to x: one step against the sign of its gradient.

    Args:
        net: The network, left as it is.
        recon: Images (B, 3, H, W).
        x: What they are compared with.
        step: Change of every value.
    """
    moved = recon.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(distance_parts(net, moved, x).sum(), moved)
    return (recon - step * gradient.sign()).clamp(-1, 1)


@torch.no_grad()
def begin_(net: FeatureNet, teacher: LPIPS) -> None:
    """Give a network the first two layers of LPIPS-alex, which no longer train, and their heads, which do."""
    layers = [each for each in teacher.model.net.modules() if isinstance(each, torch.nn.Conv2d)]
    for own, other in zip((net.first, net.second), layers, strict=False):
        own.load_state_dict(other.state_dict())
        own.requires_grad_(False)
    for own_head, other_head in zip(list(net.heads)[:2], teacher.model.lins, strict=False):
        wanted = other_head.model[-1].weight.flatten().clamp_min(1e-4)
        own_head.copy_(wanted.expm1().log())  # what softplus undoes


def distil(
    net: FeatureNet,
    batches: Iterator[Tensor],
    teachers: dict[str, LPIPS],
    vaes: Sequence[AutoencoderKL],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
) -> Iterator[float]:
    """Train the network in place; yield the loss of every step.

    Args:
        net: The network, on the device of all.
        batches: Photos (B, 3, H, W) in [-1, 1].
        teachers: LPIPS by the name of its backbone.
        vaes: Whose reconstructions are among the damage.
        steps: Optimizer steps; the learning rate falls to 0 along half a cosine.
        lr: Learning rate at the beginning.
        seed: Of the damage.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = next(batches)
        recon = damage(x, vaes, generator)
        if step % 2:
            strength = 0.002 * 20 ** float(torch.rand((), generator=generator))
            recon = mislead(net, recon, x, strength)
        loss = log_error(distance_parts(net, recon, x), target_parts(teachers, recon, x))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


@torch.no_grad()
def rank_correlation(
    net: FeatureNet, teacher: LPIPS, photos: Sequence[Tensor], vaes: Sequence[AutoencoderKL], *, seed: int = 1
) -> float:
    """Return Spearman's rank correlation with LPIPS over photos, four times damaged each."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = [], []
    for x in photos:
        for _ in range(4):
            recon = damage(x, vaes, generator)
            ours += distance_parts(net, recon, x).mean(dim=(1, 2)).tolist()
            theirs += teacher(recon, x).tolist()
    return float(spearmanr(ours, theirs).statistic)


def save(net: FeatureNet, folder: Path) -> None:
    """Write the network as it ships, in fp16, with its digest."""
    make_folder(folder)
    tensors = {name: tensor.half().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with atomic_file(folder / FILE_NAME) as temporary:
        write_safetensors(temporary, tensors)
    write_sums(folder)


def main() -> None:
    """Distil, say how well it went, and write the weights in fp16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="to train on: a folder or parquet files")
    for name in ("holdout", "alex", "squeeze"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--vae", nargs="*", default=[], help="folders of VAEs at several stages of training")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements on held-out photos")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    teachers = {}
    for name in TEACHERS:
        teacher = build_perceptual(PerceptualConfig(net=name, backbone=getattr(args, name)))  # type: ignore[arg-type]
        assert isinstance(teacher, LPIPS), "alex and squeeze are LPIPS"
        teachers[name] = teacher.to(device)
    vaes = [load_vae(path, device=device) for path in args.vae]
    data = DataConfig(train=args.photos, size=args.size, crop_scale=(0.3, 1.0), num_workers=args.workers)
    loader = training_loader(open_source(args.photos), data, batch_size=args.batch_size, seed=0)
    held_out = DataConfig(train=args.holdout, size=256, crop_scale=(0.8, 1.0), flip=False, num_workers=0)
    source = open_source(args.holdout)
    crops = iter(training_loader(source, held_out, batch_size=1, seed=0))
    photos = [next(crops).x.to(device) for _ in range(len(source))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeatureNet().to(device).to(memory_format=torch.channels_last)
    begin_(net, teachers["alex"])
    batches = (batch.x.to(device) for batch in loader)
    losses = []
    for loss in distil(net, batches, teachers, vaes, steps=args.steps, lr=args.lr):
        losses.append(loss)
        if len(losses) % args.every == 0 or len(losses) == args.steps:
            correlation = rank_correlation(net, teachers["alex"], photos, vaes)
            recent = sum(losses[-args.every :]) / len(losses[-args.every :])
            print(f"step {len(losses)}: loss {recent:.4f}, rank correlation with alex {correlation:.4f}", flush=True)
            save(net, args.out)


if __name__ == "__main__":
    main()
