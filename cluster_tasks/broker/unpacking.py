"""How large a compressed body is, found out without unpacking more of it than is allowed."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from kombu.compression import get_decoder

DICTIONARY = 128 * 1024 * 1024
"""Bytes that lzma may use for itself; its largest preset takes 65 MiB."""
_UNPACKERS: dict[Any, Callable[[], Any]] = {
    zlib.decompress: zlib.decompressobj,
    bz2.decompress: bz2.BZ2Decompressor,
    lzma.decompress: partial(lzma.LZMADecompressor, memlimit=DICTIONARY),
}
"""By Kombu's decoder."""


def unpacked_size(body: bytes, compression: str, most: int) -> int:
    """Return how many bytes a body has when it is unpacked, or, if they are more than ``most``, any number above that.

    Of zlib, bzip2 and lzma no more is unpacked; other methods know no limit, and are measured afterwards. Raises what
    the method raises for a body that is none of its own, and LookupError for a method that is not known.
    """
    decoder = get_decoder(compression)
    if decoder not in _UNPACKERS:
        return len(decoder(body))
    size, rest = 0, body
    while rest and size <= most:
        unpacker = _UNPACKERS[decoder]()
        try:
            size += len(unpacker.decompress(rest, most + 1 - size))
        except lzma.LZMAError:
            # It may want more memory than that.
            return most + 1
        # Several streams may lie behind each other. Of zlib's the first one alone is read.
        rest = b"" if decoder is zlib.decompress else unpacker.unused_data
    return size
