"""Resident memory stays flat, epoch after epoch."""

from __future__ import annotations

import gc
import multiprocessing
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec
from vit_efficient.prepare import main

pytestmark = pytest.mark.slow
EPOCHS, SETTLED = 20, 4  # by then workers have imported and buffers have grown to what the largest image needs


def resident(pid: int | str) -> int:
    """A process's share of the memory that it and its relatives fill: no pages of files.

    Those of libraries count for less, or for nothing, while other programs on the machine have them mapped too.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return 1024 * (int(fields["Pss_Anon"]) + int(fields["Pss_Shmem"]))


def test_twenty_epochs(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """300 real photographs through two loader processes: training epochs with all augmentation, and evaluations."""
    photos = tmp_path / "photos"
    with tarfile.open(shared("data/ILSVRC2012_sample_train.tar")) as outer:
        for number, member in enumerate(outer):
            if number % 10 < 3:
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    inner.extractall(photos / f"class{number % 3}", filter="data")
    main(["folder", str(photos), "--val-fraction", "0.2", "--shard-size", "40", "--out", str(tmp_path / "out")])
    config = DataConfig(source={"name": "folder"}, shards=str(tmp_path / "out"), batch_size=30)
    augment = AugmentConfig(rand_augment=2, erasing=0.3)
    data = ViTDataModule(config, augment, ImageSpec(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9), workers=2)
    train, evaluation = data.train_dataloader(), data.val_dataloader()
    totals = []
    for epoch in range(EPOCHS):
        data.cursor.epoch, data.cursor.step = epoch, 0
        seen = sum(len(batch["key"]) for loader in (train, evaluation) for batch in loader)
        assert seen == 300
        gc.collect()
        workers = multiprocessing.active_children()
        assert len(workers) == 4
        totals.append(resident("self") + sum(resident(worker.pid or 0) for worker in workers))
    data.teardown("fit")
    print("MB:", [round(total / 1e6) for total in totals])
    assert totals[-1] < 1.05 * totals[SETTLED]
    assert max(totals[SETTLED:]) < 1.08 * totals[SETTLED]
