"""The same facts and patterns by LoRA, full fine-tuning, prompt stuffing, Engram, and Engram with LoRA: recall and harm of each.

Everything runs on the bundled base model and is asked the same prompts, taught and held out. LoRA and fine-tuning see every taught prompt
with its answer (loss on the answer only) for the same number of epochs; stuffing puts the three nearest taught prompts with their answers
in front of the question. A seed that is in the result file already is skipped.
"""

import argparse
import copy
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from common import add_entries, entries_of, result_file
from peft import LoraConfig, get_peft_model

from engram import MemoryEditor, load_bundled, load_facts
from engram.data.facts import encode_fact, join_answer, pad_right, tokenize_prompt
from engram.data.texts import load_texts
from engram.evaluation import Answer, ask, check_facts, score_by_category, wilson_interval
from engram.models.router import _mean_states

BUNDLED = Path(__file__).parents[1] / "src" / "engram" / "bundled"
PATTERNS = ("code_idiom", "factual_recall", "format_transform", "error_fix")
NEIGHBOURS = 3


def train(model, tokenizer, facts, epochs, lr, seed):
    """Cross-entropy on answers; returns the loss before and after."""
    rows = [row for i, fact in enumerate(facts) for row in encode_fact(tokenizer, fact, i)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator, size = torch.Generator().manual_seed(seed), 64
    steps = epochs * ((len(rows) + size - 1) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(epochs):
        order, total, tokens = torch.randperm(len(rows), generator=generator).tolist(), 0.0, 0
        for start in range(0, len(order), size):
            batch = [rows[i] for i in order[start : start + size]]
            ids, mask = pad_right([row.ids for row in batch], 1)
            target = ids[:, 1:].clone()
            for number, row in enumerate(batch):
                target[number, : len(row.prompt_ids) - 1] = -100
            target[mask[:, 1:] == 0] = -100
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            count = int((target != -100).sum())
            total, tokens = total + loss.item() * count, tokens + count
        losses.append(total / tokens)
    return {"loss_first_epoch": losses[0], "loss_last_epoch": losses[-1]}


class Stuffed:
    """Questions with the nearest taught prompts and their answers in front."""

    def __init__(self, model, tokenizer, facts):
        self.model, self.tokenizer = model, tokenizer
        self.known = [(prompt, fact.answer) for fact in facts for prompt in fact.prompts]
        self.states = F.normalize(_mean_states(model, tokenizer, [prompt for prompt, _ in self.known]), dim=1)

    def stuff(self, prompts):
        near = F.normalize(_mean_states(self.model, self.tokenizer, prompts), dim=1) @ self.states.T
        stuffed = []
        for prompt, best in zip(prompts, near.topk(NEIGHBOURS).indices.tolist()):
            shots = [self.known[i][0] + join_answer(*self.known[i]) for i in reversed(best)]
            stuffed.append("\n".join([*shots, prompt]))
        return stuffed


@torch.no_grad()
def harm(on, off, tokenizer, texts, change=lambda prompts: prompts):
    """KL(base || system) and changed next tokens over the positions of the texts; ``change`` may put something in front of a text."""
    kl, tokens, changed, same = 0.0, 0, 0, 0
    for text in texts:
        own = torch.tensor([tokenize_prompt(tokenizer, text)])
        given = torch.tensor([tokenize_prompt(tokenizer, change([text])[0])])
        shared = own.shape[1] - (given.shape[1] > own.shape[1])  # without the opening token, which stands elsewhere then
        with off() as model:
            base = model(input_ids=own, use_cache=False).logits[0, -shared:].float()
        with on() as model:
            got = model(input_ids=given, use_cache=False).logits[0, -shared:].float()
        kl += float(F.kl_div(got.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="sum"))
        changed += int((got.argmax(-1) != base.argmax(-1)).sum())
        tokens += shared
        same += int(torch.equal(got, base))
    return {"kl": kl / tokens, "tokens": tokens, "tokens_changed": changed, "untouched": same / len(texts)}


def judge(on, off, tokenizer, facts, texts, capitals, stuffing=None):
    change = stuffing.stuff if stuffing else lambda prompts: prompts

    def answers(group, held_out=False):
        with on() as model:
            if stuffing is None:
                return check_facts(model, tokenizer, group, held_out=held_out)
            asked = [(i, p, f.answer) for i, f in enumerate(group) for p in (f.held_out if held_out else f.prompts)]
            said = ask(model, tokenizer, change([p for _, p, _ in asked]), 32, batch_size=64)
            return [Answer(i, p, a, text.split("\n")[0].strip()) for (i, p, a), text in zip(asked, said)]

    def shares(given):
        result = {}
        for score in score_by_category(facts, given):
            low, high = wilson_interval(score.exact, score.prompts)
            result[score.category] = {
                "prompts": score.prompts,
                "exact": score.exact,
                "share": score.share,
                "low": low,
                "high": high,
            }
        return result

    asked = answers(capitals)
    return {
        "categories": shares(answers(facts)),
        "categories_held_out": shares(answers(facts, held_out=True)),
        # "known" is how many were asked: the base itself misses one.
        "capitals": {"known": len(asked), "still_right": sum(a.exact for a in asked)},
        "harm": harm(on, off, tokenizer, texts, change),
    }


def one_seed(seed, epochs, facts, texts, capitals):
    torch.manual_seed(seed)
    base, tokenizer = load_bundled()
    result = {}

    @contextmanager
    def plain():
        yield base

    def add(name, on, started, extra=None, stuffing=None):
        seconds = time.perf_counter() - started
        result[name] = {"seconds": seconds, **(extra or {}), **judge(on, plain, tokenizer, facts, texts, capitals, stuffing)}
        taught = result[name]["categories"].values()
        print(
            f"  {name}: {sum(c['exact'] for c in taught)} of {sum(c['prompts'] for c in taught)}, {seconds:.0f} s", flush=True
        )

    add("base", plain, time.perf_counter())
    started = time.perf_counter()
    add("prompt stuffing", plain, started, stuffing=Stuffed(base, tokenizer, facts))

    tuned, started = copy.deepcopy(base), time.perf_counter()
    tuned.requires_grad_(True)
    extra = train(tuned, tokenizer, facts, epochs, 1e-3, seed)
    add(
        "full fine-tuning",
        lambda: nullcontext(tuned.eval()),
        started,
        {**extra, "bytes": sum(p.numel() * 4 for p in tuned.parameters())},
    )

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted, started = get_peft_model(copy.deepcopy(base), config), time.perf_counter()
    extra = train(adapted, tokenizer, facts, epochs, 3e-3, seed)
    size = sum(p.numel() * 4 for p in adapted.parameters() if p.requires_grad)
    add("LoRA", lambda: nullcontext(adapted.eval()), started, {**extra, "bytes": size})

    editor, started = MemoryEditor.create(copy.deepcopy(base), tokenizer, seed=seed), time.perf_counter()
    editor.teach(facts)
    add("Engram", lambda: nullcontext(editor.memory), started, {"bytes": _rows(editor)})

    # Both in one model: LoRA for the patterns, the memory for everything, taught on top of it; each can be switched off alone.
    both, started = get_peft_model(copy.deepcopy(base), config), time.perf_counter()
    train(both, tokenizer, [f for f in facts if f.category in PATTERNS], epochs, 3e-3, seed)
    both.eval()
    joined = MemoryEditor.create(both.base_model.model, tokenizer, seed=seed)
    joined.teach(facts)
    add("Engram + LoRA", lambda: nullcontext(joined.memory), started, {"bytes": size + _rows(joined)})
    return result


def _rows(editor):
    tables = [editor.table(layer) for layer in editor.memory.engrams]
    return sum(x.numel() * x.element_size() for t in tables for x in (t.row_ids, t.tags, t.weight))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30, help="other than the usual ones needs --out")
    parser.add_argument("--every", type=int, default=1, help="only every n-th fact, for trying the script; needs --out")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "baselines.json", "epochs", "every")
    facts = [*load_facts(BUNDLED / "facts.yaml"), *load_facts(BUNDLED / "patterns.yaml")][:: args.every]
    texts = [text for group in load_texts(BUNDLED / "none_of_its_business.yaml").values() for text in group[::3]]
    capitals = load_facts(BUNDLED / "capitals.yaml")[:: 2 * args.every]
    for seed in args.seeds:
        if not any(run["seed"] == seed for run in entries_of(out, "runs")):
            print(f"seed {seed}", flush=True)
            systems = one_seed(seed, args.epochs, facts, texts, capitals)
            add_entries(out, "runs", [{"seed": seed, "epochs": args.epochs, "systems": systems}], "seed")


if __name__ == "__main__":
    main()
