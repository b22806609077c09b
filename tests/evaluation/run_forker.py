"""Runs of a training command without its imports each time: this process imports once, and forks.

The argument is the command's module. Reads a line of JSON for each run: arguments, environment,
Python that puts a fault in, and the file for what it says, beside which the exit status is written
at its end. Answers with the process id.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback

# What commands import late.
ALSO = {
    "ibeton.evaluation.finetune.__main__": ("timm.data.mixup", "timm.scheduler", "timm.utils"),
    "ibeton.evaluation.segment": ("transformers.models.upernet.modeling_upernet",),
    "ibeton.evaluation.detect": ("faster_coco_eval",),
}

if __name__ == "__main__":
    command = importlib.import_module(sys.argv[1])
    for name in ("torch._dynamo", *ALSO[sys.argv[1]]):  # the first by optimizers
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes the dead away
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(job["environment"])
            faulthandler.dump_traceback_later(2400)  # where a run hangs
            status = 1
            try:
                exec(job["fault"])
                status = command.main(job["arguments"])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            with open(job["output"] + ".partial", "w") as file:
                file.write(str(status))
            os.rename(job["output"] + ".partial", job["output"] + ".status")
            os._exit(status)
        print(pid, flush=True)
