"""What may go wrong with one contender of a measurement without ending the others."""

from __future__ import annotations

import torch

from vit_efficient.errors import UserError

# Out of memory and a failed compilation are RuntimeErrors; a peer's package may be there and not import.
EXPECTED = (RuntimeError, UserError, ImportError)
LONGEST = 500  # letters of a message that are kept: compilers say pages


def works(device: torch.device) -> bool:
    """Whether a device still computes after an error. Some, such as an illegal access, end a process's use of a GPU:
    then every later call fails too, and nothing can be measured any more."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def said(error: BaseException) -> str:
    """Type and message on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= LONGEST else message[: LONGEST - 3] + '...'}"
