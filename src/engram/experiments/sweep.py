"""Running a sweep: every point in a process and a folder of its own, finished ones skipped, the rest resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engram.checkpoint import sole_writer, write_json_atomically
from engram.data.store import TokenStore, moved_versions
from engram.errors import CheckpointError, DataError, first_of
from engram.experiments.arms import base_fields
from engram.experiments.data import prepare_data
from engram.experiments.point import RESULT
from engram.experiments.summary import summarise
from engram.experiments.sweep_recipe import Choice, Point, SweepRecipe, check_distinct
from engram.experiments.worker import FAILED, FATAL
from engram.training.cpu_types import warning_of_slow_bfloat16
from engram.training.stops import STOPS, signals_given_back

__all__ = ["SweepRun", "changes_since", "kept_aside", "run_sweep"]

_TASK = "task.json"
_KEPT = ("points", "tuning", "other_points")
"""Where a result holds entries of points."""
_STOPS_LIKE_CTRL_C = [number for number in STOPS if number != signal.SIGINT]
Show = Callable[[str], None]


@dataclass
class SweepRun:
    """A sweep under way.

    Args:
        recipe: what to run.
        folder: what paths of the recipe are relative to.
        out: run folder: ``data``, and a folder for each point.
        known: a result of this sweep made before, whose points need not be run again.
        workers: points at a time.
        threads: threads of each.
        show: told about every point.
        save: given the result so far after every point.
        retry: run points again that failed for good, by a loss that is no number. What failed for another reason (memory, a kill)
            is run again anyway.
    """

    recipe: SweepRecipe
    folder: Path
    out: Path
    known: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    threads: int = 1
    show: Show = print
    save: Callable[[dict[str, Any]], None] = lambda result: None
    retry: bool = False

    def __post_init__(self) -> None:
        self._children: set[subprocess.Popen] = set()
        self._stopping = threading.Event()
        self._known = _entries(self.known)
        self.failures: list[dict[str, Any]] = []

    def run(self, tuning_only: bool = False, limit: int | None = None) -> dict[str, Any]:
        """Prepare the data, choose learning rates, run the points; returns the sweep's result so far.

        Args:
            tuning_only: stop when learning rates are chosen.
            limit: start at most so many points of each stage; 0 sums up what there is.

        Raises:
            CheckpointError: ``out`` holds a point made on other text, or the disk is full.
            DataError: the corpus cannot be used.
        """
        store = self._prepare()
        groups = self.recipe.tuning_points()
        tried = [point for points in groups.values() for point in points]
        tuning = self._run_all(tried, limit, lambda done: self._collect(store, done, {}, [], {}))
        ended = {*tuning, *(failure["digest"] for failure in self.failures if failure["for_good"])}
        decided = {choice: points for choice, points in groups.items() if ended.issuperset(p.digest for p in points)}
        self._tell_of_undecided([points for choice, points in groups.items() if choice not in decided])
        rates = {choice: rate for choice, points in decided.items() if (rate := _choose(points, tuning)) is not None}
        ready = [p for p in self.recipe.points(rates) if self.recipe.choice_of(p.labels) in {None, *rates}]
        check_distinct(ready)
        if tuning_only or not ready:
            limit = 0  # what is finished stays in the result
        done = self._run_all(ready, limit, lambda done: self._collect(store, tuning, rates, ready, done))
        return self._collect(store, tuning, rates, ready, done)

    def _prepare(self) -> TokenStore:
        first = self.recipe.recipe_of(next(self.recipe.combinations()), self.recipe.seeds[0])
        data = prepare_data(first.data, self.folder, self.out / "data")
        _ = data.held_out  # text that is too short is an error here, not in every point
        other = self.known.get("data", {}).get("fingerprint")
        fingerprint = data.store.fingerprint
        if other is not None and other != fingerprint:
            raise DataError(
                f"the given result was made with other text (fingerprint {other[:12]}, here {fingerprint[:12]}): "
                f"{_why_other_text(self.known, self.recipe, data.store)}. Use that text (docs/experiments.md says how to have it again), or "
                "begin a result of its own."
            )
        self._fingerprint = fingerprint
        return data.store

    def _run_all(
        self, points: Sequence[Point], limit: int | None, collect: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Results by digest; points that failed are missing and noted. What ``collect`` makes of them is saved after each."""
        results = {p.digest: self._known[p.digest] for p in points if p.digest in self._known}
        todo = [p for p in {p.digest: p for p in points}.values() if p.digest not in results]
        finished = [p for p in todo if (self._folder(p) / RESULT).is_file()]
        results |= {p.digest: self._read(p) for p in finished}
        todo = [p for p in todo if p.digest not in results]
        lost = {p.digest: error for p in todo if not self.retry and (error := self._failed_for_good(p))}
        todo = [p for p in todo if p.digest not in lost][:limit]
        self.failures += list(lost.values())
        told = f", {len(lost)} failed before" if lost else ""
        self.show(f"{self.recipe.name}: {len(results)} of {len(points)} points are finished{told}, {len(todo)} to run")
        self._tell_of_slow_types(todo)
        self.save(collect(results))
        started, total = time.monotonic(), len(todo)
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            waiting: dict[Future, Point] = {pool.submit(self._run_one, p): p for p in todo}
            try:
                while waiting:
                    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ended:
                        self._note(waiting.pop(future), future.result(), results, len(points))
                        self.save(collect(results))
                    self._tell_time_left(time.monotonic() - started, total - len(waiting), total)
            except BaseException:
                self._stop(waiting)
                raise
        return results

    def _tell_of_undecided(self, choices: Sequence[Sequence[Point]]) -> None:
        """Say which choices wait for a run that ended early (killed, out of memory): it may be the best, and nothing is chosen without it."""
        failed = {failure["digest"]: failure["point"] for failure in self.failures}
        for points in choices:
            if names := [failed[p.digest] for p in points if p.digest in failed]:
                self.show(
                    f"no learning rate is chosen at {points[0].at} yet, and no point that depends on it is run: {first_of(names, 3)} ended "
                    "early (see failures). The same command tries again."
                )

    def _tell_of_slow_types(self, todo: Sequence[Point]) -> None:
        if any(point.recipe.bf16 for point in todo) and not torch.cuda.is_available():
            warning = warning_of_slow_bfloat16("bf16: false in the recipe (points of either are not compared)")
            if warning:
                self.show(warning)

    def _tell_time_left(self, seconds: float, ended: int, total: int) -> None:
        # Points run side by side, so that the first few to end say too little.
        if self.workers <= ended < total:
            self.show(f"about {seconds / ended * (total - ended) / 60:.0f} min left of these {total}")

    def _failed_for_good(self, point: Point) -> dict[str, Any] | None:
        """The failure of a point that would fail the same way again."""
        file = self._folder(point) / FAILED
        if not file.is_file():
            return None
        error = json.loads(file.read_text(encoding="utf-8"))
        return _failure(point, error) if error.get("for_good") else None

    def _note(self, point: Point, error: dict[str, Any] | None, results: dict[str, Any], total: int) -> None:
        if error is None:
            entry = results[point.digest] = self._read(point)
            self.show(
                f"[{len(results)}/{total}] {point.role} {point.name}: validation {entry['validation']['loss']:.4f}, "
                f"test {entry['test']['loss']:.4f}, {entry['seconds']:.0f} s"
            )
        elif error.get("fatal"):
            raise CheckpointError(error["error"])
        else:
            self.failures.append(_failure(point, error))
            self.show(f"{point.role} {point.name} failed: {error['error']}")

    def _run_one(self, point: Point) -> dict[str, Any] | None:
        """None if the point finished, else what went wrong."""
        if self._stopping.is_set():
            return {"error": "not started"}
        folder = self._folder(point)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        task = {"recipe": point.recipe.to_dict(), "data": str((self.out / "data").resolve()), "threads": self.threads}
        write_json_atomically(folder / _TASK, task)
        with open(folder / "log.txt", "ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            command = [sys.executable, "-m", "engram.experiments.worker", str(folder)]
            child = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            self._children.add(child)
            if self._stopping.is_set():
                child.send_signal(signal.SIGINT)
            code = child.wait()
            self._children.discard(child)
        if code == 0:
            return None
        error = {"error": f"ended with code {code}; see {folder.relative_to(self.out) / 'log.txt'} in the run folder"}
        if (folder / FAILED).is_file():
            error = json.loads((folder / FAILED).read_text(encoding="utf-8"))
        return {**error, "fatal": True} if code == FATAL else error

    def _stop(self, waiting: Mapping[Future, Point]) -> None:
        """Let running points save a checkpoint and end."""
        self._stopping.set()
        for child in list(self._children):
            child.send_signal(signal.SIGINT)
        wait(waiting)

    def _folder(self, point: Point) -> Path:
        return self.out / ("tuning" if point.role == "tuning" else "points") / f"{point.name}-{point.digest[:6]}"

    def _read(self, point: Point) -> dict[str, Any]:
        """What the sweep's result keeps of a point."""
        result = json.loads((self._folder(point) / RESULT).read_text(encoding="utf-8"))
        if result["text"] != self._fingerprint:
            raise CheckpointError(
                f"{self._folder(point)} holds a point made on other text than {self.out / 'data'}; choose another folder for this sweep "
                "(nothing was overwritten)."
            )
        held_out = result.pop("held_out")
        names = ("counts", "tokens", "epochs", "steps", "curve", "expert_load_max", "seconds", "made_with")
        kept = {name: result[name] for name in names if name in result}
        return {
            "labels": dict(point.labels),
            "seed": point.seed,
            "digest": point.digest,
            "learning_rate": point.recipe.learning_rate,
            **held_out,
            **kept,
        }

    def _collect(
        self,
        store: TokenStore,
        tuning: Mapping[str, Any],
        rates: Mapping[Choice, float],
        points: Sequence[Point],
        done: Mapping[str, Any],
    ) -> dict[str, Any]:
        entries = [{**done[p.digest], "labels": dict(p.labels), "seed": p.seed} for p in points if p.digest in done]
        used = {*tuning, *(entry["digest"] for entry in entries)}
        learning_rates = [
            {"group": choice.group, "at": dict(choice.at), "learning_rate": rate, "edge": self._at_edge(rate)}
            for choice, rate in rates.items()
        ]
        return {
            "sweep": self.recipe.name,
            "question": self.recipe.question,
            "recipe": self.recipe.to_dict(),
            "data": {"fingerprint": store.fingerprint, "counts": store.counts, **self._installed(store)},
            "expected_points": len(list(self.recipe.combinations())) * len(self.recipe.seeds),
            "learning_rates": learning_rates,
            "tuning": sorted(
                tuning.values(), key=lambda entry: (list(entry["labels"].values()), entry["learning_rate"], entry["seed"])
            ),
            "points": entries,
            # Of a result made before, what is not (or not yet) part of this sweep: it is kept.
            "other_points": [entry for digest, entry in self._known.items() if digest not in used],
            "failures": self.failures,
            "summary": summarise(self.recipe.question, entries, self.recipe.reference),
        }

    def _installed(self, store: TokenStore) -> dict[str, Any]:
        """What the text was read off, if it is told: by this store, or else by the result that is gone on from, which has the same text."""
        found = store.description.get("installed", self.known.get("data", {}).get("installed"))
        return {} if found is None else {"installed": found}

    def _at_edge(self, rate: float) -> bool:
        grid = sorted(float(lr) for lr in self.recipe.tune.learning_rate) if self.recipe.tune else []
        return len(grid) > 1 and rate in (grid[0], grid[-1])


def _entries(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All points that a result holds, by digest."""
    return {entry["digest"]: entry for part in _KEPT for entry in result.get(part, [])}


def kept_aside(recipe: SweepRecipe, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points of a result made before that are none of this recipe's, whichever learning rates are chosen."""
    groups = recipe.tuning_points()
    rates = [dict.fromkeys(groups, float(rate)) for rate in recipe.tune.learning_rate] if recipe.tune else [{}]
    own = {point.digest for points in (*groups.values(), *map(recipe.points, rates)) for point in points}
    return [entry for digest, entry in _entries(known).items() if digest not in own]


def changes_since(recipe: SweepRecipe, known: Mapping[str, Any]) -> list[str]:
    """What this recipe has otherwise than the one that a result was last written by, in words; nothing where the result does not tell."""
    before, now = known.get("recipe"), recipe.to_dict()
    if not isinstance(before, Mapping) or not isinstance(before.get("base"), Mapping):
        return []
    there, here = base_fields(before), base_fields(now)
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    changed = [f"{name} {there.get(name, 'not set')}, now {here.get(name, 'not set')}" for name in names]
    return changed + [f"other {part}" for part in ("variants", "seeds", "tune") if before.get(part) != now[part]]


def _why_other_text(known: Mapping[str, Any], recipe: SweepRecipe, store: TokenStore) -> str:
    """What the text of a result made before differs in, as far as the two tell."""
    asked = [change for change in changes_since(recipe, known) if change.startswith(("data.corpus.", "data.vocab_size "))]
    if asked:
        return f"the recipe asks for another ({'; '.join(asked)})"
    there, here = known["data"].get("installed"), store.description.get("installed")
    if here == {}:  # nothing of the text is read off the installation
        return "files that the corpus names have changed"
    if there is None or here is None:
        return (
            "another version of Python or of an installed package, whose descriptions are text too, or changed files; "
            f"{'the result' if there is None else 'the store here'} is from before versions were written down, so which cannot be told"
        )
    # The words of token stores, which say the same of themselves.
    moved = moved_versions(there, here)
    if moved:
        return f"read off other versions than are installed here{moved}"
    return "the same versions are installed, so files that the corpus names have changed"


def _failure(point: Point, error: Mapping[str, Any]) -> dict[str, Any]:
    """What the sweep's result tells of a point that failed."""
    return {"point": point.name, "digest": point.digest, "error": error["error"], "for_good": bool(error.get("for_good"))}


def _choose(points: Sequence[Point], results: Mapping[str, Any]) -> float | None:
    """The learning rate with the lowest mean validation loss, runs that failed counting as the worst; None if all failed."""
    losses: dict[float, list[float]] = {}
    for point in points:
        entry = results.get(point.digest)
        loss = entry["validation"]["loss"] if entry else math.inf
        losses.setdefault(point.recipe.learning_rate, []).append(loss if math.isfinite(loss) else math.inf)
    means = {rate: sum(values) / len(values) for rate, values in losses.items()}
    best = min(means, key=lambda rate: means[rate])
    return best if means[best] < math.inf else None


def run_sweep(
    recipe: SweepRecipe,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    known: Mapping[str, Any] | None = None,
    workers: int = 1,
    threads: int = 1,
    show: Show = print,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    retry: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run what is missing of a sweep; see ``SweepRun``.

    Raises:
        CheckpointError: ``known`` is of another sweep, and as for ``SweepRun.run``.
        DataError: as for ``SweepRun.run``.
    """
    out = Path(out)
    if known and known.get("sweep") != recipe.name:
        raise CheckpointError(
            f"the given result is of sweep {known.get('sweep')!r}, expected {recipe.name!r}; choose another file."
        )
    with sole_writer(out, f"running a sweep in {out}"), signals_given_back(_stop_by_signal, _STOPS_LIKE_CTRL_C):
        _make_room(out)
        return SweepRun(recipe, Path(folder), out, known or {}, workers, threads, show, save, retry).run(**options)


def _make_room(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}.") from None
    if shutil.disk_usage(out).free < 1 << 26:
        raise CheckpointError(f"{out}: less than 64 MiB are free on this disk; make room first. Finished points are kept.")


def _stop_by_signal(number: int, frame: Any) -> None:
    """A scheduler's SIGTERM, or a terminal that is closed, ends a sweep as Ctrl-C does: running points save a checkpoint first."""
    raise KeyboardInterrupt("stopped; running points saved a checkpoint, and the same command goes on from there")
