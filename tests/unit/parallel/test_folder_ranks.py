"""Two processes write a checkpoint: what one of them cannot do, both say, and none waits for the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_efficient.parallel.folder import read_folder
from vit_efficient.parallel.sums import REST, folder_damage

PROGRAM = """
import os, resource, sys
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.folder import write_folder

folder, rank, short, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=100)
)
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
path = folder / "step-00000001.ckpt"
def state(number):
    weight = distribute_tensor(torch.full((40, 30), number), mesh, [Shard(0)])
    return {"state_dict": {"w": weight}, "names": "x" * 100_000}
write_folder(path, state(1.0))
if rank == short:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
try:
    write_folder(path, state(2.0))
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1], -1))
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # what gloo leaves behind ends some processes by SIGABRT, after all is said
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "limit"),
    [(0, 2_000), (1, 2_000), (0, 50_000), (1, 50_000)],  # 100 kB of names are the first process's to write
    ids=["part 0", "part 1", "rest", "nothing"],
)
def test_one_of_two_has_no_room(tmp_path: Path, short: int, limit: int) -> None:
    words = [str(short), str(limit)]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(rank), *words],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    fits = (short, limit) == (1, 50_000)
    for printed, _ in said:
        assert (printed == "") == fits
        assert fits or ("File too large" in printed and f"(process {short})" in printed)
    path = tmp_path / "step-00000001.ckpt"
    assert [each.name for each in tmp_path.glob("*step*")] == [path.name]
    assert folder_damage(path) is None
    assert torch.equal(read_folder(path)["state_dict"]["w"], torch.full((40, 30), 2.0 if fits else 1.0))
    listed = torch.load(path / REST, weights_only=True)["files"]
    assert sorted(listed) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
