"""Sizes, rates and durations as people write them: parsing and formatting, no I/O.

Units of size are powers of 1024. Every `format_*` result is accepted by the matching `parse_*`, zero sizes
and rates excepted: those can be shown but not asked for.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

SIZE_ACCEPTS = "a number above zero with an optional suffix K, M, G or T (powers of 1024), such as 512M or 1.5GiB"
RATE_ACCEPTS = (
    "bytes per second: a number above zero with an optional suffix K, M, G or T (powers of 1024), "
    "such as 100M or 1.5GiB/s"
)
DURATION_ACCEPTS = "a number of seconds, or days, hours, minutes and seconds, such as 90, 90s, 5m, 1h30m or 7d"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LARGEST = (1 << 63) - 1  # what a file offset can hold

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SIZE = re.compile(rf"({_NUMBER})\s*(?:([KMGT])(?:iB|B)?|B)?", re.IGNORECASE)
_RATE = re.compile(rf"{_SIZE.pattern}(?:/s)?", re.IGNORECASE)
_SECONDS = re.compile(rf"({_NUMBER})")
_DURATION = re.compile(
    rf"(?=.)(?:({_NUMBER})d)?\s*(?:({_NUMBER})h)?\s*(?:({_NUMBER})m)?\s*(?:({_NUMBER})s)?", re.IGNORECASE
)
_DURATION_FACTORS = (86400, 3600, 60, 1)


def parse_size(text: str) -> int:
    """Return the bytes that `text` ("512M", "1.5GiB") names, rounded down.

    Raises ValueError when it names no size, less than one byte, or more than a file can hold.
    """
    return _parse_bytes(text, _SIZE, "size", SIZE_ACCEPTS)


def parse_rate(text: str) -> int:
    """Return the bytes per second that `text` ("100M", "1.5GiB/s") names, rounded down.

    Raises ValueError when it names no rate, less than one byte per second, or an absurdly large one.
    """
    return _parse_bytes(text, _RATE, "rate", RATE_ACCEPTS)


def _parse_bytes(text: str, pattern: re.Pattern[str], what: str, accepts: str) -> int:
    match = pattern.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a {what}; accepted is {accepts}")
    number, suffix = match.groups()
    # Decimal, because 0.1 has no exact binary form and a size must not depend on that.
    amount = Decimal(number) * _FACTORS[(suffix or "").upper()]
    if amount < 1:
        raise ValueError(f"{text!r} is less than one byte; accepted is {accepts}")
    if amount > _LARGEST:
        raise ValueError(f"{text!r} is more than {_LARGEST} bytes; accepted is {accepts}")
    return int(amount)


def parse_duration(text: str) -> float:
    """Return the seconds that `text` ("90", "5m", "1h30m") names; zero is a duration.

    Raises ValueError when it names no duration. Units go from large to small, each at most once.
    """
    stripped = text.strip()
    bare = _SECONDS.fullmatch(stripped)
    match = bare or _DURATION.fullmatch(stripped)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; accepted is {DURATION_ACCEPTS}")
    factors = (1,) if bare else _DURATION_FACTORS
    amounts = zip(match.groups(), factors, strict=True)
    seconds = float(sum(Decimal(number) * factor for number, factor in amounts if number))
    if math.isinf(seconds):
        raise ValueError(f"{text[:20]!r}... is too long; accepted is {DURATION_ACCEPTS}")
    return seconds


def scaled(number: int, unit: str) -> int | None:
    """Return `number` of a unit that libvirt's definitions use (virScaleInteger) in bytes; None for another one."""
    if unit.lower() in ("b", "byte", "bytes"):
        return number
    power = "KMGTPE".find(unit[:1].upper()) + 1 if unit else 0
    base = {"": 1024, "ib": 1024, "b": 1000}.get(unit[1:].lower())
    return int(number * base**power) if power and base is not None else None


def format_bytes(count: float) -> str:
    """Return `count` bytes in the largest fitting unit with one decimal: "512 B", "1.5 GiB".

    Raises ValueError for a count that is negative or not finite.
    """
    _check_amount(count, "a number of bytes")
    if round(count) < 1024:
        return f"{round(count)} B"
    amount, power = count / 1024, 1
    # Rounded before comparing: 1023.97 KiB would print as 1024.0 KiB.
    while round(amount, 1) >= 1024 and power < len(_UNITS) - 1:
        amount, power = amount / 1024, power + 1
    return f"{amount:.1f} {_UNITS[power]}"


def format_rate(bytes_per_second: float) -> str:
    """Return a rate in bytes per second for people: "87.3 MiB/s". Raises ValueError as format_bytes does."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_duration(seconds: float) -> str:
    """Return `seconds` for people: "4.2s", "42s", "1m05s", "2h00m09s", "3d04h00m00s".

    Tenths are shown below ten seconds only. Raises ValueError when negative or not finite.
    """
    _check_amount(seconds, "a duration")
    if round(seconds, 1) < 10:
        return f"{round(seconds, 1):g}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h{minute:02}m{second:02}s"
    if hours:
        return f"{hours}h{minute:02}m{second:02}s"
    if minutes:
        return f"{minutes}m{second:02}s"
    return f"{second}s"


def _check_amount(amount: float, what: str) -> None:
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"{amount!r} is not {what}; accepted is a finite number that is not negative")
