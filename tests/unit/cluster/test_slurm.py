"""What is said when Slurm refuses. tests/slurm has the real thing; here its commands say what they were seen to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_efficient.cluster.slurm import SlurmError, submit


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("sbatch: fatal: Could not establish a configuration source", "neither a slurm.conf nor a controller"),
        ("sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
         "sbatch: error: fetch_config: DNS SRV lookup failed\n"
         "sbatch: error: _establish_config_source: failed to fetch config\n"
         "sbatch: fatal: Could not establish a configuration source", "neither a slurm.conf nor a controller"),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
         "controller does not answer"),
        ("sbatch: error: Batch job submission failed: Something new", "Set what this cluster wants in the site file"),
    ],
)  # fmt: skip
def test_advice(words: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    said.write_text(words + "\n")
    command = tmp_path / "sbatch"
    command.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line" >&2; done < {said}\nexit 1\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError) as caught:
        submit(tmp_path / "job.sh")
    for line in (*words.splitlines(), advice, "Nothing was started"):
        assert line in str(caught.value)
    assert ("site file" in str(caught.value)) == ("Something new" in words)
