"""A trainer that has imported all it needs and forks for each training, which saves its six seconds of imports.

``python -m tests.app.warm SOCKET`` serves; ``Started`` is to the app what ``subprocess.Popen`` is. What runs is the
trainer, in a process of its own, under ``supervised_run``, with the flags and files that the app gave.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ADDRESS = "SHIRA_TEST_TRAINER"  # environment variable: the server's socket
ROOT = Path(__file__).parents[2]


class Started:
    """A forked trainer, started and followed as a ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str], stdin: Any, stdout: Any, stderr: Any):
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb", buffering=0)
        self._code: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        _until_there(Path(os.environ[ADDRESS]))
        self._server.connect(os.environ[ADDRESS])
        request = json.dumps({"command": list(command), "cwd": str(cwd), "env": dict(env)}).encode()
        socket.send_fds(self._server, [len(request).to_bytes(8, "little")], [read, stdout.fileno()])
        os.close(read)
        self._server.sendall(request)
        self.pid = int.from_bytes(self._server.recv(8), "little")

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            end = None if timeout is None else time.monotonic() + timeout
            while self.poll() is None:
                if end and time.monotonic() > end:
                    raise subprocess.TimeoutExpired("trainer", timeout or 0)
                time.sleep(0.02)
        return self._code  # type: ignore[return-value]

    def poll(self) -> int | None:
        if self._code is None:
            try:
                told = self._server.recv(8, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            except BlockingIOError:
                return None
            self._code = int.from_bytes(told, "little", signed=True)
        return self._code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _until_there(address: Path) -> None:
    end = time.monotonic() + 60
    while not address.exists():
        assert time.monotonic() < end, "the warm trainer has not started"
        time.sleep(0.05)


def subprocess_with_forks() -> SimpleNamespace:
    """What ``app.training.trainings`` uses of the module ``subprocess``."""
    return SimpleNamespace(**{**vars(subprocess), "Popen": Started})


@contextmanager
def server(folder: Path) -> Iterator[None]:
    """A server for the tests of this process."""
    address = folder / "trainer"
    process = subprocess.Popen([sys.executable, "-m", "tests.app.warm", str(address)], cwd=ROOT)
    os.environ[ADDRESS] = str(address)
    yield
    del os.environ[ADDRESS]
    process.kill()
    process.wait()


def serve(address: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are gone without being waited for
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            _start(connection)
        connection.close()


def _start(connection: socket.socket) -> None:
    """In a child of the server: start the trainer as a child of its own, wait, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, (stdin, log), _, _ = socket.recv_fds(connection, 8, 2)
    request = json.loads(connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for source, target in ((stdin, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = ["supervised_run", *request["command"][3:]]  # python -m app.training.supervised_run ...
        from app.training import supervised_run

        supervised_run.main()
        sys.exit()
    os.close(stdin)
    connection.sendall(pid.to_bytes(8, "little"))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(code.to_bytes(8, "little", signed=True))
    os._exit(0)


if __name__ == "__main__":
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from shira_diffusers.dreambooth import command_line, train  # noqa: F401

    torch.set_num_threads(1)
    serve(sys.argv[1])
