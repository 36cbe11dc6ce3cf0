"""Whole numbers to bytes and back: exact, small, the same order whatever the shape."""

import sys

import numpy as np
import pytest
from compression_cases import numbers

from sd_vae.errors import UserError
from sd_vae.latents.compression.entropy import NUM_CLASSES, WIDTHS, Model, decode_lattice, encode_lattice, model_size
from sd_vae.latents.compression.prediction import NUM_STAGES, passes

SHAPES = [(4, 64, 48), (1, 1, 1), (3, 1, 7), (2, 9, 1), (1, 3, 5), (4, 33, 70), (16, 40, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_lattice_gives_back_every_number(shape) -> None:
    values = numbers(*shape)

    model, code = encode_lattice(values)

    again = Model.from_bytes(model.to_bytes(), shape[0])
    np.testing.assert_array_equal(decode_lattice(again, code, shape), values)


def test_decode_lattice_takes_the_extremes() -> None:
    values = np.array([[[-16384, 16384], [0, 16384]]], np.int32)

    model, code = encode_lattice(values)

    np.testing.assert_array_equal(decode_lattice(model, code, values.shape), values)


@pytest.mark.parametrize("shape", SHAPES)
def test_passes_visit_each_cell_once(shape) -> None:
    visits = np.zeros(shape[1:], int)

    for cells in passes(*shape[1:]):
        visits[cells.rows, cells.columns] += 1

    np.testing.assert_array_equal(visits, 1)


def test_encode_lattice_needs_fewer_bits_than_each_channels_histogram() -> None:
    values = numbers(4, 64, 64)
    entropy = 0.0
    for channel in values:
        shares = np.unique(channel, return_counts=True)[1] / channel.size
        entropy -= float((shares * np.log2(shares)).sum()) * channel.size

    _, code = encode_lattice(values)

    # measured 0.56; a coder that ignored its predictions would need all of them
    assert 8 * len(code) < 0.6 * entropy


def test_encode_lattice_uses_what_earlier_channels_say() -> None:
    first = np.random.default_rng(0).integers(-20, 20, (1, 32, 32)).astype(np.int32)

    alone = len(encode_lattice(first)[1])
    twice = len(encode_lattice(np.concatenate([first, -first]))[1])

    # measured 1.15; 2 without the other channel's misses
    assert twice < 1.3 * alone


def test_widths_are_exact_in_binary() -> None:
    assert all((width * 32).is_integer() for width in WIDTHS.tolist())
    assert (np.diff(WIDTHS) > 0).all()


def test_model_refuses_a_width_outside_the_table() -> None:
    data = bytearray(encode_lattice(numbers(1, 4, 4))[0].to_bytes())
    assert len(data) == model_size(1)

    data[-4 - NUM_STAGES * NUM_CLASSES] = len(WIDTHS)

    with pytest.raises(ValueError, match="width 64 of 64"):
        Model.from_bytes(bytes(data), 1)


def test_model_refuses_a_range_that_is_none() -> None:
    data = encode_lattice(numbers(1, 4, 4))[0].to_bytes()[:-4] + np.array([5, 4], "<i2").tobytes()

    with pytest.raises(ValueError, match="numbers from 5 to 4"):
        Model.from_bytes(data, 1)


def test_decode_lattice_refuses_a_code_that_goes_on() -> None:
    model, code = encode_lattice(numbers(1, 4, 4))

    with pytest.raises(ValueError, match="goes on after the last number"):
        decode_lattice(model, b"\1\0\0\0" * 8 + code, (1, 4, 4))


def test_encode_lattice_names_the_extra_without_the_coder(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)

    with pytest.raises(UserError, match=r"pip install \"sd-vae\[compress\]\""):
        encode_lattice(numbers(1, 4, 4))
