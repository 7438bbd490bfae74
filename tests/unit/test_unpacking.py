"""Compressed bodies are measured, and not unpacked further than they may be."""

from __future__ import annotations

import lzma
import tracemalloc
import zlib

import pytest
from kombu import compression
from kombu.compression import compress

from cluster_tasks.broker.unpacking import DICTIONARY, STREAMS, unpacked_size

MOST = 100_000
IN_STREAMS = ["bzip2", "lzma"]
"""Of these, streams may lie behind each other."""
METHODS = ["zlib", *IN_STREAMS]
# Kombu has them where their packages are.
if "application/zstd" in compression.encoders():
    IN_STREAMS.append("zstd")
    METHODS.append("zstd")
if "application/x-brotli" in compression.encoders():
    METHODS.append("brotli")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1, 5_000, MOST])
def test_a_body_that_may_be_that_large_is_measured(method: str, size: int) -> None:
    assert unpacked_size(compress(b"x" * size, method)[0], method, MOST) == size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [MOST + 1, 200 * MOST])
def test_of_one_that_is_too_large_no_more_is_unpacked_than_tells_that(method: str, size: int) -> None:
    packed, content_type = compress(b"x" * size, method)
    tracemalloc.start()
    try:
        assert unpacked_size(packed, content_type, MOST) > MOST
        # The dictionary of lzma has 8 MiB.
        assert tracemalloc.get_traced_memory()[1] < 100 * MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", IN_STREAMS)
def test_streams_behind_each_other_are_measured_together(method: str) -> None:
    part = compress(b"x" * (MOST // 2), method)[0]
    assert unpacked_size(part * 2, method, MOST) == MOST
    assert unpacked_size(part * 3, method, MOST) > MOST


@pytest.mark.parametrize("method", IN_STREAMS)
def test_a_body_of_very_many_streams_is_too_large(method: str) -> None:
    # To unpack n of them, empty ones too, takes the square of n: what is behind each one is copied.
    part = compress(b"", method)[0]
    assert unpacked_size(part * STREAMS, method, MOST) == 0
    assert unpacked_size(part * (STREAMS + 1), method, MOST) > MOST


def test_a_body_that_takes_much_memory_to_be_unpacked_is_too_large() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2 * DICTIONARY}]
    assert unpacked_size(lzma.compress(b"x", filters=filters), "lzma", MOST) > MOST


def test_a_method_of_ones_own_is_measured_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compression._decoders, "own", lambda body: body * 3)
    assert unpacked_size(b"xx", "own", MOST) == 6


def test_what_cannot_be_unpacked_is_an_error() -> None:
    with pytest.raises(zlib.error):
        unpacked_size(b"rubbish", "zlib", MOST)
    with pytest.raises(LookupError):
        unpacked_size(b"", "unknown", MOST)
