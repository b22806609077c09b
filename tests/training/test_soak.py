"""2,000 steps of a small run: what it holds at its end is what it held after its first hundreds."""

import json
from pathlib import Path

import pytest
from small_runs import Start

SAMPLE = """
import os
from ibeton import train
save = train.save
def sample(run):
    save(run)
    pages = int(open("/proc/self/statm").read().split()[1])
    record = {{
        "step": run.step,
        "memory": pages * os.sysconf("SC_PAGESIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "checkpoints": sum(f.stat().st_size for f in run.folder.glob("checkpoint*")),
        "partials": len(list(run.folder.glob(".*partial*"))),
    }}
    with open({path!r}, "a") as file:
        file.write(json.dumps(record) + "\\n")
train.save = sample
"""


@pytest.mark.slow
def test_two_thousand_steps_leave_memory_threads_files_and_disk_as_they_were(
    start: Start, tmp_path: Path, tiny: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    evaluation = ("--eval-train", str(tiny), "--eval-val", str(tiny), "--eval-every", "10")
    process = start(
        tmp_path / "run",
        *("--epochs", "250", "--save-steps", "4", "--keep-every", "0", "--log-steps", "10"),
        *evaluation,
        fault=SAMPLE.format(path=str(samples)),
    )
    assert process.wait() == 0, process.said()[-3000:]
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert found[-1]["step"] == 2000
    early = [r for r in found if 400 <= r["step"] < 600]
    late = [r for r in found if r["step"] >= 1800]
    most = {name: [max(r[name] for r in part) for part in (early, late)] for name in found[0]}
    print(json.dumps(most), "MiB:", [r["memory"] >> 20 for r in found if r["step"] % 200 == 0])
    assert most["threads"][1] <= most["threads"][0]
    assert most["files"][1] <= most["files"][0] + 1
    assert most["checkpoints"][1] <= 1.01 * most["checkpoints"][0]
    assert most["partials"][1] == 0
    assert most["memory"][1] <= 1.05 * most["memory"][0], "bytes"
