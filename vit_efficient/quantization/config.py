"""The union of quantization backends: the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.none import NoneConfig

QuantizationConfig = Annotated[NoneConfig | Int8Config | Int4Config, Field(discriminator="name")]
