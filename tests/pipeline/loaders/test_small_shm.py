"""The pil loader where /dev/shm has no room for a batch, as in a Docker container."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

BATCHES = """
import hashlib, sys
from ibeton.pipeline import PipelineConfig, build_loader
if __name__ == "__main__":
    config = PipelineConfig(data=sys.argv[1], loader="pil", batch_size=8, workers=2)
    loader = build_loader(config)
    digest = hashlib.sha256()
    for batch in loader.epoch(0):
        digest.update(batch.global_crops.numpy().tobytes() + batch.local_crops.numpy().tobytes())
    print(digest.hexdigest())
    loader.close()
"""
SMALL_SHM = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


def private_mounts() -> bool:
    """Whether this process may mount for itself."""
    command = ["unshare", "-m", "sh", "-c", SMALL_SHM, "sh", "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not private_mounts(), reason="needs the right to mount (unshare -m)")
def test_batches_go_through_pipes_where_shared_memory_is_full(
    photo_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "batches.py"
    script.write_text(BATCHES)
    command = [sys.executable, str(script), str(photo_folder)]
    said = []
    for before in ([], ["unshare", "-m", "sh", "-c", SMALL_SHM, "sh"]):
        done = subprocess.run(
            [*before, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            **{"capture_output": True, "text": True, "check": False},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        said.append(done)
    assert said[0].stdout == said[1].stdout
    assert "/dev/shm" not in said[0].stderr
    assert said[1].stderr.count("no room in /dev/shm") == 1
    assert "--shm-size" in said[1].stderr
