"""One point of a sweep, in a process of its own: ``python -m engram.experiments.worker FOLDER``."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path

from filelock import FileLock

from engram.checkpoint import write_json_atomically
from engram.errors import EngramError, TrainingError

__all__ = ["FAILED", "FATAL", "main"]

FAILED = "failed.json"
"""File of a point that ended with an error of ours."""

FATAL = 3
"""Exit code for an error that would meet the other points as well."""


def main(folder: Path) -> int:
    """Run the task in ``FOLDER/task.json``; an error of ours is left in ``FOLDER/failed.json``, with whether it would come again."""
    import torch

    from engram.experiments.data import load_data
    from engram.experiments.point import run_point
    from engram.experiments.recipe import PointRecipe, build_fields

    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    try:
        recipe = build_fields(PointRecipe, task["recipe"], "task")
        # A sweep that was killed may have left its worker running: then its result is waited for.
        with FileLock(folder / ".lock"):
            run_point(recipe, load_data(recipe.data, Path(task["data"])), folder)
    except (EngramError, OSError) as error:
        print(f"engram: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):
            write_json_atomically(folder / FAILED, {"error": str(error), "for_good": isinstance(error, TrainingError)})
        # What cannot be written here (CheckpointError is an OSError) cannot be written by the points that follow.
        return FATAL if isinstance(error, OSError) else 1
    except KeyboardInterrupt as stopped:
        print(f"engram: {stopped}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored from birth where the sweep was started in the background
    sys.exit(main(Path(sys.argv[1])))
