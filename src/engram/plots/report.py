"""One self-contained HTML page from a demo's result: bars, tables and a token-by-gate heat map. No scripts, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["gate_colour", "heat_map", "html_page", "render_report"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
img{max-width:100%}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:inline-block;height:.75rem;vertical-align:middle;border-radius:2px}.was{background:#bbb}.is{background:#c62f2d}
.track{display:inline-block;width:14rem;background:#f3f3f3;border-radius:2px}
.tok{display:inline-block;padding:.05rem .12rem;margin:.06rem 0;border:1px solid #eee;white-space:pre;font:13px/1.5 ui-monospace,monospace}
.written{border-bottom:2px solid #222}.quiet{color:#666}code{font:13px ui-monospace,monospace;background:#f5f5f5;padding:0 .2rem}
"""


def gate_colour(gate: float) -> str:
    """CSS colour of a gate in 0..1: white, through light and full red, to dark red, as in the paper's heat map."""
    stops = [(255, 255, 255), (252, 187, 161), (239, 59, 44), (103, 0, 13)]
    place = min(max(gate, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    share = place - left
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(stops[left], stops[left + 1]))
    return f"rgb({red},{green},{blue})"


def render_report(result: Mapping[str, Any]) -> str:
    """The page for the result of ``engram demo`` (see ``engram.cli.demo`` for its fields)."""
    sections = [
        "<h1>engram: what the memory learnt, and what it left alone</h1>",
        f"<p class=quiet>{escape(_provenance(result))}</p>",
        "<h2>Exact answers</h2>",
        _bars(result["categories"]),
        "<h2>What must not move</h2>",
        _unmoved(result),
        "<h2>With the memory on and off</h2>",
        _examples(result["examples"]),
        "<h2>Gates, token by token</h2>",
        "<p class=quiet>White: closed (0), or only empty rows are read. Dark red: open (1). Underlined: a row that was written is read.</p>",
        *(heat_map(trace) for trace in result["traces"]),
    ]
    return html_page("engram demo", sections)


def html_page(title: str, sections: Sequence[str]) -> str:
    """A page of its own from sections that are HTML already."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _provenance(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['command']} | model {result['model']} | seed {result['seed']} | {result['seconds']} s on {result['hardware']} | {versions}"


def _bars(categories: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in categories:
        before, after = (100 * entry[key] / entry["prompts"] for key in ("before", "after"))
        rows.append(
            f"<tr><td>{escape(entry['category'])}</td><td class=n>{entry['prompts']}</td>"
            f"<td><span class=track><span class='bar was' style='width:{before:.1f}%'></span></span><br>"
            f"<span class=track><span class='bar is' style='width:{after:.1f}%'></span></span></td>"
            f"<td class=n>{before:.0f} %<br><b>{after:.0f} %</b></td></tr>"
        )
    return f"<table><tr><th>category</th><th class=n>prompts</th><th>before (grey), after (red)</th><th></th></tr>{''.join(rows)}</table>"


def _unmoved(result: Mapping[str, Any]) -> str:
    rows = []
    if result.get("capitals"):
        known = result["capitals"]
        rows.append(("capitals the base model knew, still right", f"{known['still_right']} of {known['known']}"))
        rows.append(("capital answers changed, right or wrong", f"{known['changed']} of {known['prompts']}"))
    bits = result["bits_per_byte"]
    rows.append(
        ("held-out bits per byte", f"{bits['before']:.4f} before, {bits['after']:.4f} after ({bits['change_percent']:+.3f} %)")
    )
    drift = result["drift"]
    rows.append(("KL to the base model on neutral prompts", f"{drift['mean_kl']:.2e} nats per token"))
    rows.append(("next tokens changed on neutral prompts", f"{drift['tokens_changed']} of {drift['tokens']}"))
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _examples(examples: Sequence[Mapping[str, str]]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(e['prompt'])}</code></td><td>{escape(e['off']) or '<i>nothing</i>'}</td><td><b>{escape(e['on'])}</b></td></tr>"
        for e in examples
    )
    return f"<table><tr><th>prompt</th><th>memory off</th><th>memory on</th></tr>{rows}</table>"


def heat_map(trace: Mapping[str, Any]) -> str:
    """Tokens coloured by their gates (mean over streams), one line per layer: ``{tokens: [{token, layers: [{layer_id, gate, written}]}]}``."""
    lines = []
    for index, layer in enumerate(trace["tokens"][0]["layers"]):
        spans = []
        for token in trace["tokens"]:
            entry = token["layers"][index]
            # A gate in front of empty rows lets nothing in, however far it stands open.
            gate = sum(entry["gate"]) / len(entry["gate"]) if entry["written"] else 0.0
            ink = "#fff" if gate > 0.6 else "#222"
            text = escape(token["token"]).replace("\n", "\\n")
            written = " written" if entry["written"] else ""
            spans.append(
                f"<span class='tok{written}' title='gate {gate:.2f}' style='background:{gate_colour(gate)};color:{ink}'>{text}</span>"
            )
        lines.append(f"<p><span class=quiet>layer {layer['layer_id']}</span> {''.join(spans)}</p>")
    return "".join(lines)
