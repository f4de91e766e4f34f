"""Python processes that need not import torch, diffusers and the trainer, which saves each of them seven seconds.

``python("-m", "module")`` is a command for ``subprocess`` as ``[sys.executable, "-m", "module"]`` is. What it starts
hands its arguments, folder, environment and streams to a server, which forks a process that runs them; signals are
passed on to that process, and its exit code or signal comes back. All workers of pytest-xdist share one server.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ADDRESS = "SHIRA_TEST_PYTHON"  # environment variable: the server's socket
ROOT = Path(__file__).parents[1]
UNLOADED = """
import sys
for name in [name for name in sys.modules if name.startswith("shira_")]:
    del sys.modules[name]
"""
"""What a program begins with that starts before our modules are imported."""


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-SE", __file__, os.environ[ADDRESS], *arguments]


def start() -> Callable[[], None]:
    """Start the server, which imports when it is first asked; it ends by what is returned, or with this process."""
    folder = tempfile.TemporaryDirectory(prefix="shira-")
    os.environ[ADDRESS] = f"{folder.name}/python"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[ADDRESS])
        listener.listen()
        serve = f"from tests.warm import serve; serve({listener.fileno()})"
        command = [sys.executable, "-c", serve]
        server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])

    def end() -> None:
        server.communicate()
        folder.cleanup()
        del os.environ[ADDRESS]

    return end


def serve(listening: int) -> None:
    """Until standard input ends."""
    listener = socket.socket(fileno=listening)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are gone without being waited for
    while select.select([listener, 0], [], [])[0] == [listener]:
        if "tests.tiny" not in sys.modules:
            _import()
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _follow(connection)
        connection.close()


def _import() -> None:
    import torch

    from shira_diffusers.dreambooth import command_line, train  # noqa: F401
    from tests import tiny  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each fork takes a second, as it ends, to visit what was imported


def _follow(connection: socket.socket) -> None:
    """In a child of the server: run the command in a child of its own, and tell how that ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _run(streams, **json.loads(request))
    os.setpgid(pid, pid)
    for stream in streams:
        os.close(stream)

    def end_with_client() -> None:
        with suppress(OSError):
            connection.recv(1)
            os.killpg(pid, signal.SIGKILL)

    threading.Thread(target=end_with_client, daemon=True).start()
    with suppress(OSError):
        connection.sendall(pid.to_bytes(8, "little"))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        connection.sendall(code.to_bytes(8, "little", signed=True))
    os._exit(0)


def _run(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *_]:
            sys.argv = arguments[:1] + arguments[2:]
            exec(code, {"__name__": "__main__"})
        case [script, *_]:
            sys.argv = arguments
            runpy.run_path(script, run_name="__main__")


def main() -> None:
    """What ``python`` starts."""
    address, *arguments = sys.argv[1:]
    passed_on = signal.SIGINT, signal.SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    told = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    request = json.dumps(told).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(request)
    pid = int.from_bytes(server.recv(8), "little")
    for number in passed_on:
        signal.signal(number, lambda number, _: os.killpg(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    code = int.from_bytes(server.recv(8), "little", signed=True)
    if code < 0:
        for number in passed_on:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
