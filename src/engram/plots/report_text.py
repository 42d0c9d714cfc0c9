"""The report as a short paper in Markdown. Every number is computed from results, or the paper's own and named so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.errors import first_of
from engram.experiments.sweep_evidence import paper_shares
from engram.plots.figure import Picture
from engram.plots.markdown import count, interval, literal_text, plural, table
from engram.plots.report_counts import counts_beside, counts_in_short
from engram.plots.report_limits import limits
from engram.plots.report_looks import copying, easier_questions, long_context, looks, throughput
from engram.plots.report_seeds import looks_by_seed, memory_off
from engram.plots.report_sweeps import (
    ANSWERS,
    contamination,
    experts_as_control,
    failures,
    measured,
    progress,
    protocol,
    repeats,
    tuning,
)
from engram.plots.results import SWEEPS, ResultFile, reading

__all__ = ["Report"]

_HEADINGS = {
    "allocation": "Experts or memory",
    "slots": "Size of the tables",
    "ablation": "Ablations",
    "comparison": "Arms side by side",
    "look": "Looks inside",
    "looks": "Looks inside, seed by seed",
    "memory_off": "With the memory off",
    "copying": "Copying from the context",
    "long_context": "Long context",
    "throughput": "Throughput",
}
_QUESTIONS = {
    "allocation": "At equal parameters and equal operations, what share of the parameters that are not always used should be experts, and what "
    "share rows of memory?",
    "slots": "With the backbone fixed, what does a larger table bring?",
    "ablation": "What does each part of the layer contribute? Differences are to the arm `reference`, seed by seed.",
    "comparison": "The same text and tokens spent on other models; differences are to the arm that is named, seed by seed.",
    "look": "What the memory does to a trained model.",
    "looks": "What of that holds over several trainings.",
    "memory_off": "Facts and reading are learnt together, with a memory. What is lost when it is switched off?",
    "copying": "When does a model learn to copy what stood in its context before, which recall over long text is built on?",
    "long_context": "What is found again in long text.",
    "throughput": "What a training step costs with a memory and without.",
}
_NO_RESULT = {kind: f"no result of a sweep with the question `{kind}`" for kind in SWEEPS} | {
    "look": "no result of `engram look`",
    "looks": "no result of `benchmarks/looks.py`",
    "memory_off": "no result of `benchmarks/memory_off.py`",
    "copying": "no result of `benchmarks/copying.py`",
    "long_context": "no result on long context (`engram recall`)",
    "throughput": "no result of `benchmarks/throughput.py`",
}
_OTHERS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "look": looks,
    "looks": looks_by_seed,
    "memory_off": memory_off,
    "copying": copying,
    "long_context": long_context,
    "throughput": throughput,
}

_NAMED = 4
"""Results that a title names."""


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Args:
        files: results; kinds without a section are left out.
        pictures: by the name of their result.
        verdicts: claims and what results say about them (``engram.experiments.claims.judge``).
        paper: the paper's own figures (``engram.experiments.paper``).
        command: what was typed for it.
        study: whether it is this project's own study; else it is named after the results, and only what they measure has a place in it.
    """

    files: Sequence[ResultFile]
    pictures: Mapping[str, Sequence[Picture]]
    verdicts: Sequence[Mapping[str, Any]]
    paper: Mapping[str, Any]
    command: str = "engram plot"
    study: bool = True

    def markdown(self, link: Callable[[Path], str]) -> str:
        """The report.

        Args:
            link: how the text refers to a picture.

        Raises:
            DataError: a result lacks something that its kind has.
        """
        with reading("one of the results"):
            return "\n\n".join(part for part in self._parts(link) if part) + "\n"

    def _parts(self, link: Callable[[Path], str]) -> list[str]:
        return [
            f"# {self._title()}",
            *self._opening(),
            "## Protocol",
            *self._protocol(),
            *(part for kind in _HEADINGS for part in self._section(kind, link)),
            "## What agrees with the paper, and what does not",
            *self._agreement(),
            "## What this scale cannot show",
            limits(self._sweeps(), self.verdicts, self.paper, experts_as_control(self._sweeps())),
            "## How to make this again",
            *self._provenance(),
        ]

    def _of(self, kind: str) -> list[ResultFile]:
        return [file for file in self.files if file.kind == kind]

    def _sweeps(self) -> dict[str, Mapping[str, Any]]:
        return {file.name: file.data for kind in SWEEPS for file in self._of(kind)}

    def _title(self) -> str:
        if self.study:
            return "Memory or experts: a small study of Engram"
        names = list(self._sweeps()) or [file.name for file in self.files]
        return f"Results: {literal_text(first_of(names, _NAMED))}"

    def _opening(self) -> Iterator[str]:
        asked = (
            "This report asks the same on small models, with every run, seed and setting in the result files it is made from."
            if self.study
            else "This report tells what the results it was given measured, and what that says about the claims of these authors."
        )
        yield (
            f"Engram ({self.paper['source']}) gives a language model hashed n-gram tables to look things up in. Its authors report that a "
            f"budget divided between experts and memory beats experts alone. {asked}"
        )
        found = Counter(entry["verdict"] for entry in self.verdicts)
        judged = sum(number for verdict, number in found.items() if verdict != "not measured")
        claims_judged = len({entry["claim"] for entry in self.verdicts if entry["verdict"] != "not measured"})
        if not judged:
            yield f"**In short:** {'nothing has been measured yet' if self.study else 'no claim of the paper is measured here'}."
            return
        parts = [f"{text}: {found[verdict]}" for verdict, text in _IN_SHORT.items()]
        claims = "claim was" if found["not measured"] == 1 else "claims were"
        yield (
            f"**In short:** {plural(judged, 'judgement')} on {plural(claims_judged, 'claim')} of the paper ({'; '.join(parts)}); "
            f"{found['not measured']} {claims} not measured. {_by_claim(self.verdicts)} Judgements of one claim hang together, and so do those "
            "that share a control."
        )
        lines = [line for file in self._of("allocation") for line in (*_best_shares(file), *counts_in_short(self._rival(file)))]
        if lines:
            yield "\n".join(lines)

    def _protocol(self) -> Iterator[str]:
        sweeps = self._sweeps()
        if not sweeps:
            yield "*Not measured: no result of a sweep.*"
            return
        yield protocol(sweeps)
        yield (
            "Parameters leave embeddings and head out; active are those a token is multiplied with. Settings are chosen by the validation "
            "half of the held-out text, everything reported is the loss on its test half, in nats per token. Intervals of means and of "
            "differences are 95 % by Student's t over seeds, differences taken seed by seed; those of fits likewise, with a fit for each seed. "
            "Operations per token count attention over all positions, masked ones included; embeddings, head and the mixing of residual "
            "streams are left out. Losses in nats per token belong to a tokenizer: beside the paper's only signs compare."
        )
        yield measured(sweeps)
        yield repeats(sweeps)
        bases = {name: _base(result) for name, result in sweeps.items()}
        yield "\n".join(
            f"- Base of {literal_text(name)}: `{base}`; all else at its default." for name, base in bases.items() if base
        )
        texts = {result["data"]["fingerprint"]: result["data"]["counts"] for result in sweeps.values()}
        for number, (fingerprint, counts) in enumerate(texts.items()):
            yield f"**Text{f' {number + 1}' if len(texts) > 1 else ''}** (fingerprint `{fingerprint[:12]}`)"
            yield _text_table(counts)
            yield self._contamination(fingerprint)
        remarks = [
            f"- {literal_text(name)}: {literal_text(text)}"
            for name, result in sweeps.items()
            if (text := result["recipe"].get("remarks"))
        ]
        if remarks:
            yield "\n".join(["**Remarks**", "", *remarks])
        yield "**Learning rates**"
        yield "\n".join(f"- {line}" for name, result in sweeps.items() if (line := tuning(name, result)))

    def _contamination(self, fingerprint: str) -> str:
        files = [file for file in self._of("corpus") if file.data["fingerprint"] == fingerprint]
        if not files:
            return "*What the held-out text shares with the training text was not measured: no result of `engram corpus` on this text.*"
        return contamination(files[0].data)

    def _section(self, kind: str, link: Callable[[Path], str]) -> Iterator[str]:
        files = self._of(kind)
        if not files and not self.study:
            return
        yield f"## {_HEADINGS[kind]}"
        yield _QUESTIONS[kind]
        if not files:
            yield f"*Not measured: {_NO_RESULT[kind]}.*"
        for file in files:
            if len(files) > 1:
                yield f"### {literal_text(file.name)}"
            with reading(f"result {file.name} ({file.kind})"):
                yield from self._result(file, link)
        if kind == "allocation" and files:
            yield self._paper_scale()

    def _result(self, file: ResultFile, link: Callable[[Path], str]) -> Iterator[str]:
        if file.is_sweep:
            yield progress(file.data)
            yield failures(file.data)
        for picture in self.pictures.get(file.name, ()):
            yield f"![{literal_text(picture.path.stem)}]({link(picture.path)})"
            yield f"*{literal_text(picture.caption)}*"
        if not file.is_sweep:
            yield from _OTHERS[file.kind](file.data)
        elif file.data["points"]:
            rival = self._rival(file)
            yield from ANSWERS[file.kind]({**file.data, "rival": rival})
            if rival is not None:
                yield from counts_beside(rival)

    def _rival(self, file: ResultFile) -> Mapping[str, Any] | None:
        """Counts of the very text of an allocation."""
        found = (f.data for f in self._of("ngram_counts") if f.data["text"] == file.data["data"]["fingerprint"])
        return next(found, None) if file.kind == "allocation" else None

    def _paper_scale(self) -> str:
        scales = "; ".join(entry["scale"] for entry in self.paper["allocation"].values())
        return f"The paper's points ({self.paper['source']}) are of models at {scales}."

    def _agreement(self) -> Iterator[str]:
        told = [entry for entry in self.verdicts if self.study or entry["verdict"] != "not measured"]
        if told:
            yield self._how_judged()
            yield table(("claim", "the paper", "here, with 95 % interval", "from", "verdict"), list(map(_row, told)))
        if left := [entry["statement"] for entry in self.verdicts if entry not in told]:
            yield f"Not measured by these results: {literal_text('; '.join(left))}."

    def _how_judged(self) -> str:
        first, last, below, above = (f"{100 * share:.0f}" for share in paper_shares())
        return (
            f"Each claim of the paper ({self.paper['source']}) is judged by the interval alone. *Agrees*: all of it has the sign that was "
            "claimed. *Disagrees*: all of it has the other. *Cannot tell*: it includes zero, there is none, or what the last but one column "
            "says stands against it. A U-shape also asks for a lowest point below 100 % and for a loss that is seen to rise again at the "
            "smallest share; the gain of the best share must exceed the spread between seeds; and of two models asked about long text, one "
            f"must find more than copying noted numbers at random would. A best share from {below} to {above} % counts as the paper's, which "
            f"calls {first} to {last} % best and whose grid has no shares between these and {below} or {above} %: it agrees if it is clearly "
            f"better than every share outside. Any other best share disagrees if it is clearly better than all from {first} to {last} %."
        )

    def _provenance(self) -> Iterator[str]:
        lines = []
        for file in self.files:
            told = {**file.data.get("provenance", {}), **file.data}
            versions = ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items())
            harder = "asks harder questions now" if file.kind == "long_context" and easier_questions(file.data) else ""
            command = f"`{told['command']}`" if "command" in told else "command not recorded"
            parts = [command, harder, told.get("hardware"), versions]
            lines.append(f"- {literal_text(file.name)}: {'; '.join(part for part in parts if part)}")
        lines.append(f"- this report: `{self.command}`")
        yield "\n".join(lines)


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One verdict of the table."""
    return (
        literal_text(entry["statement"]),
        literal_text(entry["paper"]),
        _estimate(entry),
        literal_text("; ".join(filter(None, [entry["where"], entry["note"]]))),
        f"**{entry['verdict']}**",
    )


_IN_SHORT = {"agrees": "agree", "disagrees": "disagree", "cannot tell": "cannot tell"}


def _by_claim(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """How many claims all judgements that can tell agree with, contradict, or are at odds about."""
    of_claim: dict[str, set[str]] = {}
    for entry in verdicts:
        if entry["verdict"] != "not measured":
            of_claim.setdefault(entry["claim"], set()).add(entry["verdict"])
    found = Counter(frozenset(told - {"cannot tell"}) for told in of_claim.values())
    kinds = {
        "agree": {"agrees"},
        "disagree": {"disagrees"},
        "are judged either way": {"agrees", "disagrees"},
        "cannot be told": set[str](),
    }
    parts = [f"{number} {text}" for text, told in kinds.items() if (number := found[frozenset(told)])]
    return f"Claim by claim, by the judgements that can tell: {', '.join(parts)}."


def _best_shares(file: ResultFile) -> Iterator[str]:
    done, wanted = len(file.data["points"]), file.data["expected_points"]
    unfinished = f" ({done} of {plural(wanted, 'point')} so far)" if done < wanted else ""
    for budget, summary in file.data["summary"].items():
        best = summary.get("best")
        if best is not None and best["gain"] is not None:
            where = literal_text(file.name if budget == "all" else f"{file.name}, {budget}")
            gain = interval(best["gain"], signed=True)
            yield (
                f"- {where}: with {100 * best['rho']:.0f} % experts, the best share with a memory by validation loss, the test loss differs "
                f"from experts alone by {gain} nats{unfinished}."
            )


def _base(result: Mapping[str, Any]) -> str:
    flat = []
    for part, value in (result["recipe"].get("base") or {}).items():
        fields = {f"{part}.{k}": v for k, v in value.items() if k != "corpus"} if isinstance(value, Mapping) else {part: value}
        flat += [f"{name}={field}" for name, field in fields.items()]
    return ", ".join(flat).replace("`", "'")


def _text_table(counts: Mapping[str, Any]) -> str:
    rows = [
        (
            literal_text(split.replace("_", " ")),
            literal_text(kind),
            *(count(sizes[key]) for key in ("documents", "bytes", "tokens")),
        )
        for split, kinds in counts.items()
        for kind, sizes in kinds.items()
    ]
    return table(("split", "kind", "documents", "bytes", "tokens"), rows, right=(2, 3, 4))


def _estimate(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "–"
    digits = 1 if entry["unit"] in ("%", "percentage points") else 4
    shown = interval({"mean": entry["value"], "low": entry["low"], "high": entry["high"]}, digits, signed=entry["unit"] != "%")
    return f"{shown} {literal_text(entry['unit'])}"
