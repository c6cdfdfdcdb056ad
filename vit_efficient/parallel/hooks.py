"""Forward hooks that a library has put on modules and does not take off."""

from __future__ import annotations

from torch import nn


def drop_hooks(module: nn.Module, *packages: str) -> None:
    """Take off the module's forward hooks that come from these packages; those of the model's own stay."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if (getattr(hook, "__module__", None) or "").startswith(packages):
                del hooks[key]
                for kinds in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    kinds.pop(key, None)
