"""Runs of train.py without its imports each time: this process imports once, and forks.

Reads a line of JSON for each run: arguments, the file for what it says, and Python that puts a
fault in. Answers with the process id at once, and with the exit status at its end.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

PR_SET_PDEATHSIG = 1  # sys/prctl.h
# What a run imports late: half of the CPU time of a small one. Optimizers import torch._dynamo.
LATE = (
    *("torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot", "matplotlib.ticker"),
    *("sklearn.metrics", "ibeton.evaluation.frozen.quick"),
)

if __name__ == "__main__":  # the loader's worker processes import this file
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ibeton import train
    from ibeton.pipeline.loaders import LOADERS

    LOADERS["dali"].problem()  # imports it, where it is installed
    for late in LATE:
        importlib.import_module(late)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["train.py", *job["arguments"]]
            status = 1
            try:
                exec(job["fault"])
                status = train.main(job["arguments"])
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
