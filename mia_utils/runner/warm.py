"""``python -m mia_utils.runner.warm MODULE ARGS`` is ``python -m MODULE ARGS`` without the seconds of its imports.

A run starts one server that has imported everything; a call is a fork of it with the caller's arguments, environment,
folder and output. Where there is no server (another node, a single job), the module simply runs.
"""

import contextlib
import importlib
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
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

# in this order: the first training begins when the first of them is there
IMPORTS = ("mia_utils.pretrain.loop", "mia_utils.protocol.splits", "sklearn.linear_model", "papermill")
IMPORTS += ("ipykernel.kernelapp", "ipykernel.ipkernel", "mia_utils.attacks", "mia_utils.plots")
IMPORTS += ("mia_utils.lab", "mia_utils.course", "mia_utils.page")
# matplotlib reads the kernels' backend when it is imported; a look for GPUs must not start CUDA before the fork
ENVIRONMENT = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


@contextlib.contextmanager
def start(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Start a server; yields the environment in which calls find it.

    It ends when no process holds its standard input any more: the engine inherits it, so the server outlives a caller
    that is killed as long as there is work.
    """
    with tempfile.TemporaryDirectory(prefix="mia-", dir="/tmp") as folder:  # a socket's path has at most 107 characters
        address = f"{folder}/warm"
        with socket.socket(socket.AF_UNIX) as listener:  # here, so that nobody calls before it is there
            listener.bind(address)
            listener.listen(64)
            fd = listener.fileno()
            command = [sys.executable, "-P", "-m", "mia_utils.runner.warm", "--serve", str(fd)]
            server = subprocess.Popen(command, env=environment | ENVIRONMENT, stdin=subprocess.PIPE, pass_fds=[fd])
        with server:
            os.set_inheritable(server.stdin.fileno(), True)
            try:
                yield environment | {"MIA_WARM": address}
            finally:
                server.terminate()


def serve(fd: int) -> None:
    """Answer calls until standard input is closed; imports what is missing while nobody calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(fileno=fd) as listener:
        importlib.import_module(IMPORTS[0])
        missing = list(IMPORTS[1:])
        while True:
            ready = select.select([listener, sys.stdin], [], [], 0 if missing else None)[0]
            if sys.stdin in ready:
                return
            if ready:
                connection, _ = listener.accept()
                with connection:
                    if os.fork() == 0:
                        listener.close()
                        _answer(connection)
            elif missing:
                importlib.import_module(missing.pop(0))


def _answer(connection: socket.socket) -> NoReturn:
    """Be the process that was called for, and end with its exit code, or when the caller ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 1
    try:
        for own, given in enumerate(socket.recv_fds(connection, 1, 3)[1]):
            os.dup2(given, own)
            os.close(given)
        call = json.loads(connection.makefile("rb").readline())
        os.environ.clear()
        os.environ.update(call["environment"])
        os.chdir(call["folder"])
        connection.sendall(b"taken\n")
        threading.Thread(target=_end_with_caller, args=(connection,), daemon=True).start()
        run_module(call["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        connection.sendall(b"%d\n" % code)
    os._exit(code)


def _end_with_caller(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)
    os._exit(1)


def run_module(arguments: list[str]) -> None:
    """Be ``python -m ARGUMENTS`` in this process."""
    sys.argv = arguments
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # the server has it, and runs it again
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def main(arguments: list[str]) -> int:
    """Run a module in a fork of the server, else here; returns its exit code."""
    if arguments[0] == "--serve":
        serve(int(arguments[1]))
        return 0
    taken, call = False, {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ.get("MIA_WARM", ""))
        socket.send_fds(server, [b"+"], [0, 1, 2])
        server.sendall(json.dumps(call).encode() + b"\n")
        answer = server.makefile("rb")
        if taken := bool(answer.readline()):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the fork, too; jupyter before it ends
            return int(answer.readline() or 1)
    if not taken:
        run_module(arguments)
    return int(taken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
