"""The same facts and patterns by a dictionary, LoRA, full fine-tuning, prompt stuffing, Engram, and Engram with LoRA: recall and harm of each.

Everything runs on the bundled base model and is asked the same prompts, taught and held out. Fine-tuning and LoRA see every taught prompt
with its answer (loss on the answer only), at three rates each, with and without replay (half of the tokens of every batch are the base's own
training text), and stop as soon as every taught prompt is answered exactly, as Engram does. The first seed tries all settings; what is
reported, of all seeds, is the one with the least harm among those with the highest recall. It is chosen by other texts than those
reported. Stuffing puts the three nearest taught prompts with their answers in front of the question; the suffix dictionary is no network
at all. A part that is done stays done: until all are, results are beside the file (`.partial`), and the same command goes on from there.
"""

import argparse
import copy
import functools
import json
import math
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from common import MADE_WITH, add_workers, provenance, result_file, side_by_side, write_so_far
from peft import LoraConfig, get_peft_model

from engram import MemoryEditor, TeachSettings, load_bundled, load_facts
from engram.data.corpus import CorpusRecipe, TextSource, build_corpus
from engram.data.facts import encode_fact, join_answer, pad_right, tokenize_prompt
from engram.data.recipe import parse_corpus, read_yaml
from engram.data.texts import load_texts
from engram.evaluation import Answer, ask, check_facts, score_by_category, wilson_interval
from engram.models.router import _mean_states

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "src" / "engram" / "bundled"
PATTERNS = ("code_idiom", "factual_recall", "format_transform", "error_fix")
NEIGHBOURS = 3
BATCH = 64
REPLAYED = 32  # tokens of a piece of replayed text: as long as the texts on which harm is measured, on average
PIECES = 40  # per batch of facts: about as many tokens as those and their padding
EPOCHS = 60  # at most
NEARLY = 0.9  # of the prompts right while an epoch passes: only then it is worth asking all of them
RATES = {"full fine-tuning": (1e-3, 3e-4, 1e-4), "LoRA": (3e-3, 1e-3, 3e-4)}
ORDER = ("base", "prompt stuffing", "suffix dictionary", "full fine-tuning", "LoRA", "Engram", "Engram + LoRA")


class Task:
    """Facts to teach; texts and capitals to measure harm on, others of their kind (``dev``) to choose a setting by."""

    def __init__(self, every, quick):
        self.quick = quick
        self.facts = [*load_facts(BUNDLED / "facts.yaml"), *load_facts(BUNDLED / "patterns.yaml")][::every]
        kinds = load_texts(BUNDLED / "none_of_its_business.yaml").values()
        self.texts, self.dev_texts = (
            [text for group in kinds for text in group[first :: 30 if quick else 3]] for first in (0, 1)
        )
        capitals = load_facts(BUNDLED / "capitals.yaml")
        self.capitals, self.dev_capitals = capitals[:: 2 * every], capitals[1 :: 2 * every]

    @functools.cached_property
    def corpus(self):
        """What the bundled model was trained on; for a quick trial a little of it."""
        recipe = parse_corpus(read_yaml(ROOT / "recipes" / "train_joint.yaml")["data"]["corpus"], "train_joint.yaml")
        if self.quick:
            recipe = CorpusRecipe(texts=(TextSource("../corpus/countries.txt"),))
        return build_corpus(recipe, ROOT / "recipes").train

    def replay(self, tokenizer, pieces, seed):
        """Pieces ``[pieces, REPLAYED]`` of the training text, every document as often as the base saw it, in a seeded order."""
        generator = torch.Generator().manual_seed(seed)
        shown = [document for document in self.corpus for _ in range(document.weight)]
        ids, wanted = [], pieces * REPLAYED
        while len(ids) < wanted:
            for number in torch.randperm(len(shown), generator=generator).tolist():
                ids += tokenize_prompt(tokenizer, shown[number].text)
                if len(ids) >= wanted:
                    break
        return torch.tensor(ids[:wanted]).view(pieces, REPLAYED)[torch.randperm(pieces, generator=generator)]


@functools.cache
def task(every, quick):
    return Task(every, quick)


def train(model, tokenizer, facts, lr, limit, seed, replay=None):
    """Cross-entropy on answers, and on ``replay`` with equal weight, until all are exact or for ``limit`` epochs; what it took."""
    rows = [row for i, fact in enumerate(facts) for row in encode_fact(tokenizer, fact, i)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=limit * steps_of(len(rows)), pct_start=0.1)
    generator, losses, exact = torch.Generator().manual_seed(seed), [], False
    pieces = iter(() if replay is None else replay.split(PIECES))
    while len(losses) < limit and not exact:
        total, tokens, right = 0.0, 0, 0
        for batch in batches(rows, generator):
            loss, count, good = answer_loss(model, batch)
            total, tokens, right = total + loss.item() * count, tokens + count, right + good
            optimizer.zero_grad()
            loss.backward()
            if replay is not None:
                text_loss(model, next(pieces)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        losses.append(total / tokens)
        print(f"  epoch {len(losses)}: loss {losses[-1]:.3f}, {right} of {len(rows)} right on the way", flush=True)
        exact = right >= NEARLY * len(rows) and all_exact(model, tokenizer, facts, rows)
    return {"epochs": len(losses), "stopped_exact": exact, "loss_first_epoch": losses[0], "loss_last_epoch": losses[-1]}


def steps_of(rows):
    return math.ceil(rows / BATCH)


def batches(rows, generator):
    """Every row once. Of each four batches' worth of rows those of similar length go together: half as much is padding then."""
    order, result = torch.randperm(len(rows), generator=generator).tolist(), []
    for start in range(0, len(order), 4 * BATCH):
        some = sorted(order[start : start + 4 * BATCH], key=lambda i: len(rows[i].ids))
        result += [[rows[i] for i in some[first : first + BATCH]] for first in range(0, len(some), BATCH)]
    return [result[i] for i in torch.randperm(len(result), generator=generator).tolist()]


def answer_loss(model, batch):
    """Loss on the answers, their tokens, and how many of the rows would be answered exactly."""
    ids, mask = pad_right([row.ids for row in batch], 1)
    answer = torch.zeros_like(mask, dtype=torch.bool)
    for number, row in enumerate(batch):
        answer[number, len(row.prompt_ids) - 1 : len(row.ids) - 1] = True
    with only_at(model, answer):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    target = ids[:, 1:][answer[:, :-1]]
    wrong = torch.zeros_like(answer, dtype=torch.int64)
    wrong[answer] = (logits.detach().argmax(-1) != target).long()
    return F.cross_entropy(logits, target), len(target), int((wrong.sum(1) == 0).sum())


@contextmanager
def only_at(model, positions):
    """Inside this context the output head, a third of such a small model, computes logits ``[n, V]`` of these positions alone."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][positions],))
    try:
        yield
    finally:
        handle.remove()


def text_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def all_exact(model, tokenizer, facts, rows):
    """Whether every prompt is answered: token by token given the right ones before, which is cheap, and then as it is asked."""
    by_length = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(rows), 4 * BATCH):
        batch = by_length[start : start + 4 * BATCH]
        if answer_loss(model, batch)[2] < len(batch):
            return False
    return all(answer.exact for answer in check_facts(model, tokenizer, facts))


def trained(base, tokenizer, method, facts, part, limit, work):
    """A model trained by ``method``, what it took, and its size; reading the text to replay is nobody's training time."""
    rows, seed = sum(len(fact.prompts) for fact in facts), part["seed"]
    replay = work.replay(tokenizer, limit * steps_of(rows) * PIECES, seed) if part["replay"] else None
    torch.manual_seed(seed)
    model, clock = copy.deepcopy(base), Clock()
    if method == "LoRA":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model.requires_grad_(True)
    took = train(model, tokenizer, facts, part["lr"], limit, seed, replay)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return model.eval(), {**clock.read(), **took, "bytes": size}


class Clock:
    """Seconds on the clock and of the processor: with one thread the latter tell the work whatever else the machine does."""

    def __init__(self):
        self.started = time.perf_counter(), time.process_time()

    def read(self):
        return {"seconds": time.perf_counter() - self.started[0], "cpu_seconds": time.process_time() - self.started[1]}


class Model:
    """A model inside the context ``on``, asked as it is."""

    def __init__(self, tokenizer, on):
        self.tokenizer, self.on = tokenizer, on

    def answers(self, facts, held_out=False):
        with self.on() as model:
            return check_facts(model, self.tokenizer, facts, held_out=held_out)

    def read(self, text):
        """Logits after the tokens of a text."""
        with self.on() as model:
            return model(input_ids=torch.tensor([tokenize_prompt(self.tokenizer, text)]), use_cache=False).logits[0]


class Stuffed:
    """Questions with the nearest taught prompts and their answers in front."""

    def __init__(self, tokenizer, model, facts):
        self.model, self.tokenizer = model, tokenizer
        self.known = [(prompt, fact.answer) for fact in facts for prompt in fact.prompts]
        self.states = F.normalize(_mean_states(model, tokenizer, [prompt for prompt, _ in self.known]), dim=1)

    def stuff(self, prompts):
        near = F.normalize(_mean_states(self.model, self.tokenizer, prompts), dim=1) @ self.states.T
        stuffed = []
        for prompt, best in zip(prompts, near.topk(min(NEIGHBOURS, len(self.known))).indices.tolist()):
            shots = [self.known[i][0] + join_answer(*self.known[i]) for i in reversed(best)]
            stuffed.append("\n".join([*shots, prompt]))
        return stuffed

    def answers(self, facts, held_out=False):
        asked = [(i, p, f.answer) for i, f in enumerate(facts) for p in (f.held_out if held_out else f.prompts)]
        said = ask(self.model, self.tokenizer, self.stuff([p for _, p, _ in asked]), 32, batch_size=64)
        return [Answer(i, p, a, text.split("\n")[0].strip()) for (i, p, a), text in zip(asked, said)]

    def read(self, text):
        """Logits after the tokens of a text, without its opening token, which stands elsewhere now."""
        own, given = (tokenize_prompt(self.tokenizer, t) for t in (text, self.stuff([text])[0]))
        return self.model(input_ids=torch.tensor([given]), use_cache=False).logits[0, 1 - len(own) :]


class SuffixDictionary:
    """No network: the shortest distinctive end of every taught prompt, and its answer. Of all ends that fit, the longest speaks; where none
    fits, the base model does.

    An end is distinctive if no taught prompt with another answer ends in it; it is at least ``shortest`` tokens long, as a memory's keys
    are (a shorter prompt is one as a whole).
    """

    def __init__(self, tokenizer, facts, shortest, base):
        self.tokenizer, self.base, self.answer_of = tokenizer, base, {}
        prompts = [(tuple(tokenize_prompt(tokenizer, prompt)), fact.answer) for fact in facts for prompt in fact.prompts]
        answers = {}
        for ids, answer in prompts:
            for size in range(1, len(ids) + 1):
                answers.setdefault(ids[-size:], set()).add(answer)
        for ids, answer in prompts:
            words = len(ids) - (ids[0] == tokenizer.bos_token_id)
            sizes = range(min(shortest, words), len(ids))
            size = next((size for size in sizes if len(answers[ids[-size:]]) == 1), len(ids))
            self.answer_of[ids[-size:]] = answer
        self.longest = max(map(len, self.answer_of))

    @property
    def bytes(self):
        """Of the file it would be."""
        return len(json.dumps([[*key, answer] for key, answer in self.answer_of.items()], separators=(",", ":")).encode())

    def find(self, ids):
        ends = (tuple(ids[-size:]) for size in range(min(self.longest, len(ids)), 0, -1))
        return next((self.answer_of[end] for end in ends if end in self.answer_of), None)

    def answers(self, facts, held_out=False):
        own = self.base.answers(facts, held_out)
        found = [self.find(tokenize_prompt(self.tokenizer, answer.prompt)) for answer in own]
        return [Answer(a.fact_index, a.prompt, a.expected, a.said if said is None else said) for a, said in zip(own, found)]

    def read(self, text):
        """The base's logits, but for the places where an end fits: there the first token of the answer is certain."""
        ids, logits = tokenize_prompt(self.tokenizer, text), self.base.read(text).clone()
        for place in range(len(ids)):
            if (answer := self.find(ids[: place + 1])) is not None:
                said = self.tokenizer(join_answer(self.tokenizer.decode(ids[: place + 1]), answer), add_special_tokens=False)
                logits[place] = -100.0  # instead of minus infinity, so that a KL is a number
                logits[place, said["input_ids"][0]] = 0.0
        return logits


@torch.no_grad()
def harm(system, base, texts):
    """KL(base || system) and changed next tokens over the positions of the texts."""
    kl, tokens, changed, same = 0.0, 0, 0, 0
    for text in texts:
        got = system.read(text).float()
        expected = base.read(text)[-len(got) :].float()
        kl += float(F.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum"))
        changed += int((got.argmax(-1) != expected.argmax(-1)).sum())
        tokens += len(got)
        same += int(torch.equal(got, expected))
    return {"kl": kl / tokens, "tokens": tokens, "tokens_changed": changed, "untouched": same / len(texts)}


def kept(system, capitals):
    answers = system.answers(capitals)
    # "known" is how many were asked: the base itself misses one.
    return {"known": len(answers), "still_right": sum(answer.exact for answer in answers)}


def shares(facts, answers):
    result = {}
    for score in score_by_category(facts, answers):
        low, high = wilson_interval(score.exact, score.prompts)
        result[score.category] = {
            "prompts": score.prompts,
            "exact": score.exact,
            "share": score.share,
            "low": low,
            "high": high,
        }
    return result


def judge(system, base, work):
    return {
        "categories": shares(work.facts, system.answers(work.facts)),
        "categories_held_out": shares(work.facts, system.answers(work.facts, held_out=True)),
        "capitals": kept(system, work.capitals),
        "harm": harm(system, base, work.texts),
    }


def made(part, base, tokenizer, plain, work, limit):
    """The system of a part and what it took to make it."""
    name, seed, clock = part["system"], part["seed"], Clock()
    if name == "base":
        return plain, clock.read()
    if name == "prompt stuffing":
        return Stuffed(tokenizer, base, work.facts), clock.read()
    if name == "suffix dictionary":
        dictionary = SuffixDictionary(tokenizer, work.facts, TeachSettings().min_order, plain)
        return dictionary, {**clock.read(), "bytes": dictionary.bytes}
    if name in RATES:
        model, took = trained(base, tokenizer, name, work.facts, part, limit, work)
        return Model(tokenizer, lambda: nullcontext(model)), took
    spent, size, below = {"seconds": 0.0, "cpu_seconds": 0.0}, 0, copy.deepcopy(base)
    if name == "Engram + LoRA":
        # LoRA for the patterns, the memory for everything, taught on top of it; each can be switched off alone.
        patterns = [fact for fact in work.facts if fact.category in PATTERNS]
        adapted, spent = trained(base, tokenizer, "LoRA", patterns, part, limit, work)
        size, below = spent["bytes"], adapted.base_model.model
    clock = Clock()
    editor = MemoryEditor.create(below, tokenizer, seed=seed)
    editor.teach(work.facts)
    took = {field: spent[field] + value for field, value in clock.read().items()}
    return Model(tokenizer, lambda: nullcontext(editor.memory)), {**took, "bytes": size + _rows(editor)}


def _rows(editor):
    tables = [editor.table(layer) for layer in editor.memory.engrams]
    return sum(x.numel() * x.element_size() for t in tables for x in (t.row_ids, t.tags, t.weight))


def measure(part, every, quick, epochs):
    """A part with its figures; of a setting that is tried also those it is chosen by."""
    work = task(every, quick)
    torch.manual_seed(part["seed"])
    base, tokenizer = load_bundled()
    plain = Model(tokenizer, lambda: nullcontext(base))
    system, took = made(part, base, tokenizer, plain, work, epochs)
    done = {**part, **took, **judge(system, plain, work)}
    if part["system"] in RATES:
        done["dev"] = {"capitals": kept(system, work.dev_capitals), "harm": harm(system, plain, work.dev_texts)}
    return done


# A part is one system with one seed, and for fine-tuning and LoRA with one setting: a rate, with replay or without.


def key(part):
    return part["system"], part["seed"], part.get("lr"), part.get("replay")


def all_settings(quick):
    rates = {name: some[: 1 if quick else None] for name, some in RATES.items()}
    return [{"system": name, "lr": lr, "replay": replay} for name in rates for lr in rates[name] for replay in (False, True)]


def tried(done):
    """Parts of the seed that all settings are tried with, the first."""
    parts = [part for part in done if part["system"] in RATES]
    return [part for part in parts if part["seed"] == parts[0]["seed"]]


def choices(done, settings):
    """Of each method's settings with the highest recall the one with the least harm, by texts not reported; none before all are tried."""
    parts = {key({**part, "seed": None}): part for part in tried(done)}
    if any(key({**setting, "seed": None}) not in parts for setting in settings):
        return {}
    best = {}
    for name in RATES:
        same = [part for part in parts.values() if part["system"] == name]
        most = max(recall(part) for part in same)
        part = min((part for part in same if recall(part) == most), key=lambda part: part["dev"]["harm"]["kl"])
        best[name] = {"lr": part["lr"], "replay": part["replay"]}
    return best


def recall(part):
    return sum(share["exact"] for share in part["categories"].values())


def wanted(seeds, done, settings):
    """Parts that need no choice: systems without settings, and all settings with one seed. Once those are done, the rest."""
    first = tried(done)[0]["seed"] if tried(done) else seeds[0]
    parts = [{**setting, "seed": first} for setting in settings]
    parts += [{"system": name, "seed": seed} for seed in seeds for name in ORDER if name not in (*RATES, "Engram + LoRA")]
    if best := choices(done, settings):
        systems = {**best, "Engram + LoRA": best["LoRA"]}
        parts += [{"system": name, **setting, "seed": seed} for seed in seeds for name, setting in systems.items()]
    known = {key(part) for part in done}
    return [part for part in parts if key(part) not in known]


def result_of(done, settings):
    """All settings that were tried, and per seed the systems that are reported."""
    best, runs = choices(done, settings), {}
    for part in sorted(done, key=lambda part: (part["seed"], ORDER.index(part["system"]))):
        name = part["system"]
        if name not in RATES or best.get(name) == {field: part[field] for field in ("lr", "replay")}:
            run = runs.setdefault(part["seed"], {"seed": part["seed"], "systems": {}})
            run["systems"][name] = {field: value for field, value in part.items() if field not in ("system", "seed")}
    return {"settings": tried(done), "runs": list(runs.values())}


def parts_of(result):
    """What ``result_of`` was made of."""
    told = [{"system": name, "seed": run["seed"], **part} for run in result["runs"] for name, part in run["systems"].items()]
    return list({key(part): part for part in [*result["settings"], *told]}.values())


def so_far(out, protocol):
    """The result to go on from; an empty one if there is none, or if it was made before settings were tried."""
    for path in (Path(f"{out}.partial"), out):
        if path.exists() and "settings" in (result := json.loads(path.read_text())):
            if result["protocol"] != protocol:
                raise SystemExit(f"{path} was made with {result['protocol']}, expected {protocol}: give another --out.")
            return result
    return {"settings": [], "runs": []}


def made_with(before, now):
    """What several calls say, field by field: once if they agree, else one after the other."""
    if isinstance(now, dict):
        return {field: made_with(before.get(field, value), value) for field, value in now.items()}
    return "; ".join(dict.fromkeys([*before.split("; "), *now.split("; ")]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most so many; other than the usual ones need --out")
    parser.add_argument("--every", type=int, default=1, help="only every n-th fact, for trying the script; needs --out")
    parser.add_argument(
        "--quick", action="store_true", help="a few facts and texts, two epochs, to see that it runs; needs --out"
    )
    add_workers(parser, "parts")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "baselines.json", "epochs", "every", "quick")
    every, epochs = (max(args.every, 60), min(args.epochs, 2)) if args.quick else (args.every, args.epochs)
    protocol = {"epochs": epochs, "every": every, "quick": args.quick, "batch": BATCH, "replayed": [PIECES, REPLAYED]}
    before, now = so_far(out, protocol), provenance(None)
    made = {field: made_with(before.get(field, now[field]), now[field]) for field in MADE_WITH}
    done, settings = parts_of(before), all_settings(args.quick)
    one = functools.partial(measure, every=every, quick=args.quick, epochs=epochs)
    while parts := wanted(args.seeds, done, settings):
        for part in side_by_side(one, parts, args.workers):
            done.append(part)
            tell(part)
            result = result_of(done, settings)
            complete = not wanted(args.seeds, done, settings) and all(
                len(run["systems"]) == len(ORDER) for run in result["runs"]
            )
            seeds = [run["seed"] for run in result["runs"]]
            write_so_far(out, {**made, "seed": seeds, "protocol": protocol, **result}, complete)


def tell(part):
    setting = f" ({part['lr']:g}{', replay' * part['replay']}, {part['epochs']} epochs)" if "epochs" in part else ""
    asked = sum(share["prompts"] for share in part["categories"].values())
    found = f"{recall(part)} of {asked}, KL {part['harm']['kl']:.3g}, {part['cpu_seconds']:.0f} s of the processor"
    print(f"seed {part['seed']}, {part['system']}{setting}: {found}", flush=True)


if __name__ == "__main__":
    main()
