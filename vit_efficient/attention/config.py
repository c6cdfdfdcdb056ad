"""The union of attention backends: the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vit_efficient.attention.flash2 import Flash2Config
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.switched_flash import Flash3Config, Flash4Config

AttentionConfig = Annotated[SdpaConfig | Flash2Config | Flash3Config | Flash4Config, Field(discriminator="name")]
