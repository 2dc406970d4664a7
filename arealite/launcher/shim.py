"""The first instructions of every process of a run: die with the launcher, stay on the given cores, then become it.

Run by child.py as `python -I -S shim.py PARENT_PID CORES COMMAND...`, CORES a comma list or "-" for all; imports the
standard library only, so that it costs milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PARENT_GONE = 113
BAD_CORES = 114


def main(parent_pid: str, cores: str, *command: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"cannot tie this process to the launcher: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent_pid):  # the launcher died before the line above, and no signal will come
        sys.exit(PARENT_GONE)
    if cores != "-":
        try:
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
        except OSError as error:
            print(f"cannot run on cores {cores}: {error}; set launcher.pin_cores=false", file=sys.stderr)
            sys.exit(BAD_CORES)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]!r}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
