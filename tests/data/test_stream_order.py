"""The order of training over one source and a mixture of several."""

from collections import Counter

import pytest

from sd_vae.data.stream_order import MixtureOrder, ShardOrder
from sd_vae.errors import UserError


@pytest.mark.parametrize(("sizes", "window"), [((3, 4, 2), 4), ((1,) * 9, 2), ((9,), 4), ((3, 0, 6), 100), ((3, 6), 0)])
def test_shard_order_gives_every_picture_once_an_epoch(sizes, window):
    order = ShardOrder(5, 0, sizes, window)

    found = [order.at(position) for position in range(27)]

    assert [epoch for epoch, _ in found] == [0] * 9 + [1] * 9 + [2] * 9
    epochs = [[picture for _, picture in found[start : start + 9]] for start in (0, 9, 18)]
    assert [sorted(pictures) for pictures in epochs] == [list(range(9))] * 3
    assert epochs[0] != epochs[1]


def test_shard_order_needs_no_position_before():
    order = ShardOrder(5, 0, (300, 400, 200), 64)
    whole = [order.at(position) for position in range(2000)]

    assert [ShardOrder(5, 0, (300, 400, 200), 64).at(position) for position in (0, 899, 900, 1999)] == [
        whole[position] for position in (0, 899, 900, 1999)
    ]


def test_shard_order_reads_within_a_window_from_few_shards():
    order = ShardOrder(5, 0, (100,) * 50, 200)

    shards = [{order.at(position)[1] // 100 for position in range(start, start + 200)} for start in range(0, 5000, 200)]

    assert max(len(found) for found in shards) == 2
    assert [sorted(found) for found in shards] != [[2 * n, 2 * n + 1] for n in range(25)]


def test_one_shard_is_ordered_as_a_folder_always_was():
    from sd_vae.data import epoch_permutation

    order = ShardOrder(5, 0, (50,), 8)

    assert [order.at(position)[1] for position in range(50)] == epoch_permutation(5, 0, 50).tolist()


def test_mixture_keeps_the_shares_and_leaves_no_position_of_a_source_out():
    order = MixtureOrder(3, (0.7, 0.2, 0.1))

    places = [order.at(sample) for sample in range(5120)]

    counts = Counter(place.source for place in places)
    assert [counts[source] for source in range(3)] == pytest.approx([3584, 1024, 512], abs=1)
    for source in range(3):
        positions = [place.position for place in places if place.source == source]
        assert positions == list(range(len(positions)))


def test_mixture_is_shuffled_and_needs_no_position_before():
    whole = [MixtureOrder(3, (1, 1)).at(sample) for sample in range(3000)]

    assert MixtureOrder(3, (1, 1)).at(2999) == whole[2999]
    assert len({tuple(place.source for place in whole[n : n + 8]) for n in range(0, 800, 8)}) > 50


def test_mixture_refuses_a_weight_of_nothing():
    with pytest.raises(UserError, match=r"data.weights is \[1, 0\], each must be a finite number above 0"):
        MixtureOrder(0, (1, 0))
