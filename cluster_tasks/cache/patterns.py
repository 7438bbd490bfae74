"""Patterns of keys as Redis has them (``*``, ``?``, ``[ab]``, ``[^a]``, ``[a-c]``, a backslash before a character meant
as itself), for all kinds of cache alike."""

from __future__ import annotations

import re

SPECIAL = "*?[]\\"


def escape(text: str) -> str:
    """Return the pattern that matches ``text`` and nothing else."""
    return re.sub(r"([*?\[\]\\])", r"\\\1", text)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return what matches the whole of a key that ``pattern`` describes. Raises ValueError if it ends too early."""
    pieces, position = [""], 0
    while position < len(pattern):
        character, position = pattern[position], position + 1
        if character == "*":
            pieces.append("")
        elif character == "?":
            pieces[-1] += "."
        elif character == "[":
            characters, position = _characters(pattern, position)
            pieces[-1] += characters
        elif character == "\\":
            if position == len(pattern):
                raise ValueError(f"pattern {pattern!r} ends with a backslash: write two for one")
            pieces[-1] += re.escape(pattern[position])
            position += 1
        else:
            pieces[-1] += re.escape(character)
    return re.compile(_joined(pieces), re.DOTALL)


def beginning(pattern: str) -> str:
    """Return with what every key begins that ``pattern`` matches."""
    return re.split(r"[*?\[\\]", pattern, maxsplit=1)[0]


def _joined(pieces: list[str]) -> str:
    """Return the expression of pieces with stars between them, which takes no longer the more there are."""
    first, *others = pieces
    if not others:
        return first
    # Where a piece fits first is as good as any later place, for all pieces are of a fixed length: (?>) tries no other.
    between = "".join(f"(?>.*?{piece})" for piece in others[:-1] if piece)
    return f"{first}{between}.*{others[-1]}"


def _characters(pattern: str, position: int) -> tuple[str, int]:
    """Return the expression of what stands in brackets, and where it ends."""
    negated = pattern[position : position + 1] == "^"
    position += negated
    members = ""
    while position < len(pattern) and pattern[position] != "]":
        position += pattern[position] == "\\"
        low = pattern[position : position + 1]
        if pattern[position + 1 : position + 2] == "-" and pattern[position + 2 : position + 3] not in ("", "]"):
            low, high = sorted((low, pattern[position + 2]))
            members, position = members + f"{re.escape(low)}-{re.escape(high)}", position + 3
        else:
            members, position = members + re.escape(low), position + 1
    if position >= len(pattern):
        raise ValueError(f"pattern {pattern!r}: a [ is not closed; write \\[ for the character")
    if not members:
        return (r"[\s\S]" if negated else r"(?!)"), position + 1
    return f"[{'^' if negated else ''}{members}]", position + 1
