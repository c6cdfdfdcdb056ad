"""Other packages' notices, while they are imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# bitsandbytes: a kernel of the hub, which is not used, could not be had. torchao, which peft imports: it registers
# something twice.
LOUD = ("bitsandbytes.backends.cpu.ops", "torch.utils._pytree")


@contextmanager
def without_notices() -> Iterator[None]:
    """While it lasts, the packages behind 4-bit layers and adapters say errors alone."""
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
