"""One self-contained HTML page from the result of `engram look`: pictures inside, tables beside them. No scripts, no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from engram.plots.look import PHRASE_COLUMNS, named_subjects
from engram.plots.report import heat_map, html_page

__all__ = ["render_look"]

_HEADINGS = {
    "gates": ("Gates", "How far the memory is let in, by token and layer. White: closed. Dark red: open."),
    "phrases": (
        "Ends of phrases",
        "Mean gate at the last token of the phrases that were named, beside the end of their first word, their last word where it stands "
        "elsewhere, and the ends of other words. 95 % intervals over documents.",
    ),
    "logit_lens": (
        "Logit lens",
        "Divergence of what the model would say after each block from what it says in the end; lower means that it knew earlier. "
        "Shaded: 95 % interval over documents.",
    ),
    "cka": (
        "Similarity of layers",
        "Linear CKA, unbiased, on the same tokens. The dashed line is the soft alignment index: the mean block of the other model, "
        "weighted by similarity, of the most similar ones.",
    ),
    "memory_off": (
        "Memory switched off",
        "What is lost when the trained memory is off at inference. Accuracy kept: accuracy off over on. Gain kept: advantage over "
        "guessing evenly, off over on. 95 % intervals over documents.",
    ),
    "rows": ("Rows", "What each head read, and what an even hash would give for as many n-grams (black marks)."),
    "zipf": (
        "Accesses and caches",
        "Frequency of rows by rank, and hit rates: the most frequent rows of this very text from the beginning, or those read last (LRU, "
        "starting empty).",
    ),
    "gains": ("N-grams", "Bits won and lost with the memory on, by the longest n-gram read before the predicted token."),
}


def render_look(result: Mapping[str, Any], pictures: Mapping[str, Sequence[Path]]) -> str:
    """The page for a result of ``engram look`` and the pictures that ``plot_look`` drew of it."""
    sections = [f"<h1>{escape('engram look: ' + result['model'])}</h1>", f"<p class=quiet>{escape(_provenance(result))}</p>"]
    sections.append(_texts(result))
    result = named_subjects(result)
    for name, (heading, explanation) in _HEADINGS.items():
        if name in result:
            images = "".join(_image(path) for path in pictures.get(name, ()))
            sections.append(f"<h2>{escape(heading)}</h2><p class=quiet>{escape(explanation)}</p>{images}")
            sections.append(_TABLES[name](result[name]))
        elif name in result["skipped"]:
            sections.append(f"<h2>{escape(heading)}</h2><p class=quiet>Left out: {escape(result['skipped'][name])}.</p>")
    return html_page(f"engram look: {result['model']}", sections)


def _provenance(result: Mapping[str, Any]) -> str:
    told = result.get("provenance", {})
    versions = ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items())
    parts = [told.get("command"), f"against {result['against']}" if result["against"] else None, told.get("hardware"), versions]
    return " | ".join(part for part in parts if part)


def _texts(result: Mapping[str, Any]) -> str:
    lines = [_read("Run through the model", result["text"])]
    if result["text_hashed"]:
        lines.append(_read("Hashed for rows and caches", result["text_hashed"]))
    return "".join(lines)


def _read(what: str, text: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {entry['tokens']:,} ({entry['documents']} documents)" for kind, entry in text["kinds"].items())
    share = "all of the text" if text["complete"] else "a part of the text"
    return f"<p>{what}: {text['tokens']:,} tokens, {share}, in windows of at most {text['window']:,}: {escape(kinds)}.</p>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, all escaped here."""
    head = "".join(f"<th{' class=n' if i else ''}>{escape(h)}</th>" for i, h in enumerate(headings))
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _interval(entry: Mapping[str, Any], factor: float = 1.0, form: str = ".3f") -> str:
    if entry["mean"] is None:
        return "–"
    ends = "" if entry["low"] is None else f" [{factor * entry['low']:{form}}, {factor * entry['high']:{form}}]"
    return f"{factor * entry['mean']:{form}}{ends}"


def _gates(result: Mapping[str, Any]) -> str:
    maps = "".join(f"<p class=quiet>{escape(text['kind'])}</p>{heat_map(text)}" for text in result["texts"])
    rows = [
        (
            f"{kind}, layer {layer}",
            f"{e['read']:,} of {e['positions']:,}",
            *(_number(e[key]) for key in ("mean", "p5", "median", "p95", "open")),
        )
        for kind, layers in result["kinds"].items()
        for layer, e in layers.items()
    ]
    return maps + _table(("text", "positions that read", "mean", "5 %", "median", "95 %", "share above 0.5"), rows)


def _phrases(result: Mapping[str, Any]) -> str:
    told = (
        f"<p>{result['occurrences']:,} occurrences of {len(result['phrases']):,} phrases in {result['documents']:,} documents; the most "
        f"frequent: {escape(', '.join(list(result['phrases'])[:_SHOWN_PHRASES]))}. Not found: {len(result['not_found']):,}"
        f"{escape(': ' + ', '.join(result['not_found'][:_SHOWN_PHRASES])) if result['not_found'] else ''}.</p>"
    )
    rows = [
        (f"layer {layer}", *(_interval(entry[name]) for name in PHRASE_COLUMNS)) for layer, entry in result["layers"].items()
    ]
    examples = [
        (
            e["phrase"],
            " ".join(f"{t['token'].strip()} {', '.join(f'{g:.2f}' for g in t['gates'].values())};" for t in e["tokens"]),
        )
        for e in result["examples"][:_SHOWN_PHRASES]
    ]
    return told + _table(("mean gate", *PHRASE_COLUMNS.values()), rows) + _table(("phrase", "tokens and their gates"), examples)


_SHOWN_PHRASES = 12


def _logit_lens(result: Mapping[str, Any]) -> str:
    names = list(result["subjects"])
    blocks = max(len(curve) for curve in result["subjects"].values())
    rows = [
        (f"block {i}", *(_interval(result["subjects"][n][i]) if i < len(result["subjects"][n]) else "" for n in names))
        for i in range(blocks)
    ]
    return _table(("KL, nats per token", *names), rows)


def _cka(result: Mapping[str, Any]) -> str:
    rows = [
        (f"block {i}", f"{index:.2f}", f"{max(line):.3f}")
        for i, (index, line) in enumerate(zip(result["soft_alignment"], result["map"]))
    ]
    return _table((result["a"], f"soft alignment, block of {result['b']}", "largest CKA"), rows)


def _memory_off(result: Mapping[str, Any]) -> str:
    groups = {"all": result["all"], **result["by_kind"], **{f"token: {name}": g for name, g in result["by_token"].items()}}
    rows = [
        (
            name,
            f"{g['tokens']:,}",
            str(g["documents"]),
            *(_interval(g[key]) for key in ("loss_on", "loss_off", "lost")),
            *(_interval(g[key], 100, ".1f") for key in ("accuracy_kept", "gain_kept")),
        )
        for name, g in groups.items()
    ]
    headings = ("", "tokens", "documents", "loss on", "loss off", "lost", "accuracy kept, %", "gain kept, %")
    return _table(headings, rows)


def _rows(result: Mapping[str, Any]) -> str:
    rows = []
    for layer, entry in result["layers"].items():
        for order in sorted({head["order"] for head in entry["heads"]}):
            heads = [head for head in entry["heads"] if head["order"] == order]
            mean = {
                key: sum(h[key] for h in heads) / len(heads) for key in ("rows", "ngrams", *_ROW_SHARES, "ngrams_per_used_row")
            }
            even = {key: sum(h["expected"][key] for h in heads) / len(heads) for key in ("used_share", "sharing")}
            rows.append(
                (
                    f"layer {layer}, order {order}",
                    f"{mean['rows']:,.0f}",
                    f"{mean['ngrams']:,.0f}",
                    f"{100 * mean['used_share']:.2f} ({100 * even['used_share']:.2f})",
                    f"{mean['ngrams_per_used_row']:.3f}",
                    f"{100 * mean['sharing_ngrams']:.2f} ({100 * even['sharing']:.2f})",
                    f"{100 * mean['sharing_accesses']:.2f}",
                )
            )
    headings = ("mean over heads", "rows", "n-grams", "rows read, % (even hash)", "n-grams per row read")
    return _table((*headings, "n-grams that share, % (even hash)", "accesses to shared rows, %"), rows)


_ROW_SHARES = ("used_share", "sharing_ngrams", "sharing_accesses")


def _zipf(result: Mapping[str, Any]) -> str:
    size = result["row_bytes"]
    rows: list[tuple[str, ...]] = []
    for layer, entry in result["layers"].items():
        if not entry["accesses"]:
            rows.append((f"layer {layer}", "0", "–", "", ""))
            continue
        for name, label in (("lfu", "most frequent rows"), ("lru", "LRU")):
            needed = entry["needed"][name]
            cells = (f"{needed[t]:,} ({needed[t] * size / 1024:,.0f} KiB)" if needed[t] else "none" for t in needed)
            rows.append((f"layer {layer}, {label}", _number(entry["fit"]["exponent"], ".2f"), *cells))
    targets = next((list(e["needed"]["lfu"]) for e in result["layers"].values() if e["accesses"]), [])
    return _table(("rows needed for a hit rate", "exponent", *(f"{100 * float(t):.0f} %" for t in targets)), rows)


def _gains(result: Mapping[str, Any]) -> str:
    told = (
        f"<p>{_interval(result['per_token'], 1, '+.4f')} bits per token; {result['ngrams']:,} different n-grams before "
        f"{result['tokens']:,} tokens: {result['gained']:+,.1f} bits by those that gain, {result['lost']:+,.1f} by those that lose.</p>"
    )
    rows = [
        (repr(e["ngram"]), repr(e["next"]), str(e["count"]), f"{e['bits']:+.2f}", f"{e['bits_per_token']:+.3f}")
        for e in (*result["top_gains"], *result["top_losses"])
    ]
    return told + _table(("n-gram", "next", "count", "bits", "bits per token"), rows)


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gates": _gates,
    "phrases": _phrases,
    "logit_lens": _logit_lens,
    "cka": _cka,
    "memory_off": _memory_off,
    "rows": _rows,
    "zipf": _zipf,
    "gains": _gains,
}
