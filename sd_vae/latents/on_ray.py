"""The same encode on a Ray cluster: Ray Data hands shards to actors, which write them where the others see them.

A shard is a unit of work without a result but its files, so that a lost worker costs the shard that it was making: Ray
starts another, which makes that shard anew, byte for byte.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from sd_vae.errors import UserError
from sd_vae.latents.share import Progress, Share, Step

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.data import Records
    from sd_vae.latents.encode import EncodeConfig
    from sd_vae.latents.store import LatentStore

__all__ = ["encode_on_ray"]


def encode_on_ray(
    vae: AutoencoderKL, records: Records, store: LatentStore, config: EncodeConfig, progress: Progress
) -> int:
    """Make the unfinished shards of a store on Ray and return the number of their records.

    One actor a CPU, or a GPU where the VAE is on one. A cluster that `ray.init` finds is used, else one is started on
    this machine for as long as this takes.

    Args:
        vae: The model; every actor gets a copy.
        records: The pictures; every node reads them where they are here.
        store: The store; every node writes to its folder.
        config: As for `encode`; an actor without a setting encodes one picture at a time.
        progress: Called at the beginning and after each shard.

    Raises:
        UserError: Ray is not installed, the data set is a stream, or whatever a shard ran into.
    """
    try:
        import ray
    except ImportError:
        raise UserError('--engine ray needs ray, which is not installed; pip install "sd-vae[ray]".') from None
    if records.num_records is None:
        raise UserError(
            f"{records.spec} is streamed, and ray hands out shards of a data set whose length is known; leave "
            "--streaming or --engine ray out."
        )
    shards = store.unfinished(records.num_records)
    num_records = Share(records, shards, store.description.shard_items).num_records
    progress(Step(0, num_records, 0))
    if not shards:
        return 0
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        num_done = num_rejects = 0
        for row in _results(vae, records, store, config, shards):
            if row["error"]:
                raise UserError(row["error"])
            num_done, num_rejects = num_done + row["num_done"], num_rejects + row["num_rejects"]
            progress(Step(num_done, num_records, num_rejects))
        return num_done
    finally:
        if is_ours:
            ray.shutdown()


def _results(vae: AutoencoderKL, records: Records, store: LatentStore, config: EncodeConfig, shards: list[int]) -> Any:
    """What the actors say of each shard, as they finish."""
    import ray
    import ray.data

    resource = "GPU" if vae.device.type == "cuda" else "CPU"
    num_actors = max(1, min(len(shards), int(ray.cluster_resources().get(resource, 1))))
    job = ray.put((copy.deepcopy(vae).cpu(), vae.device.type, records, str(store.folder), config))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return (
        ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        .map(
            _ShardMaker,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=1 if resource == "GPU" else 0,
        )
        .iter_rows()
    )


class _ShardMaker:
    """An actor: makes one shard after another."""

    def __init__(self, job: Any) -> None:
        import ray

        vae, device, self.records, folder, self.config = ray.get(job)
        from sd_vae.latents.encode import open_store

        self.vae = vae.to(device)
        self.store = open_store(self.vae, self.records, folder, self.config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return how many records a shard has and how many are rejected, or the user's error."""
        from sd_vae.latents.encode import run_share

        last = Step(0, None, 0)

        def note(step: Step) -> None:
            nonlocal last
            last = step

        share = Share(self.records, [row["shard"]], self.store.description.shard_items)
        try:
            run_share(self.vae, share, self.store, self.config, note)
        except UserError as error:  # as a value: raised, it would arrive inside an error of Ray's
            return {"num_done": 0, "num_rejects": 0, "error": str(error)}
        return {"num_done": last.num_done, "num_rejects": last.num_rejects, "error": ""}
