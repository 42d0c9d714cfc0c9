"""Why a model with a memory says what it says: token by token, which facts spoke and what difference they made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from engram.data.facts import room_for_answer, tokenize_prompt
from engram.editing.editor import MemoryEditor
from engram.editing.ledger import answer_room
from engram.evaluation.generation import generate_greedily
from engram.models.devices import input_device
from engram.tables import ABSENT

__all__ = ["Explanation", "Hit", "TokenReason", "explain"]

_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Hit:
    """An n-gram that was found in one layer."""

    layer_id: int
    order: int
    ngram: str
    rows: list[int]
    """Rows read, one per head."""
    gate: list[float]
    """Gate of every residual stream, 0 to 1; 1 where values are added without one (``EngramConfig.fuse``)."""
    facts: list[str]
    """Ids of the facts that own the rows."""


@dataclass(frozen=True)
class TokenReason:
    """One position."""

    position: int
    token: str
    says: str
    """Most likely next token, with the memory."""
    says_off: str
    """Most likely next token of the base model."""
    logit_change: float
    """Logit of ``says``, with the memory less without."""
    kl: float
    """KL(base || with memory) of the next-token distribution, nats."""
    hits: list[Hit]
    foreign_rows: int
    """Written rows that this position's n-grams point at but that belong to other n-grams: their tags differ, so they read zero."""


@dataclass(frozen=True)
class Explanation:
    """One prompt and its answer through the memory."""

    prompt: str
    answer: str
    tokens: list[TokenReason]
    facts: dict[str, float]
    """For every fact that spoke: by how much it raised the log probability of the answer, nats (with all facts, less without this
    one)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


@torch.no_grad()
def explain(editor: MemoryEditor, prompt: str, max_new_tokens: int | None = None) -> Explanation:
    """Answer ``prompt`` greedily and say, for every token of prompt and answer, what the memory did there.

    Args:
        editor: of the memory to explain.
        prompt: what is asked.
        max_new_tokens: longest answer; 32, or as long as the longest fact, if not given; shorter where the model's context ends.

    Raises:
        DataError: the prompt fills the model's context.
    """
    memory, tokenizer = editor.memory, editor.tokenizer
    device = input_device(memory)
    prompt_ids = tokenize_prompt(tokenizer, prompt)
    if not prompt_ids:  # a tokenizer without a beginning-of-text token, and an empty prompt
        return Explanation(prompt, "", [], {})
    if max_new_tokens is None:
        max_new_tokens = answer_room(editor.facts, _ANSWER_TOKENS)
    max_new_tokens = min(max_new_tokens, room_for_answer(memory.config, len(prompt_ids)))
    asked = torch.tensor([prompt_ids], device=device)
    said = generate_greedily(memory, tokenizer, asked, torch.ones_like(asked), max_new_tokens)
    with memory.record() as traces:
        on = memory(input_ids=said, use_cache=False).logits[0].float()
    traces = dict(traces)
    with memory.disable_engram():
        off = memory(input_ids=said, use_cache=False).logits[0].float()
    ids = said[0].tolist()
    hits = _hits(editor, ids, traces)
    foreign = _foreign_rows(editor, said)
    tokens = [_reason(tokenizer, ids, t, on[t], off[t], hits[t], foreign[t]) for t in range(len(ids))]
    answer = tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True).strip()
    return Explanation(prompt, answer, tokens, _shares(editor, said, len(prompt_ids), on, hits))


def _reason(tokenizer: Any, ids: list[int], t: int, on: Tensor, off: Tensor, hits: list[Hit], foreign: int) -> TokenReason:
    best, best_off = int(on.argmax()), int(off.argmax())
    log_on, log_off = on.log_softmax(-1), off.log_softmax(-1)
    return TokenReason(
        position=t,
        token=tokenizer.decode([ids[t]]),
        says=tokenizer.decode([best]),
        says_off=tokenizer.decode([best_off]),
        logit_change=round(float(on[best] - off[best]), 4),
        kl=float((log_off.exp() * (log_off - log_on)).sum()),
        hits=hits,
        foreign_rows=foreign,
    )


def _hits(editor: MemoryEditor, ids: list[int], traces: dict[int, dict[str, Tensor]]) -> list[list[Hit]]:
    """What was read at every position."""
    heads = editor.memory.engram_config.n_head_per_ngram
    hits: list[list[Hit]] = [[] for _ in ids]
    for layer_id, trace in traces.items():
        layer = str(layer_id)
        slots, table = trace["slots"][0], editor.table(layer)
        stored = table.row_ids[slots.clamp_min(0)] if table.stored_rows else slots
        owners = editor.owners(layer, stored[slots != ABSENT].tolist())
        for t, column in (slots.unflatten(-1, (-1, heads)) != ABSENT).any(-1).nonzero().tolist():
            order = column + 2
            of_order = slice(column * heads, (column + 1) * heads)
            rows = [int(row) for row, slot in zip(stored[t, of_order], slots[t, of_order]) if slot != ABSENT]
            text = editor.tokenizer.decode(ids[max(t - order + 1, 0) : t + 1])
            facts = list(dict.fromkeys(fact for row in rows for fact in owners[row]))
            gate = [round(g, 4) for g in trace["gate"][0, t].float().tolist()]
            hits[t].append(Hit(layer_id, order, text, rows, gate, facts))
    return hits


def _foreign_rows(editor: MemoryEditor, ids: Tensor) -> list[int]:
    """Per position, written rows whose tag is another n-gram's."""
    count = torch.zeros(ids.shape[1], dtype=torch.int64)
    for layer_id, (hash_ids, tags) in editor.memory.mapping.hash_with_tags(ids).items():
        home = editor.memory.engrams[str(layer_id)].multi_head_embedding
        owner = editor.table(str(layer_id)).owner_tags(home.row_ids(hash_ids.to(home.offsets.device)))
        count += ((owner != 0) & (owner != tags.to(owner.device)))[0].sum(-1).cpu()
    return count.tolist()


def _shares(editor: MemoryEditor, ids: Tensor, start: int, on: Tensor, hits: list[list[Hit]]) -> dict[str, float]:
    """What the answer loses in log probability without each fact that spoke."""
    spoke = list(dict.fromkeys(fact for at in hits for hit in at for fact in hit.facts))
    full = _log_probability(on, ids, start)
    shares = {}
    for fact_id in spoke:
        with editor.holdings.without([fact_id]):
            logits = editor.memory(input_ids=ids, use_cache=False).logits[0].float()
        shares[fact_id] = round(full - _log_probability(logits, ids, start), 4)
    return shares


def _log_probability(logits: Tensor, ids: Tensor, start: int) -> float:
    """Log probability of the tokens from ``start`` on, nats."""
    picked = logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:].unsqueeze(1))
    return float(picked.sum())
