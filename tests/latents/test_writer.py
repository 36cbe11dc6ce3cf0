"""One shard: what is kept of a posterior, what is refused, what the files say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from synthetic_store import describe, item, moments_of, reject

from sd_vae.errors import UserError
from sd_vae.latents import LatentStore, ShardReader, ShardWriter
from sd_vae.latents.records import read_record


def _write(folder: Path, fill: Callable[[ShardWriter], None], **changes: Any) -> ShardReader:
    """The first shard of a new store."""
    store = LatentStore.create(folder, describe(**changes))
    with store.writer(0) as writer:
        fill(writer)
    return store.reader(read_record(folder, 0)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_writer_keeps_mean_and_logvar_rounded_to_nearest(dtype: str, tmp_path: Path) -> None:
    moments = moments_of(item(0))

    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), moments), dtype=dtype)

    mean, logvar = reader.latents(0)
    expected = moments.to(getattr(torch, dtype))
    assert torch.equal(mean, expected[:4])
    assert torch.equal(logvar, expected[4:])
    assert mean.dtype == expected.dtype


def test_writer_states_what_rounding_cost(tmp_path: Path) -> None:
    moments = [moments_of(item(position)).double() for position in (0, 1, 2)]

    def fill(writer: ShardWriter) -> None:
        for position, exact in enumerate(moments):
            writer.add(item(position), exact.float())

    record = _write(tmp_path / "store", fill).record

    errors = torch.cat([(exact.half().double() - exact)[:4].flatten() for exact in moments])
    assert record.rounding["mean"].count == errors.numel()
    assert record.rounding["mean"].max == pytest.approx(float(errors.abs().max()), rel=1e-12)
    # worst seen 2e-16: the sum of squares is in float64
    assert record.rounding["mean"].rms == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-12)


def test_writer_of_float32_loses_nothing(tmp_path: Path) -> None:
    record = _write(tmp_path / "s", lambda writer: writer.add(item(0), moments_of(item(0))), dtype="float32").record

    assert [(rounding.max, rounding.rms) for rounding in record.rounding.values()] == [(0.0, 0.0)] * 2


def test_writer_clamps_logvar(tmp_path: Path) -> None:
    moments = torch.cat([torch.full((4, 2, 2), 50.0), torch.full((2, 2, 2), 50.0), torch.full((2, 2, 2), -50.0)])

    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), moments))

    mean, logvar = reader.latents(0)
    assert mean.unique().tolist() == [50.0]
    assert logvar.unique().tolist() == [-30.0, 20.0]


def test_writer_of_mode_keeps_the_mean_alone(tmp_path: Path) -> None:
    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), moments_of(item(0))), content="mode")

    (mean,) = reader.latents(0)
    assert torch.equal(mean, moments_of(item(0))[:4].half())


def test_writer_of_samples_draws_by_seed_and_item_alone(tmp_path: Path) -> None:
    moments = moments_of(item(0))

    def fill(writer: ShardWriter) -> None:
        for one in (item(0), item(0, flipped=True), item(0, 1)):
            writer.add(one, moments)
        writer.add(item(1), moments)

    options = {"content": "sample", "dtype": "float32"}
    first = _write(tmp_path / "a", fill, seed=1, **options)
    second = _write(tmp_path / "b", lambda writer: writer.add(item(0), moments), seed=1, **options)
    other = _write(tmp_path / "c", lambda writer: writer.add(item(0), moments), seed=2, **options)

    draws = [first.latents(row)[0] for row in range(4)]
    assert torch.equal(draws[0], second.latents(0)[0])
    assert all(not torch.equal(draws[0], z) for z in (*draws[1:], other.latents(0)[0]))


def test_writer_of_samples_draws_from_the_posterior(tmp_path: Path) -> None:
    moments = torch.cat([torch.full((4, 64, 64), 3.0), torch.full((4, 64, 64), -2.0)])
    options = {"content": "sample", "seed": 0, "dtype": "float32"}

    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), moments), **options)

    (z,) = reader.latents(0)
    # 16384 draws of std e^-1: their mean is within 4 standard errors of 0.0029, their std within 4 of 0.0020
    assert float(z.mean()) == pytest.approx(3.0, abs=0.0115)
    assert float(z.std()) == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.0082)


def test_writer_saves_no_batch_behind_a_view(tmp_path: Path) -> None:
    batch = torch.zeros(1000, 8, 2, 2)

    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), batch[0]))

    assert reader.latents_path.stat().st_size < 1000  # the latent has 64 bytes, the rest is the header


def test_writer_takes_moments_that_need_gradients(tmp_path: Path) -> None:
    moments = moments_of(item(0)).requires_grad_()

    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), moments))

    assert not reader.latents(0)[0].requires_grad


def test_writer_says_raw_in_the_tensors_file(tmp_path: Path) -> None:
    reader = _write(tmp_path / "store", lambda writer: writer.add(item(0), moments_of(item(0))))

    with safe_open(reader.latents_path, "pt") as file:
        (text,) = file.metadata().values()
    metadata = json.loads(text)
    assert metadata["values"] == "raw z, not scaled"
    assert metadata["encoder"] == describe().encoder
    assert metadata["description"] == describe().digest


def test_reader_gives_the_items_back(tmp_path: Path) -> None:
    items = [item(0, columns={"caption": None, "tags": ["a", "b"]}), item(1, columns={"caption": "grün"})]

    def fill(writer: ShardWriter) -> None:
        for one in items:
            writer.add(one, moments_of(one))

    reader = _write(tmp_path / "store", fill)

    assert reader.item(0) == items[0]
    assert reader.item(1) == item(1, columns={"caption": "grün", "tags": None})


def test_writer_keeps_columns_called_like_the_stores_own(tmp_path: Path) -> None:
    one = item(0, columns={"id": 7, "source": "a catalogue"})

    reader = _write(tmp_path / "store", lambda writer: writer.add(one, moments_of(one)))

    assert reader.item(0) == one


def test_writer_of_rejects_alone_makes_an_empty_shard(tmp_path: Path) -> None:
    def fill(writer: ShardWriter) -> None:
        for position in range(4):
            writer.reject(reject(position))

    reader = _write(tmp_path / "store", fill)

    assert len(reader) == 0
    assert read_record(tmp_path / "store", 0)[1] == [reject(position) for position in range(4)]


def test_writer_leaves_no_shard_when_its_block_raises(tmp_path: Path) -> None:
    def fill(writer: ShardWriter) -> None:
        writer.add(item(0), moments_of(item(0)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "store", fill)

    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]


def test_writer_refuses_values_its_dtype_cannot_hold(tmp_path: Path) -> None:
    moments = torch.full((8, 2, 2), 7e4)

    with pytest.raises(UserError, match="the latent of picture 0 reaches 70000, which float16 cannot hold; store bf"):
        _write(tmp_path / "store", lambda writer: writer.add(item(0), moments))


def test_writer_refuses_columns_of_mixed_types(tmp_path: Path) -> None:
    def fill(writer: ShardWriter) -> None:
        writer.add(item(0, columns={"label": 1}), moments_of(item(0)))
        writer.add(item(1, columns={"label": "one"}), moments_of(item(1)))

    with pytest.raises(UserError, match="column 'label' of the records picture 0 to picture 1 mixes types"):
        _write(tmp_path / "store", fill)


def _fill_not_finite(writer: ShardWriter) -> None:
    writer.add(item(0), torch.full((8, 2, 2), torch.nan))


def _fill_another_channel_count(writer: ShardWriter) -> None:
    writer.add(item(0), torch.zeros(6, 2, 2))


def _fill_a_batch(writer: ShardWriter) -> None:
    writer.add(item(0), torch.zeros(1, 8, 2, 2))


def _fill_with_a_gap(writer: ShardWriter) -> None:
    writer.add(item(1), moments_of(item(1)))


def _fill_backwards(writer: ShardWriter) -> None:
    for position in (0, 1, 0):
        writer.add(item(position), moments_of(item(position)))


def _fill_too_far(writer: ShardWriter) -> None:
    for position in range(5):
        writer.add(item(position), moments_of(item(position)))


def _fill_mirrored_alone(writer: ShardWriter) -> None:
    writer.add(item(0, flipped=True), moments_of(item(0)))


def _fill_mirror_of_another(writer: ShardWriter) -> None:
    writer.add(item(0), moments_of(item(0)))
    writer.add(item(0, 1, flipped=True), moments_of(item(0)))


def _fill_mirror_of_another_size(writer: ShardWriter) -> None:
    writer.add(item(0), moments_of(item(0)))
    writer.add(item(0, flipped=True), torch.zeros(8, 3, 3))


def _reject_what_has_a_latent(writer: ShardWriter) -> None:
    writer.add(item(0), moments_of(item(0)))
    writer.reject(reject(0))


def test_writer_names_a_column_with_text_that_is_no_unicode(tmp_path: Path) -> None:
    def fill(writer: ShardWriter) -> None:
        for position in range(4):
            one = item(position, columns={"tags": ["fine", "\ud83d"]})
            writer.add(one, moments_of(one))

    with pytest.raises(
        UserError, match="column 'tags' of the records picture 0 to picture 3 holds text that is no Uni"
    ):
        _write(tmp_path / "store", fill)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (_fill_not_finite, "latent of picture 0 is not finite"),
        (_fill_another_channel_count, r"moments of shape \(6, 2, 2\) for C=4"),
        (_fill_a_batch, r"moments of shape \(1, 8, 2, 2\) for C=4"),
        (_fill_with_a_gap, "record 1 came where 0 was due"),
        (_fill_backwards, "record 0 came where 2 was due"),
        (_fill_too_far, "4 is another shard's"),
        (_fill_mirrored_alone, "picture 0 mirrored does not stand behind"),
        (_fill_mirror_of_another, "picture 0 view 1 mirrored does not stand behind"),
        (_fill_mirror_of_another_size, "picture 0 mirrored does not stand behind"),
        (_reject_what_has_a_latent, "picture 0 has a latent already"),
        (lambda writer: None, "shard 0 has no records"),
    ],
)
def test_writer_asserts(fill: Callable[[ShardWriter], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        _write(tmp_path / "store", fill)
