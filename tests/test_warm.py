"""A process that was forked with its imports done is one as any other."""

import signal
import subprocess
from pathlib import Path

from tests import warm

ECHO = "import os, sys; print(*sys.argv, os.getcwd(), os.environ['ONE'], sys.stdin.read()); sys.exit(sys.argv[1:])"
SLEEP = "import time; print('begun', flush=True); time.sleep(60)"


def test_arguments_streams_folder_environment_and_exit_code(tmp_path: Path) -> None:
    told = {"cwd": tmp_path, "env": {"ONE": "1"}, "input": "in", "capture_output": True, "text": True}
    command = subprocess.run(warm.python("-c", ECHO, "a b"), **told)
    assert (command.returncode, command.stdout, command.stderr) == (1, f"-c a b {tmp_path} 1 in\n", "['a b']\n")
    (tmp_path / "echo.py").write_text(ECHO)
    assert subprocess.run(warm.python("echo.py"), **told).stdout == f"echo.py {tmp_path} 1 in\n"
    assert subprocess.run(warm.python("-m", "echo"), **told).stdout == f"{tmp_path / 'echo.py'} {tmp_path} 1 in\n"


def test_signals_end_it() -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(warm.python("-c", SLEEP), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(number)
            assert process.wait(60) == -number
            assert process.stdout.read() == "", "what ran has ended too: nobody can write here any more"
