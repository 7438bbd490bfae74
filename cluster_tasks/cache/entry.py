"""What a cache holds, and how it is written down: a head, a checksum and the value.

No clock of a host goes into it: how old an entry is follows from how long Redis is still to keep it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

MAGIC, VERSION = b"ct", 1
NOTHING = 1
"""Flag of an entry that says: there is no such thing."""
_HEAD = struct.Struct(">2sBBIQQQ16s")
_CHECKED_FROM = 8
"""What follows the checksum in the head is covered by it, as are the key and the value."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value with all that is known of it. Times are in seconds."""

    value: bytes | None
    """None: it is known that there is no such thing (a negative result)."""
    ttl_s: float
    """How long it is fresh, from when it was written."""
    left_s: float
    """How long it is fresh from now on; 0 or less: it is stale."""
    kept_s: float = 0.0
    """How long it is kept after that, for those who rather take a stale value than none."""
    cost_s: float = 0.0
    """What it took to compute it."""
    generation: str = ""
    """Of its namespace, when the computation began."""

    @property
    def is_fresh(self) -> bool:
        """Whether it may be used as it is."""
        return self.left_s > 0

    @property
    def age_s(self) -> float:
        """Since when it has been written, unless its TTL was changed by ``expire``."""
        return max(0.0, self.ttl_s - self.left_s)

    def after(self, passed_s: float) -> Entry:
        """The same entry so much later."""
        # Every hit in the process comes here, and replace() takes more than twice as long.
        return Entry(self.value, self.ttl_s, self.left_s - passed_s, self.kept_s, self.cost_s, self.generation)


def as_bytes(key: str, value: object) -> bytes | None:
    """Return the value of a key as it is kept: of what may be changed later, a copy.

    Raises TypeError for anything but bytes, bytearray, memoryview and None.
    """
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"key={key[:60]!r} of a cache: expected bytes as its value, not {type(value).__name__}")


def pack(key: bytes, entry: Entry) -> bytes:
    """Write an entry down as the value of ``key``."""
    value = entry.value or b""
    rest = _HEAD.pack(
        MAGIC, VERSION, NOTHING if entry.value is None else 0, 0, _milliseconds(entry.ttl_s),
        _milliseconds(entry.kept_s), round(entry.cost_s * 1e6), entry.generation.encode(),
    )  # fmt: skip
    checksum = _checksum(key, rest, value)
    return b"".join((rest[:4], checksum.to_bytes(4), rest[_CHECKED_FROM:], value))


def unpack(key: bytes, packed: bytes, lives_s: float) -> Entry | None:
    """Read what ``pack`` wrote for ``key`` and Redis keeps for ``lives_s``.

    None for anything else: truncated, of another key, changed on the way, of another version, or not ours at all.
    """
    if len(packed) < _HEAD.size:
        return None
    magic, version, flags, checksum, ttl_ms, kept_ms, cost_us, generation = _HEAD.unpack_from(packed)
    value = packed[_HEAD.size :]
    if (magic, version) != (MAGIC, VERSION) or checksum != _checksum(key, packed[: _HEAD.size], value):
        return None
    return Entry(
        value=None if flags & NOTHING else value,
        ttl_s=ttl_ms / 1000,
        left_s=lives_s - kept_ms / 1000,
        kept_s=kept_ms / 1000,
        cost_s=cost_us / 1e6,
        generation=generation.rstrip(b"\0").decode(),
    )


def _checksum(key: bytes, head: bytes, value: bytes) -> int:
    # The flags stand before the checksum, with the version.
    return zlib.crc32(value, zlib.crc32(head[_CHECKED_FROM:], zlib.crc32(head[:4] + key)))


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
