"""A SLURM cluster of one node: munged, slurmctld and slurmd as processes of a test, with all files in one folder."""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
SEARCHED = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin", "/usr/local/sbin"])
HANGS = 1800  # seconds after which a test gives up
KILL_WAIT = 30  # seconds between SIGTERM and SIGKILL, SLURM's default

# cred_expire: a job that is requeued waits for so many seconds, two minutes by default. No accounting, and no cgroups.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
MinJobAge=86400
SlurmctldTimeout=600
SlurmdTimeout=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Return the programs of SLURM and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]


class Cluster:
    """Start it with `with Cluster(folder) as cluster:`; all its processes end with it."""

    def __init__(self, folder):
        self.folder, self.daemons = Path(folder), []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": SEARCHED,
        }

    def __enter__(self):
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            host=host, user=getpass.getuser(), folder=self.folder, ports=free_ports(2), kill_wait=KILL_WAIT
        )
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._daemon(
                *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket"),
                *(f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log"),
                *(f"--seed-file={self.folder}/munged.seed", "--num-threads=2"),
            )
            self.wait((self.folder / "munge.socket").exists)
            self._daemon("slurmctld", "-D")
            self._daemon("slurmd", "-D")
            self.wait(lambda: self._asked("sinfo", "--noheader", "--format=%T").strip() == "idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        if len(self.daemons) > 1:
            self._asked("scancel", "--signal=KILL", "--state=RUNNING", f"--user={getpass.getuser()}")
            self._asked("scancel", f"--user={getpass.getuser()}")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(timeout=HANGS)
        for process in self._left():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)

    def _daemon(self, *command):
        with (self.folder / f"{command[0]}.out").open("w") as out:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=out,
                    env=self.environment,
                    executable=shutil.which(command[0], path=SEARCHED),
                )
            )

    def _left(self):
        """Yield the processes of jobs, by the cluster's configuration in their environment."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if ours in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)

    def _asked(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def run(self, *command, cwd=None):
        """Return what a command of SLURM prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=cwd)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def version(self):
        return re.search(r"[\d.]+", self.run("sinfo", "--version"))[0]

    def submit(self, script, *options, cwd):
        """Submit the text of a script by sbatch; return the number of the job."""
        file = Path(cwd) / "job.sh"
        file.write_text(script)
        return self.run("sbatch", "--parsable", *options, str(file), cwd=cwd).strip()

    def job(self, number):
        """Return what SLURM knows of a job: its state, number of restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def state(self, number):
        return self.job(number)["JobState"]

    def wait_for_state(self, number, state):
        self.wait(lambda: self.state(number) == state, lambda: self.job(number))

    def wait(self, what, told=lambda: ""):
        """Wait until `what()` is true."""
        deadline = time.monotonic() + HANGS
        while not what():
            assert all(daemon.poll() is None for daemon in self.daemons), self.logs()
            assert time.monotonic() < deadline, (told(), self.logs())
            time.sleep(0.3)

    def logs(self):
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.folder.glob("*.out")))


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
