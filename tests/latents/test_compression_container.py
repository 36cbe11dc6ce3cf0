"""The file of a compressed picture: what a reader refuses, and that nothing crashes, hangs or grows."""

import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from compression_cases import container

from sd_vae.errors import UserError
from sd_vae.latents.compression import Container, read

HEAD_SIZE = 8 + 1 + 1 + 1 + 1 + 4 + 4 + 1 + 1 + 2 + 4 + 16
NOT_OURS = "is not a compressed picture of sd-vae"


def with_sums(data: bytes, steps: int = 4) -> bytes:
    """The file with checksums that are right, as somebody would write it who means harm."""
    head = data[: HEAD_SIZE + 4 * steps]
    body = data[len(head) + 4 : -4]
    return head + struct.pack("<I", zlib.crc32(head)) + body + struct.pack("<I", zlib.crc32(body))


def changed(data: bytes, at: int, kind: str, *values: float) -> bytes:
    """The file with fields of its header set, and right checksums."""
    end = at + struct.calcsize(kind)
    return with_sums(data[:at] + struct.pack(kind, *values) + data[end:])


def test_container_round_trip_keeps_everything() -> None:
    given = container(note="colours converted from 'Display P3' to sRGB")

    again = Container.from_bytes(given.to_bytes())

    assert replace(again, model=given.model) == given
    assert again.model.to_bytes() == given.model.to_bytes()
    assert again.shape == (4, 11, 15)


def test_read_gives_multiples_of_the_steps() -> None:
    held = read(replace(container(), steps=(0.5, 1.0, 2.0, 4.0)).to_bytes())

    for plane, step in zip(held.z[0], (0.5, 1.0, 2.0, 4.0), strict=True):
        assert bool((plane % step == 0).all())
    assert (held.width, held.height, held.z.shape) == (30, 22, (1, 4, 11, 15))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: b"", NOT_OURS),
        (lambda data: b"\x89PNG\r\n\x1a\n" + data[8:], NOT_OURS),
        (lambda data: data.replace(b"\r\n", b"\n"), "or was sent as text"),
        (lambda data: data[:8], "is cut off: it has 8 bytes"),
        (lambda data: data[:8] + b"\2" + data[9:], "format version 2, this sd-vae reads 1"),
        (lambda data: data[:HEAD_SIZE], "is cut off"),
        (lambda data: data[:-1], "is cut off"),
        (lambda data: data + b"\0", "goes on after its end"),
        (lambda data: data[:13] + bytes([data[13] ^ 1]) + data[14:], "the checksum of its header is wrong"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 128]) + data[-8:], "the checksum of its latents is wrong"),
        (lambda data: changed(data, 12, "<I", 1 << 31), "2147483648x22 pixels and .* numbers, more than"),
        (lambda data: changed(data, 11, "<B", 1), "flags 0x1"),
        (
            lambda data: changed(data, 10, "<BBIIBB", 1, 0, 8000, 8000, 0, 0),
            "8000x8000 pixels and 256000000 numbers, more than the 89478485 that",
        ),
        (lambda data: changed(data, 12, "<I", 0), "a padding of|a picture of 0x22"),
        (lambda data: changed(data, 10, "<B", 0), "a factor of 0"),
        (lambda data: changed(data, 10, "<B", 65), "a factor of 65"),
        (lambda data: changed(data, 20, "<B", 1), "a padding of 1 and 0 pixels"),
        (lambda data: changed(data, HEAD_SIZE, "<f", float("nan")), "steps that are not finite"),
        (lambda data: changed(data, HEAD_SIZE, "<f", -1.0), "steps that are not finite and above 0"),
        (lambda data: with_sums(data[:-8] + b"\0\0\0\0" + data[-4:]), "breaks the format"),
        (lambda data: with_sums(data[:-5] + data[-4:]), "is cut off"),
    ],
)  # fmt: skip
def test_read_refuses(make, words) -> None:
    with pytest.raises(UserError, match=words):
        read(make(container().to_bytes()), name="a.svae")


@pytest.mark.parametrize(("size_at", "kind", "words"), [(22, "<H", "a note of 1028 bytes"), (24, "<I", "not a mult")])
def test_read_refuses_lengths_that_no_writer_gives(size_at, kind, words) -> None:
    data = container().to_bytes()
    (size,) = struct.unpack_from(kind, data, size_at)
    more = 1028 if kind == "<H" else 2

    longer = data[:-4] + bytes(more) + data[-4:]

    with pytest.raises(UserError, match=words):
        read(changed(longer, size_at, kind, size + more))


def test_read_refuses_no_channels() -> None:
    head = bytearray(container().to_bytes()[:HEAD_SIZE])
    head[9] = 0
    head[22:28] = bytes(6)

    data = bytes(head) + struct.pack("<I", zlib.crc32(head)) + bytes(4) + struct.pack("<I", zlib.crc32(bytes(4)))

    with pytest.raises(UserError, match="0 latent channels, of at most 64"):
        read(data)


def test_every_flipped_bit_is_noticed() -> None:
    data = container(width=8, height=8, channels=1).to_bytes()

    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError):
            read(bytes(broken))


def test_every_cut_is_noticed() -> None:
    data = container(width=8, height=8, channels=1).to_bytes()

    for length in range(len(data)):
        with pytest.raises(UserError):
            read(data[:length])


@pytest.mark.parametrize("num_files", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_neither_crash_nor_hang_nor_grow(num_files) -> None:
    random = np.random.default_rng(num_files)
    data = container().to_bytes()
    limit = 1 << 16
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    slowest = 0.0

    for index in range(num_files):
        broken = _mutated(data, random, keep_sums=index % 2 == 0)
        began = time.perf_counter()
        try:
            read(broken, max_pixels=limit)
        except UserError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
        slowest = max(slowest, time.perf_counter() - began)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # Half of the files have right checksums, so that what lies behind them is reached; some of these hold a picture.
    assert outcomes[False] > num_files / 2
    assert outcomes[True] > 0
    assert peak < 8 * 2**20  # worst seen 0.14 MiB over 3,000 files; 65536 pixels of factor 1 would be 1 MiB a plane
    assert slowest < 30  # worst seen 0.14 s of CPU; the machine may be busy


def _mutated(data: bytes, random: np.random.Generator, *, keep_sums: bool) -> bytes:
    """A file with some bytes changed, inserted or removed, or cut; with right checksums or those that it had."""
    broken = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(len(broken)))
        match random.integers(5):
            case 0:
                broken[at] ^= 1 << int(random.integers(8))
            case 1:
                broken[at] = int(random.integers(256))
            case 2:
                broken[at:at] = random.bytes(int(random.integers(1, 9)))
            case 3:
                del broken[at : at + int(random.integers(1, 9))]
            case _:
                broken[8 + at % (HEAD_SIZE - 8)] = int(random.integers(256))
    if random.integers(8) == 0:
        del broken[int(random.integers(len(broken))) :]
    if keep_sums or len(broken) < HEAD_SIZE + 8:
        return bytes(broken)
    broken[:9] = data[:9]
    return with_sums(bytes(broken), steps=broken[9])
