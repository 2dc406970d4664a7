"""A real Slurm of three nodes on this machine: munged, slurmctld, three slurmd, in a folder of their own, on ports that
were free. Used by test_launcher_slurm.py.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from arealite.launcher import shim

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2", "n3")
LIMIT_S = 60.0
# In which the daemons' programs lie, where a user's own PATH has not.
SYSTEM_PATH = os.pathsep.join([os.environ["PATH"], *(f"{prefix}/sbin" for prefix in ("/usr", "/usr/local"))])

CONF = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/ctl
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=8
InactiveLimit=0
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=16000 Gres=gpu:4
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=16000 Gres=gpu:4
NodeName=n3 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=8 RealMemory=16000 Gres=gpu:4
PartitionName=main Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
GRES = "AutoDetect=off\n" + "".join(f"NodeName={node} Name=gpu File={{folder}}/gpu[0-3]\n" for node in NODES)


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "devices, which stand for GPUs, are made by root only"


class SlurmNodes:
    """The daemons; the context manager ends them, and whatever their jobs have left, by id."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, {}
        self.env = {**os.environ, "PATH": SYSTEM_PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> SlurmNodes:
        (self.folder / "munge").mkdir(mode=0o700)
        (self.folder / "ctl").mkdir()
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for i in range(4):  # a character device, as Slurm asks; this one is /dev/null
            os.mknod(self.folder / f"gpu{i}", 0o20666, os.makedev(1, 3))
        with ExitStack() as probes:
            sockets = [probes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
            ports = [s.getsockname()[1] for s in sockets]
        conf = CONF.format(folder=self.folder, user=getpass.getuser(), ports=ports)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(GRES.format(folder=self.folder))
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        munge = self.folder / "munge"
        places = [f"--{name}={munge / name.removesuffix('-file')}" for name in ("socket", "key-file", "pid-file")]
        places += [f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"]
        self._start("munged", "--foreground", "--force", *places)
        self.until((munge / "socket").exists, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: set(self.states().values()) == {"idle"}, "idle nodes")

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=node)

    def _start(self, program: str, *words: str, name: str = "") -> None:
        with open(self.folder / f"{name or program}.log", "ab") as log:
            self.daemons[name or program] = subprocess.Popen(
                [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), "-", program, *words],  # ends with us
                env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def __call__(self, program: str, *words: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run([program, *words], env=self.env, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        with suppress(AssertionError):  # the controller is not up yet
            return dict(line.split() for line in self("sinfo", "-h", "-N", "-o", "%N %t").splitlines())
        return {}

    def until(self, condition, what: str, limit_s: float = LIMIT_S):
        """Poll `condition()`; returns what it gives."""
        end = time.monotonic() + limit_s
        while not (found := condition()):
            logs = "".join(f"\n{path.name}:\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, f"no {what} within {limit_s} s{logs}"
            time.sleep(0.1)
        return found

    def processes(self, node: str = "") -> list[psutil.Process]:
        """Those of jobs, on one node or on all: what slurmd starts for them, and all that these start. Each step's own
        daemon comes first, since it would tell how the others end."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ()
                is_ours = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURMD_NODENAME" in env
                if is_ours and env["SLURMD_NODENAME"] == (node or env["SLURMD_NODENAME"]):
                    found.append(process)
                    parent = process.parent()
                    found[:0] = [parent] if parent is not None and parent.name() == "slurmstepd" else []
        return found

    def fail(self, node: str) -> None:
        """As when its power goes: nothing of it is left, and nobody says so."""
        self.daemons[node].kill()
        while found := self.processes(node):  # again: one of them may have started another meanwhile
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self.daemons[node].wait(LIMIT_S)

    def revive(self) -> None:
        """All nodes are up and idle again, without jobs."""
        self("scancel", "--state=PENDING")
        self("scancel", "--state=RUNNING")
        for node in NODES:
            if self.daemons[node].poll() is not None:
                self.start_node(node)
        self.until(lambda: set(self.states().values()) == {"idle"}, "idle nodes")
        self.until(lambda: not self("squeue", "-h"), "empty queue")

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)
