"""Runs of `ibeton finetune` without its imports each time: this process imports once, and forks.

Reads a line of JSON for each run: arguments, environment, and the file for what it says, beside
which the exit status is written at its end. Answers with the process id.
"""

import json
import os
import signal
import sys
import traceback

if __name__ == "__main__":
    import timm.data.auto_augment
    import timm.data.mixup
    import timm.data.random_erasing
    import timm.optim
    import timm.scheduler
    import timm.utils  # noqa: F401 - imported once, here

    from ibeton.evaluation.finetune.__main__ import main

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
            status = 1
            try:
                status = main(job["arguments"])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            with open(job["output"] + ".partial", "w") as file:
                file.write(str(status))
            os.rename(job["output"] + ".partial", job["output"] + ".status")
            os._exit(status)
        print(pid, flush=True)
