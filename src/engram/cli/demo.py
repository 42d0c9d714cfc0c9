"""`engram demo`: teach a real model facts it does not know, and show what moved and what did not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.loading import DeviceOption, ModelDtypeOption, Running
from engram.cli.outputs import command_line, made_with, new_console, print_whole

if TYPE_CHECKING:
    from engram.data.facts import Fact

__all__ = ["demo_command"]

_FACTS = Path(__file__).parent.parent / "bundled"
_HELD_OUT_CHARACTERS = 120_000
_EXAMPLES = 3


def demo_command(
    facts: Annotated[Path | None, typer.Option(help="Facts to teach (YAML). Default: the bundled ones.")] = None,
    model: Annotated[str, typer.Option(help="Base model: a folder, a hub name or 'bundled'.")] = "bundled",
    out: Annotated[Path, typer.Option(help="Folder for report.html, result.json and the memory.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Random seed.")] = 0,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
) -> None:
    """Teach a small real model new facts, and show what changed.

    Before and after it is asked the facts, things that it knew already, and text that should not change.
    """
    import torch
    from rich.text import Text

    from engram.checkpoint import lock_store
    from engram.data.facts import load_facts
    from engram.errors import CheckpointError

    running = Running(device, model_dtype)
    running.check()
    console = new_console()
    taught = load_facts(facts or _FACTS / "facts.yaml")
    _refuse_to_lose(out / "memory", taught)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").touch()
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}; choose another folder with --out.") from None
    started = time.monotonic()
    torch.manual_seed(seed)
    base, tokenizer = running.load(model)
    demo = _Demo(base, tokenizer, taught, seed, console, knows_capitals=model == "bundled")
    demo.run()
    with lock_store(out / "memory"):
        _refuse_to_lose(out / "memory", taught)  # somebody may have taught it more meanwhile
        demo.editor.save(out / "memory", overwrite=True)  # a demo may be shown again
    result = demo.result(
        command=_command(facts, model, seed, running), model=model, seed=seed, seconds=round(time.monotonic() - started)
    )
    _show(result)
    _write(out, result)
    print(f"report: {out / 'report.html'}   figures: {out / 'result.json'}   memory: {out / 'memory'}   {result['seconds']} s")
    if demo.report.not_exact:
        missed = [fact.prompts[0] for fact in taught if fact.id in demo.report.not_exact]
        told = Text.assemble((f"not exact ({len(missed)}):", "bold red"), " ", ", ".join(missed[:10]))
        console.print(told, soft_wrap=True)
        raise typer.Exit(1)


def _refuse_to_lose(memory: Path, facts: list[Fact]) -> None:
    """Refuse to write over a memory that holds anything but these facts."""
    from engram.checkpoint import DESCRIPTION_NAME, read_description, read_ledger
    from engram.data.facts import quoted
    from engram.editing.ledger import Ledger, what_it_says
    from engram.errors import ConfigError

    if not (memory / DESCRIPTION_NAME).exists():
        return
    ledger = read_ledger(memory, read_description(memory))
    if ledger is None:
        raise ConfigError(f"{memory} holds a memory that no demo made; choose another folder with --out.")
    taught = set(map(what_it_says, facts))
    others = [fact for fact in Ledger.from_dict(ledger) if what_it_says(fact) not in taught]
    if others:
        raise ConfigError(
            f"{memory} holds {len(others)} facts that are not among those of this demo ({quoted(others[0].prompts[0].text)} for one), and "
            "would be written over; choose another folder with --out."
        )


def _command(facts: Path | None, model: str, seed: int, running: Running) -> str:
    return command_line("demo", options=(("facts", facts), ("model", model), ("seed", seed))) + running.options()


@dataclass
class _Side:
    """Everything measured once before and once after teaching."""

    answers: list[Any]
    capitals: list[Any]
    bits: float


@dataclass
class _Demo:
    base: Any
    tokenizer: Any
    facts: list[Any]
    seed: int
    console: Any
    knows_capitals: bool
    sides: list[_Side] = field(default_factory=list)

    def run(self) -> None:
        from engram.data.corpus import held_out_standard_library
        from engram.data.facts import encode_fact, load_facts
        from engram.editing import MemoryEditor
        from engram.models.positions import context_length

        for index, fact in enumerate(self.facts):  # a fact too long for the model is refused before any work is done
            encode_fact(self.tokenizer, fact, index, context_length(self.base.config))
        self.capitals = load_facts(_FACTS / "capitals.yaml") if self.knows_capitals else []
        self.texts = _first_characters([doc.text for doc in held_out_standard_library()], _HELD_OUT_CHARACTERS)
        self.editor = MemoryEditor.create(self.base, self.tokenizer, seed=self.seed)
        self.memory = self.editor.memory
        kinds = self.memory.num_parameters_by_kind()
        print(
            f"base model: {kinds['base']:,} parameters, frozen. {len(self.facts)} facts to teach. memory: empty, at block "
            f"{self.memory.engram_config.layer_ids[0]}."
        )
        self.sides.append(self._measure("before"))
        self._teach()
        self.sides.append(self._measure("after"))

    def _teach(self) -> None:
        total = sum(len(fact.prompts) for fact in self.facts)
        with _progress(self.console, "teaching", total) as bar:
            self.report = self.editor.teach(self.facts, progress=lambda learnt, _: bar(completed=learnt))

    def _measure(self, when: str) -> _Side:
        from engram.evaluation import bits_per_byte, check_facts

        prompts = sum(len(fact.prompts) for fact in [*self.facts, *self.capitals])
        with _progress(self.console, f"asking, {when}", prompts) as bar:
            answers = check_facts(self.memory, self.tokenizer, self.facts, progress=lambda n: bar(advance=n))
            capitals = (
                check_facts(self.memory, self.tokenizer, self.capitals, progress=lambda n: bar(advance=n))
                if self.capitals
                else []
            )
        return _Side(answers, capitals, bits_per_byte(self.memory, self.tokenizer, self.texts))

    def result(self, **provenance: Any) -> dict[str, Any]:
        """Everything shown, as JSON-ready fields; ``plots.report`` draws from nothing else."""
        from engram.errors import DataError
        from engram.evaluation import compare_answers, measure_drift, score_by_category, trace_text
        from engram.yaml_text import parse_yaml

        before, after = self.sides
        scores = zip(score_by_category(self.facts, before.answers), score_by_category(self.facts, after.answers))
        neutral = parse_yaml((_FACTS / "neutral_prompts.yaml").read_text(encoding="utf-8"), "the neutral prompts", DataError)
        examples = _spread(range(len(before.answers)), _EXAMPLES)
        traced = [before.answers[i].prompt + _space(before.answers[i].prompt) + after.answers[i].said for i in examples]
        return {
            **provenance,
            **made_with(),
            "facts": len(self.facts),
            "steps": self.report.steps,
            "rows_written": self.report.rows_written,
            "categories": [
                {"category": was.category, "prompts": was.prompts, "before": was.exact, "after": now.exact}
                for was, now in scores
            ],
            "capitals": compare_answers(before.capitals, after.capitals) if before.capitals else None,
            "bits_per_byte": {
                "before": before.bits,
                "after": after.bits,
                "change_percent": 100 * (after.bits / before.bits - 1),
                "characters": sum(map(len, self.texts)),
            },
            "drift": asdict(measure_drift(self.memory, self.tokenizer, neutral)),
            "examples": [
                {"prompt": before.answers[i].prompt, "off": before.answers[i].said, "on": after.answers[i].said}
                for i in examples
            ],
            "traces": [trace_text(self.memory, self.tokenizer, text).to_dict() for text in [*traced, neutral[0]]],
        }


def _space(prompt: str) -> str:
    from engram.data.facts import join_answer

    return join_answer(prompt, "")


def _spread(items: range, count: int) -> list[int]:
    """A few indices, evenly over the range."""
    count = min(count, len(items))
    return [items[len(items) * i // count] for i in range(count)]


def _first_characters(texts: list[str], limit: int) -> list[str]:
    """Texts up to a total length, each cut so that many files are represented."""
    share = max(1000, limit // max(len(texts), 1))
    return [text[:share] for text in texts]


@contextmanager
def _progress(console: Any, what: str, total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda **change: progress.update(task, **change)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="exact answers")
    for heading in ("category", "prompts", "before", "after"):
        table.add_column(heading, justify="left" if heading == "category" else "right")
    for entry in result["categories"]:
        shares = (f"{100 * entry[key] / entry['prompts']:.0f} %" for key in ("before", "after"))
        table.add_row(entry["category"], str(entry["prompts"]), *shares)
    print_whole(table)
    still = Table(title="what must not move", show_header=False)
    if result["capitals"]:
        known = result["capitals"]
        still.add_row("capitals the base knew, still right", f"{known['still_right']} of {known['known']}")
    bits, drift = result["bits_per_byte"], result["drift"]
    still.add_row("held-out bits per byte", f"{bits['before']:.4f} -> {bits['after']:.4f} ({bits['change_percent']:+.3f} %)")
    still.add_row("KL to the base on neutral prompts", f"{drift['mean_kl']:.1e} nats per token")
    print_whole(still)
    for example in result["examples"]:
        print(f"{example['prompt']!r}\n   memory off: {example['off']!r}\n   memory on:  {example['on']!r}")


def _write(out: Path, result: dict[str, Any]) -> None:
    from engram.checkpoint import write_json_atomically, write_text_atomically
    from engram.plots import render_report

    write_json_atomically(out / "result.json", result)
    write_text_atomically(out / "report.html", render_report(result))
