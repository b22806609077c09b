"""Small runs of fine-tuning as processes."""

import os
import shlex
import subprocess
import sys

from paths import ROOT

STEPS_PER_EPOCH = 3  # 24 photos in batches of 8
QUICK = shlex.split(
    "--epochs 4 --warmup-epochs 1 --batch-size 8 --mix-images 4 --lr 1e-3 --lr-batch-size 8"
    " --workers 1 --log-steps 1 --device cpu"
)


def start(options: list[str], processes: int = 1) -> subprocess.Popen:
    """The command as a process of its own, under torchrun for several."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    before = torchrun if processes > 1 else ()
    return subprocess.Popen(
        [sys.executable, *before, "-m", "ibeton.evaluation.finetune", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
