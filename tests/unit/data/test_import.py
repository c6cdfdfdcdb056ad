"""The recipe imports the data configs; that must not bring in what reads data."""

from __future__ import annotations

import subprocess
import sys


def test_configs_stay_light() -> None:
    heavy = (
        "timm",
        "lightning",
        "sklearn",
        "webdataset",
        "torchvision",
        "peft",
        "bitsandbytes",
        "torch",
        "pyarrow",
        "scipy",
    )
    code = f"import sys, vit_efficient.data.config; print([name for name in {heavy!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
