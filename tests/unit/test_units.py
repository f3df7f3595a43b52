from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.units import (
    format_bytes,
    format_duration,
    format_rate,
    parse_duration,
    parse_rate,
    parse_size,
)

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

SIZES = [
    ("1", 1),
    ("4096", 4096),
    ("100B", 100),
    ("1K", KIB),
    ("1k", KIB),
    ("100M", 100 * MIB),
    ("100MB", 100 * MIB),
    ("100mib", 100 * MIB),
    ("1.5GiB", 3 * GIB // 2),
    (" 1.5 GiB ", 3 * GIB // 2),
    ("2T", 2 * TIB),
    ("0.1K", 102),
    ("9223372036854775807", 2**63 - 1),
]
NOT_SIZES = [
    "", " ", "K", "-1", "+1", "0", "0.5", "0K", "1e3", "1,5G", "1P", "1iB", "1Mi", "100Mbit", "1 1", ".5K",
    "1.K", "inf", "nan", "\u0661K", "9223372036854775808", "9999999999T", "1M\nx",
]  # fmt: skip


@pytest.mark.parametrize(("text", "count"), SIZES)
def test_parse_size(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("suffix", ["", "/s", "/S"])
@pytest.mark.parametrize(("text", "count"), SIZES)
def test_parse_rate(text: str, count: int, suffix: str) -> None:
    assert parse_rate(text.rstrip() + suffix) == count


@pytest.mark.parametrize("text", [*NOT_SIZES, "1M/s", "1/s"])
def test_a_size_that_is_none_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"accepted is .*1\.5GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", [*NOT_SIZES, "1M/m", "/s", "1Ms"])
def test_a_rate_that_is_none_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"accepted is bytes per second.*100M"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("5m", 300),
        ("5M", 300),
        ("2h", 7200),
        ("7d", 604800),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1d2h3m4s", 93784),
        ("1d4s", 86404),
        ("1.5h", 5400),
        ("0.25", 0.25),
        (" 1m05s ", 65),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "-1", "1h30", "30m1h", "1m1m", "1w", "1:30", "1e3", "inf", "nan", "5 m", "9" * 400],
)
def test_a_duration_that_is_none_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match="accepted is a number of seconds, or"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.6, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (MIB - 1, "1.0 MiB"),
        (MIB - 100, "1023.9 KiB"),
        (TIB, "1.0 TiB"),
        (5000 * TIB, "5000.0 TiB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text
    assert format_rate(count) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.04, "0s"),
        (4.25, "4.2s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (42.4, "42s"),
        (59.6, "1m00s"),
        (65, "1m05s"),
        (3599.7, "1h00m00s"),
        (7209, "2h00m09s"),
        (273600, "3d04h00m00s"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("amount", [-1, -0.5, math.inf, math.nan])
def test_formatting_refuses_what_is_no_amount(amount: float) -> None:
    with pytest.raises(ValueError, match="accepted is a finite number"):
        format_bytes(amount)
    with pytest.raises(ValueError, match="accepted is a finite number"):
        format_duration(amount)


@given(st.integers(1, 2**62))
def test_what_format_bytes_prints_parses_to_nearly_the_same(count: int) -> None:
    text = format_bytes(count)
    unit = parse_size(f"1{text.split()[1]}")
    assert abs(parse_size(text) - count) <= 0.05 * unit + 1
    assert parse_rate(format_rate(count)) == parse_size(text)


@given(st.integers(1, 1023), st.sampled_from("KMGT"))
def test_whole_units_survive_formatting_exactly(number: int, suffix: str) -> None:
    count = parse_size(f"{number}{suffix}")
    assert format_bytes(count) == f"{number}.0 {suffix}iB"
    assert parse_size(format_bytes(count)) == count


@given(st.integers(0, 10**9))
def test_whole_seconds_survive_formatting_exactly(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.floats(0, 10**9))
def test_what_format_duration_prints_parses_to_nearly_the_same(seconds: float) -> None:
    tolerance = 0.051 if seconds < 10 else 0.5
    assert abs(parse_duration(format_duration(seconds)) - seconds) <= tolerance


@given(st.text())
def test_no_text_makes_parsing_raise_anything_else(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_duration):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert "accepted is" in str(error)
