"""Python in a process of its own, forked from one that has the libraries loaded: most tests would otherwise wait four seconds for them.

Where a fresh interpreter is what is tested (what is imported, a variable read at import, memory used), use ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

LOADED = ["engram.testing", "engram.editing", "engram.training", "transformers.models.llama.modeling_llama"]


def run_python(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, check=check, capture_output=True, text=True)``.

    Args:
        arguments: "-c" and code, or "-m" and a module, then the program's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "out"), Path(folder, "err")
        command = [str(argument) for argument in arguments]
        process = _forked(command, dict(os.environ if env is None else env), cwd or Path.cwd(), outputs)
        process.start()
        process.join()
        said = [file.read_text() if file.exists() else "" for file in outputs]
    done = subprocess.CompletedProcess(command, process.exitcode, *said)
    if check:
        done.check_returncode()
    return done


def _forked(command: list[str], environment: dict[str, str], place: Path, outputs: tuple[Path, Path]) -> BaseProcess:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LOADED)
    return server.Process(target=_run, args=(command, environment, place, outputs))


def _run(command: list[str], environment: dict[str, str], place: Path, outputs: tuple[Path, Path]) -> None:
    for stream, file in enumerate(outputs, 1):
        written = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(written, stream)
        os.close(written)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    option, program, *rest = command
    sys.argv = [option, *rest]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), main.__dict__)
