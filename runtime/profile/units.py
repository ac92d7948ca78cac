"""Numbers as people read them: three significant digits and a unit."""

from __future__ import annotations


def number_text(value: float, digits: int = 3) -> str:
    """`value` to some significant digits, without an exponent: 1234.5 -> "1,230", 0.01234 -> "0.0123"."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 1 - _leading_zeros(abs(rounded))
    return f"{rounded:,.{max(0, digits - magnitude)}f}"


def time_text(time_us: float) -> str:
    """Microseconds as µs, ms or s."""
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if abs(time_us) >= 0.9995 * scale:
            return f"{number_text(time_us / scale)} {unit}"
    return f"{number_text(time_us)} µs"


def scaled_text(value: float, unit: str) -> str:
    """A count with a decimal prefix: 4_210_000, "FLOP" -> "4.21 MFLOP"."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return f"{number_text(value / scale)} {prefix}{unit}"
    return f"{number_text(value)} {unit}"


def bytes_text(value: float) -> str:
    """Bytes with a decimal prefix, as bandwidths are counted."""
    return scaled_text(value, "B")


def share_text(share: float) -> str:
    """A share as percent: two significant digits below 10 %, whole above."""
    percent = 100 * share
    return f"{percent:.0f} %" if abs(percent) >= 9.95 else f"{number_text(percent, 2)} %"


def _leading_zeros(value: float) -> int:
    """Zeros between the point and the first digit, plus one: 0.5 -> 1, 0.05 -> 2."""
    zeros = 0
    while value < 1:
        value *= 10
        zeros += 1
    return zeros
