#!/bin/sh
# Creates $VENV with everything that this machine allows. `sh install.sh ffcv` installs ffcv alone.
# Versions are those of constraints.txt; ranges are in setup.py.
set -eu
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
SYSTEM_FOR_FFCV="build-essential pkg-config libturbojpeg0-dev libopencv-dev"

say() { printf '%s\n' "ibeton: $*"; }

as_root() {  # run a command as root if no password is needed, else fail
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null 2>&1; then sudo -n "$@"; else return 1; fi
}

apt_install() {  # quietly; sets WHY if it fails
    WHY="there is no apt-get here"
    command -v apt-get >/dev/null 2>&1 || return 1
    WHY="installing needs root, and sudo without a password does not work"
    as_root true 2>/dev/null || return 1
    WHY="apt-get failed (see $LOG)"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >>"$LOG" 2>&1 || true
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "$@" >>"$LOG" 2>&1
}

packages() {  # install extras of this project with the pinned versions
    # Where Python may not write bytecode, every start would compile PyTorch's sources again.
    compile="${PYTHONDONTWRITEBYTECODE:+--compile-bytecode}"
    "$VENV/bin/uv" pip install -q $compile --python "$VENV/bin/python" -c constraints.txt "$@"
}

install_turbojpeg() {  # what the default loader decodes with
    "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libturbojpeg.so.0")' 2>/dev/null && return 0
    apt_install libturbojpeg0 || {
        say "no libturbojpeg: $WHY. Training will use another loader."
        say "on Debian or Ubuntu: sudo apt-get install libturbojpeg0"
    }
}

install_ffcv() {  # what tests and benchmarks compare .beton files with
    if ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
        say "installing the system packages that ffcv is built with ($SYSTEM_FOR_FFCV)"
        # A system Python brings its C headers in a package of its own.
        headers="python$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"
        "$VENV/bin/python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' && headers=""
        apt_install $SYSTEM_FOR_FFCV $headers || {
            say "no ffcv, which needs system packages: $WHY. Training does not need it; some tests are skipped."
            say "on Debian or Ubuntu: sudo apt-get install $SYSTEM_FOR_FFCV $headers && make ffcv"
            return 0
        }
    fi
    packages -e '.[ffcv]' >>"$LOG" 2>&1 || {
        tail -n 5 "$LOG"
        say "no ffcv: its build failed (see $LOG). Training does not need it; some tests are skipped."
        return 0
    }
    say "ffcv is installed"
}

"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || {
    say "Python 3.10 to 3.13 is needed and '$PYTHON' is not one; give another: make setup PYTHON=python3.12"
    exit 2
}
mkdir -p "$VENV"
LOG="$VENV/install.log"
: >"$LOG"
if [ ! -x "$VENV/bin/pip" ]; then
    if ! "$PYTHON" -m venv "$VENV" >>"$LOG" 2>&1; then
        apt_install python3-venv && "$PYTHON" -m venv --clear "$VENV" || {
            say "'$PYTHON -m venv' does not work here; install it: sudo apt-get install python3-venv"
            exit 2
        }
    fi
fi
[ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install -q uv
if [ "${1:-all}" = all ]; then
    say "installing into $VENV (9 GB, of which torch, Triton and the CUDA libraries take 8; a minute or more)"
    packages -e '.[timm,plots,cluster,export,dense,dali,dev]'
fi
install_turbojpeg
install_ffcv
"$VENV/bin/python" -m pipeline.doctor
