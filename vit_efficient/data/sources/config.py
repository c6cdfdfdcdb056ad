"""The union of data sources: the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vit_efficient.data.sources.cifar10 import Cifar10Config
from vit_efficient.data.sources.csv_list import CsvConfig
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.data.sources.folder import FolderConfig
from vit_efficient.data.sources.imagenet import ImagenetConfig
from vit_efficient.data.sources.parquet import ParquetConfig
from vit_efficient.data.sources.tiny_imagenet import TinyImagenetConfig

SourceConfig = Annotated[
    DigitsConfig | Cifar10Config | FolderConfig | CsvConfig | ParquetConfig | TinyImagenetConfig | ImagenetConfig,
    Field(discriminator="name"),
]
