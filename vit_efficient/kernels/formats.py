"""The number formats that codes come in, and the check that a device can multiply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FormatName = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True)
class Format:
    """Codes are ``round(x / scale)``, symmetric around zero, and ``scale = amax / largest``.

    Args:
        dtype: that codes are stored in; 4-bit activations take a byte each, as the matrix units want them.
        largest: the largest code.
    """

    dtype: torch.dtype
    largest: int

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers; else they are e4m3 numbers."""
        return self.dtype == torch.int8


FORMATS: dict[str, Format] = {
    "int8": Format(torch.int8, 127),
    "int4": Format(torch.int8, 7),
    "fp8": Format(torch.float8_e4m3fn, 448),
}


def format_of(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"no number format is called {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
