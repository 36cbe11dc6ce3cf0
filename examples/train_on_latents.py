"""Train a small class-conditional diffusion model on a store of latents, sample it, and decode with our VAE.

    python examples/train_on_latents.py STORE VAE --out grid.png

STORE has a column `label` (sd-vae encode takes the names of class folders for it); a row of the grid is a class. The
UNet is diffusers' and learns the noise. One picture in ten comes without its class, so that sampling can be guided
towards a class (Ho and Salimans, arXiv 2207.12598).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from diffusers import DDIMScheduler, UNet2DModel

import sd_vae
from sd_vae.latents import LatentDataset
from sd_vae.latents.preview import contact_sheet


@dataclass
class Args:
    """Train, sample, decode."""

    store: Annotated[Path, tyro.conf.Positional]
    vae: Annotated[str, tyro.conf.Positional]
    out: Path
    steps: int = 300
    batch_size: int = 16
    width: int = 64
    samples_per_class: int = 4
    guidance: float = 2.0
    seed: int = 0


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    dataset = LatentDataset(args.store, scaled=True, columns=["label"])  # unit variance, a new draw each epoch
    labels = dataset.column("label")
    classes = sorted(set(labels))
    nobody = len(classes)  # the class of pictures whose class is not told
    size, channels = dataset.sizes[0].tolist(), dataset.description.vae.latent_channels
    widths, attending = (args.width, 2 * args.width), ("DownBlock2D", "AttnDownBlock2D")
    unet = UNet2DModel(size, channels, channels, block_out_channels=widths, down_block_types=attending,
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=nobody + 1)  # fmt: skip
    scheduler, optimizer = DDIMScheduler(), torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for step in range(args.steps):
        dataset.set_epoch(step)
        chosen = torch.randint(len(dataset), (args.batch_size,)).tolist()
        latents = torch.stack([dataset[index]["latents"] for index in chosen])
        told = torch.tensor([classes.index(labels[index]) for index in chosen])
        told[torch.rand(len(told)) < 0.1] = nobody
        noise, t = torch.randn_like(latents), torch.randint(1000, (len(latents),))
        loss = (unet(scheduler.add_noise(latents, noise, t), t, told).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    told = torch.arange(nobody).repeat_interleave(args.samples_per_class)
    latents = torch.randn(len(told), channels, *size)
    scheduler.set_timesteps(30)
    with torch.no_grad():
        for t in scheduler.timesteps:
            ours, anybodys = (unet(latents, t, given).sample for given in (told, torch.full_like(told, nobody)))
            latents = scheduler.step(anybodys + args.guidance * (ours - anybodys), t, latents).prev_sample
        offset, factor = (torch.tensor(values).view(-1, 1, 1) for values in dataset.description.affine)
        vae = sd_vae.load_vae(args.vae)
        pictures = [sd_vae.to_pil(vae.decode((one / factor + offset)[None]).sample) for one in latents]
    contact_sheet(pictures, columns=args.samples_per_class).save(args.out)
    print(f"{args.out}: a row each of {', '.join(map(str, classes))}")


if __name__ == "__main__":
    main(tyro.cli(Args))
