"""A gcgroupd of our own: started in a short directory, ended without a trace."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from gcg import files, process
from gcg.process import Process

# Until the first GPU has its directory: opening the driver and probing a context
# takes seconds on a cold machine.
_READY_S = 60.0
# Until a service that was asked to end has ended.
_STOP_S = 15.0
# Until a workload that was told to end has lost its directory.
_KILL_S = 10.0
_KILLS_AT_ONCE = 8
# Until guardian, workers and MPS server have ended behind a service that has.
_HELPERS_S = 12.0


class Refused(Exception):
    """A launch that the service refused, in its own words."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{os.strerror(number)}: {text}")
        self.errno = number


@dataclass(frozen=True)
class Workload:
    """A workload that the service launched."""

    pid: int
    name: str
    path: Path

    def read(self, name: str) -> str:
        """Text of one of its files, without the last newline."""
        return files.read(self.path / name).removesuffix("\n")

    def write(self, name: str, value: object) -> int:
        """Writes one of its files; nanoseconds that took."""
        return files.write(self.path / name, str(value))

    def stat(self) -> dict[str, int]:
        """Its gcgroup.stat."""
        return files.keyed(self.read("gcgroup.stat"))

    def spec(self) -> dict[str, Any]:
        """Its spec as decided, every field in it."""
        spec: dict[str, Any] = json.loads(self.read("workload.spec"))
        return spec


@dataclass
class Service:
    """A running service. Leave its context, or call stop, to end it."""

    binary: Path
    sim: bool
    sharing: str
    log: IO[bytes]
    # Whether processes that it did not launch get entries.
    attach: bool = False
    # Whether the launches of those are counted.
    count_launches: bool = True
    # GPUs of the simulated host.
    sim_gpus: int = 1
    gpu: int = 0
    _base: Path = field(init=False)
    _child: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _helpers: set[Process] = field(init=False, default_factory=set)

    def __enter__(self) -> Self:
        # Short, since sockets lie below it and their paths have at most 107 bytes;
        # open to others, since workers and the MPS server run as another user.
        self._base = Path(tempfile.mkdtemp(prefix="gcg-"))
        self._base.chmod(0o755)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def root(self) -> Path:
        """Where its control files are."""
        return self._base / "m"

    @property
    def state(self) -> Path:
        """Its state directory."""
        return self._base / "s"

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._child is None:
            raise RuntimeError("the service does not run")
        return self._child.pid

    def _start(self) -> None:
        configuration = self._base / "gcgroupd.toml"
        configuration.write_text(
            f'sharing = "{self.sharing}"\n'
            f"attach = {str(self.attach).lower()}\n"
            f"count_launches = {str(self.count_launches).lower()}\n"
        )
        command = [str(self.binary), "serve", "--config", str(configuration)]
        command += ["--mountpoint", str(self.root), "--state", str(self.state)]
        command += [f"--sim={self.sim_gpus}"] if self.sim else []
        self.log.write(f"--- {' '.join(command)}\n".encode())
        self.log.flush()
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, process_group=0
        )
        device = self.root / "devices" / str(self.gpu) / "name"
        until = time.monotonic() + _READY_S
        while not device.exists():
            if self._child.poll() is not None:
                raise RuntimeError(f"gcgroupd ended with status {self._child.returncode}; see its log")
            if time.monotonic() > until:
                raise TimeoutError(f"gcgroupd showed no GPU {self.gpu} within {_READY_S:.0f} s; see its log")
            time.sleep(0.02)

    def device(self, name: str) -> str:
        """Text of a file of the GPU, without the last newline."""
        return files.read(self.root / "devices" / str(self.gpu) / name).removesuffix("\n")

    def enforcer(self, name: str) -> str:
        """What enforces a control file on this GPU: a mechanism, or `none` and the reason."""
        return files.words(self.device("gcgroup.enforcers"))[name]

    def launch(self, **spec: object) -> Workload:
        """Launches a workload and reads the answer on the same descriptor."""
        data = json.dumps({"gpu": self.gpu, **spec}).encode()
        descriptor = os.open(self.root / "gcgroup.launch", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
            answer = json.loads(files.read_all(descriptor))
        except OSError as error:
            raise Refused(error.errno or 0, files.read_all(descriptor).strip()) from error
        finally:
            os.close(descriptor)
        self._remember()
        path = self.root / "processes" / str(answer["pid"]) / str(answer["gpu"])
        return Workload(answer["pid"], answer["name"], path)

    def freeze(self, workloads: Iterable[Workload]) -> None:
        """Freezes several in one step."""
        self._freeze_many(1, workloads)

    def thaw(self, workloads: Iterable[Workload]) -> None:
        """Thaws several in one step."""
        self._freeze_many(0, workloads)

    def _freeze_many(self, value: int, workloads: Iterable[Workload]) -> None:
        pids = " ".join(str(workload.pid) for workload in workloads)
        if pids:
            files.write(self.root / "gcgroup.freeze", f"{value} {pids}")

    def partition(self, name: str, sms: int) -> Path:
        """Makes a partition of so many SMs; its directory."""
        path = self.root / "partitions" / str(self.gpu) / name
        path.mkdir()
        files.write(path / "sm.count", str(sms))
        granted = int(files.read(path / "sm.count"))
        if granted != sms:
            raise RuntimeError(f"partition {name}: {granted} SMs were granted, not {sms}")
        return path

    def clear(self) -> None:
        """Ends every workload and removes every partition. Programs of others are listed
        too and are left alone."""
        listed = files.read(self.root / "processes" / "list").split()[1:]
        entries = [self.root / "processes" / pid for pid in listed]
        ours = [entry for entry in entries if (entry / str(self.gpu) / "workload.spec").exists()]
        with ThreadPoolExecutor(_KILLS_AT_ONCE) as pool:
            # Taken one by one, so that an error shows.
            for _ in pool.map(self._kill, ours):
                pass
        for partition in (self.root / "partitions" / str(self.gpu)).iterdir():
            partition.rmdir()

    def _kill(self, entry: Path) -> None:
        try:
            files.write(entry / str(self.gpu) / "gcgroup.kill", "1")
        except OSError:
            # One that ended by itself meanwhile is as good.
            if entry.exists():
                raise
        until = time.monotonic() + _KILL_S
        while entry.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"{entry.name} is still there {_KILL_S:.0f} s after it was killed")
            time.sleep(0.005)

    def kill(self) -> None:
        """Kills the service at once. Calls that hang in its files then return."""
        if self._child is not None:
            self._remember()
            self._child.kill()

    def _remember(self) -> None:
        if self._child is not None:
            self._helpers.update(process.descendants(self._child.pid))

    def stop(self) -> list[str]:
        """Ends it and whatever it started; what had to be forced, in words."""
        forced = []
        if self._child is not None:
            self._remember()
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                forced.append(f"gcgroupd did not end within {_STOP_S:.0f} s and was killed")
                self._child.kill()
                self._child.wait()
            self._child = None
        forced += self._unmount()
        # The guardian needs the journal to undo what a killed service left. The
        # simulated GPU is the other way round: it ends when its directory goes.
        simulated = {helper for helper in self._helpers if "sim-gpu" in process.arguments(helper.pid)}
        killed = process.end(list(self._helpers - simulated), _HELPERS_S)
        shutil.rmtree(self._base, ignore_errors=True)
        killed += process.end(list(simulated), _HELPERS_S)
        self._helpers.clear()
        forced += [f"helper process {left.pid} had to be killed" for left in killed]
        return forced

    def _unmount(self) -> list[str]:
        # What is listed there and not what answers: a dead mount answers nothing.
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        if not any(line.split()[4] == str(self.root) for line in mounts):
            return []
        subprocess.run(["umount", "-l", str(self.root)], check=True)
        return ["the mount was left behind and was taken away"]
