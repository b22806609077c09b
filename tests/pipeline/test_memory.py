"""Freed memory stays with the process, with old versions of glibc too."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
from paths import ROOT

from ibeton.pipeline.memory import keep_freed_memory

HEAP = """
import ctypes
from ibeton.pipeline.memory import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
keep_freed_memory()
before = libc.mallinfo2().arena
libc.free(libc.malloc(200 << 20))
print(libc.mallinfo2().arena - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 has it")
def test_a_freed_batch_is_not_returned_to_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT, capture_output=True, check=True)
    assert int(done.stdout) > 100 << 20


def test_glibc_2_31_accepts_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = []

    def mallopt(name: int, value: int) -> int:
        too_much = name == -3 and value > 32 << 20  # M_MMAP_THRESHOLD, half of its largest heap
        accepted.append(not too_much)
        return not too_much

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert accepted == [True, True]
