"""A run begun by the code of commit 216b8a1, before the rooms were moved, resumes today.

`tests/reference/old_run` holds what that code left after 6 of 12 steps (a checkpoint, its .beton
file, its settings), and the losses of steps 6 to 11 as the same code went on to compute them.
"""

import json
import lzma
import shlex
import shutil
from pathlib import Path

import pytest
from paths import REFERENCE

from ibeton.train import main

OLD = REFERENCE / "old_run"
OPTIONS = shlex.split(
    "--arch vit_t --embed-dim 24 --depth 2 --num-heads 2 --patch-size 8 --global-crops-size 32"
    " --local-crops-size 16 --local-crops-number 2 --batch-size 4 --out-dim 24 --hidden-dim 24"
    " --bottleneck-dim 12 --epochs 3 --warmup-epochs 1 --warmup-teacher-temp-epochs 1 --log-steps 1"
    " --loader pil --workers 1 --device cpu --seed 7 --keep-every 0 --keep-last 1"
)


def test_a_run_of_the_old_tree_resumes_with_its_losses(tmp_path: Path) -> None:
    (tmp_path / "photos.beton").write_bytes(lzma.decompress((OLD / "photos.beton.xz").read_bytes()))
    shutil.copy(OLD / "photos.beton.json", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint.pt", "run.json", "config.json"):
        shutil.copy(OLD / name, run)
    data = ["--data", str(tmp_path / "photos.beton"), "--output-dir", str(run)]
    assert main([*OPTIONS, *data, "--resume", "auto"]) == 0
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record for record in records if "loss" in record}
    expected = {int(k): v for k, v in json.loads((OLD / "losses.json").read_text()).items()}
    assert losses.keys() == expected.keys()
    for step, values in expected.items():
        for name, value in values.items():
            assert losses[step][name] == pytest.approx(value, rel=1e-3), (step, name)
