"""The union of data sources: the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vit_efficient.data.sources.cifar10 import Cifar10Config
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.data.sources.folder import FolderConfig
from vit_efficient.data.sources.imagenet import ImagenetConfig

SourceConfig = Annotated[DigitsConfig | Cifar10Config | FolderConfig | ImagenetConfig, Field(discriminator="name")]
