"""Numbers as people read them."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes, in powers of ten as file sizes are given: 11534336 -> '11.5 MB'."""
    for unit_size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit_size:
            return f"{number / unit_size:.3g} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def wilson(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share counted on ``samples`` independent samples (Wilson's score interval)."""
    if samples == 0:
        return (0.0, 1.0)
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return max(0.0, centre - half), min(1.0, centre + half)
