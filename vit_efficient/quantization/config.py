"""The union of quantization backends: the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vit_efficient.quantization.bnb_int8 import BnbInt8Config
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.none import NoneConfig
from vit_efficient.quantization.torchao import TorchaoConfig

QuantizationConfig = Annotated[
    NoneConfig | Int8Config | Int4Config | Fp8Config | BnbInt8Config | TorchaoConfig, Field(discriminator="name")
]
