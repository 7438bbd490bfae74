"""How large a compressed body is, found out without unpacking more of it than is allowed."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from kombu import compression as kombus

from cluster_tasks.errors import PayloadTooLarge

DICTIONARY = 128 * 1024 * 1024
"""Bytes that lzma may use for itself; its largest preset takes 65 MiB. To zstd its library gives no more by default."""
STREAMS = 100
"""That may lie behind each other in a body: to unpack them takes the square of their number, empty ones too."""


class _Brotli:
    """Brotli's own, with the manners of the others. It knows one stream."""

    unused_data = b""

    def decompress(self, body: bytes, most: int) -> bytes:
        """Return the first bytes, ``most`` of them or some more. Raises what brotli does."""
        unpacked: bytes = kombus.brotli.Decompressor().process(body, output_buffer_limit=most)
        return unpacked


def _unpackers() -> dict[Any, Callable[[], Any]]:
    known: dict[Any, Callable[[], Any]] = {
        zlib.decompress: zlib.decompressobj,
        bz2.decompress: bz2.BZ2Decompressor,
        lzma.decompress: partial(lzma.LZMADecompressor, memlimit=DICTIONARY),
    }
    # Kombu has these where their packages are.
    if (zstd := getattr(kombus, "zstd", None)) is not None:
        known[zstd.decompress] = zstd.ZstdDecompressor
    # Before 1.2 it knows no limit.
    if hasattr(getattr(kombus.brotli, "Decompressor", None), "can_accept_more_data"):
        known[kombus.brotli.decompress] = _Brotli
    return known


_UNPACKERS = _unpackers()
"""By Kombu's decoder."""


def too_large(most: int) -> PayloadTooLarge:
    """The error of a message that has more than ``most`` bytes when it is unpacked, or too many streams."""
    return PayloadTooLarge(f"unpacked it would have more than {most} bytes, or it would take too long")


def unpacked_size(body: bytes, compression: str, most: int) -> int:
    """Return how many bytes a body has when it is unpacked, or, if they are more than ``most``, any number above that.

    So it does for one of more than ``STREAMS`` streams. Of what Kombu has itself no more is unpacked; methods that
    others have registered know no limit, and are measured afterwards. Raises what the method raises for a body that is
    none of its own, and LookupError for a method that is not known.
    """
    decoder = kombus.get_decoder(compression)
    if decoder not in _UNPACKERS:
        return len(decoder(body))
    size, streams, rest = 0, 0, body
    while rest and size <= most:
        if (streams := streams + 1) > STREAMS:
            return most + 1
        unpacker = _UNPACKERS[decoder]()
        try:
            size += len(unpacker.decompress(rest, most + 1 - size))
        except lzma.LZMAError:
            # It may want more memory than that.
            return most + 1
        # Several streams may lie behind each other. Of zlib's the first one alone is read.
        rest = b"" if decoder is zlib.decompress else unpacker.unused_data
    return size
