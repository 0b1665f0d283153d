"""A call of the warm server is the process that it stands for: output, environment, folder, exit code, its end."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mia_utils.runner import warm

SCRIPT = """
import os, sys
print(sys.argv[1:], os.environ["WORD"], os.getcwd(), "torch" in sys.modules, os.getppid())
print("to stderr", file=sys.stderr)
sys.exit(7)
"""
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Folder whose modules can be run."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="module")
def server(modules):
    with warm.start(get_environment(modules)) as environment:
        yield environment


def get_environment(modules: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(modules), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "WORD": "a b"}


def start(modules: Path, folder: Path, text: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    name = f"called_{next(NUMBERS)}"
    (modules / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "mia_utils.runner.warm", name, *arguments]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_call_has_its_own_arguments_environment_folder_output_and_exit_code(server, modules, tmp_path, is_warm):
    environment = server if is_warm else server | {"MIA_WARM": str(tmp_path / "nobody")}
    call = start(modules, tmp_path, SCRIPT, environment, "a", "{b}")
    out, error = call.communicate(timeout=200)
    assert out.startswith(f"['a', '{{b}}'] a b {tmp_path} {is_warm} ") and error == "to stderr\n"
    assert call.returncode == 7
    assert (int(out.split()[-1]) == os.getpid()) != is_warm  # a child of the server, or of this test


def test_an_exception_is_its_traceback_and_the_next_call_is_answered(server, modules, tmp_path):
    call = start(modules, tmp_path, "raise ValueError('no')", server)
    assert call.communicate(timeout=200)[1].endswith("ValueError: no\n") and call.returncode == 1
    assert start(modules, tmp_path, "", server).wait(200) == 0


def test_a_call_ends_with_its_caller(server, modules, tmp_path):
    text = "import os, time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    call, pid = start(modules, tmp_path, text, server), tmp_path / "pid"
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    fork = psutil.Process(int(pid.read_text()))
    call.kill()
    call.wait()
    assert psutil.wait_procs([fork], timeout=60)[1] == []


def test_everything_that_a_server_imports_is_there():
    assert all(importlib.util.find_spec(name) for name in warm.IMPORTS)
