"""A private MPS server, for workers that are driven without the service."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from gcg import host, process
from gcg.figure import Skip

_READY_S = 15.0
_COMMAND_S = 5.0
_STOP_S = 5.0


@dataclass
class Mps:
    """`nvidia-cuda-mps-control -f` in a directory of its own. Its clients must have
    ended before its context is left."""

    uuid: str
    _base: Path = field(init=False)
    _child: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __enter__(self) -> Self:
        program = host.program("nvidia-cuda-mps-control")
        if program is None:
            raise Skip("there is no MPS: nvidia-cuda-mps-control was not found")
        self._program = program
        self._base = Path(tempfile.mkdtemp(prefix="gcg-mps-"))
        for name in ("pipe", "log"):
            (self._base / name).mkdir()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for text in self.stop():
            print(text, file=sys.stderr)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a process its client."""
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self._base / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(self._base / "log"),
        }

    def _daemon_environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        # The daemon looks for the server's program beside itself.
        path = os.pathsep.join([str(self._program.parent), os.environ.get("PATH", "")])
        return {**kept, **self.environment, "CUDA_VISIBLE_DEVICES": self.uuid, "PATH": path}

    def _start(self) -> None:
        with (self._base / "output").open("wb") as output:
            self._child = subprocess.Popen(
                [str(self._program), "-f"],
                env=self._daemon_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        until = time.monotonic() + _READY_S
        while not ((self._base / "pipe" / "control").exists() and self._tell("get_server_list")):
            if self._child.poll() is not None or time.monotonic() > until:
                said = (self._base / "output").read_text(errors="replace").strip()
                raise RuntimeError(f"the MPS control daemon did not come up: {said}")
            time.sleep(0.05)

    def _tell(self, command: str) -> bool:
        try:
            done = subprocess.run(
                [str(self._program)],
                input=f"{command}\n".encode(),
                env=self._daemon_environment(),
                capture_output=True,
                timeout=_COMMAND_S,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def stop(self) -> list[str]:
        """Ends it; what had to be forced, in words."""
        forced = []
        if self._child is not None:
            servers = process.descendants(self._child.pid)
            self._tell("quit")
            try:
                self._child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                forced.append("the MPS control daemon did not quit and was killed")
                self._child.send_signal(signal.SIGKILL)
                self._child.wait()
            self._child = None
            killed = process.end(servers, _STOP_S)
            forced += [f"MPS server {server.pid} had to be killed" for server in killed]
        shutil.rmtree(self._base, ignore_errors=True)
        return forced
