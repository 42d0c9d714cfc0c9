import signal
import subprocess
import sys

import pytest

from tests.children import run_python

TELLS = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['TOLD']); sys.stderr.write('low'); sys.exit(3)"


def test_a_forked_program_sees_and_says_what_one_of_its_own_interpreter_would(tmp_path):
    given = {"cwd": tmp_path, "env": {"TOLD": "so"}}
    found = run_python("-c", TELLS, "a", 1, **given)
    expected = subprocess.run([sys.executable, "-c", TELLS, "a", "1"], capture_output=True, text=True, check=False, **given)
    assert (found.returncode, found.stdout, found.stderr) == (3, expected.stdout, "low")


def test_how_a_forked_program_ends_is_told():
    assert run_python("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    broken = run_python("-c", "1 / 0")
    assert broken.returncode == 1
    assert "ZeroDivisionError" in broken.stderr
    with pytest.raises(subprocess.CalledProcessError):
        run_python("-c", "raise SystemExit(2)", check=True)
    assert run_python("-m", "engram", "--version").stdout.strip()
