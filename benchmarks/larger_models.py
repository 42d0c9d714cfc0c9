"""What teaching costs on models larger than the bundled one: seconds, memory, bytes saved, by size of the model.

Nothing larger ships with engram, so all but the first are Llamas of published shapes with random weights. Time and memory depend on the shape;
that every fact is exact holds for these weights, and there is nothing in them that teaching could harm. Each model is built and taught in a
process of its own, whose peak memory is its own too. The facts are those of the demo, in the bundled tokenizer's tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import provenance, result_file, write
from peers.protocol import peak_resident_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from engram import MemoryEditor, load_bundled
from engram.data.facts import load_facts

FACTS = Path(__file__).parents[1] / "src" / "engram" / "bundled" / "facts.yaml"
BUNDLED = "7M, the bundled one"
SHAPES = {  # hidden, intermediate, blocks, heads, key-value heads, vocabulary, output head tied to the embedding
    "135M, as SmolLM2": (576, 1536, 30, 9, 3, 49_152, True),
    "0.5B, as Qwen2.5": (896, 4864, 24, 14, 2, 151_936, True),
    "1.2B, as Llama 3.2": (2048, 8192, 16, 32, 8, 128_256, True),
}
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
FACTS_TAUGHT = 20


def model_of(name):
    """A model and its tokenizer."""
    bundled, tokenizer = load_bundled()
    if name == BUNDLED:
        return bundled, tokenizer
    torch.manual_seed(0)
    shape = dict(zip(FIELDS, SHAPES[name]))
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(**shape, **ends)).eval(), tokenizer


def timed(what, *args):
    started = time.perf_counter()
    return what(*args), time.perf_counter() - started


def forward_seconds(memory, tokenizer, facts):
    """One pass of the base model over a prompt (the mean over the facts' first phrasings), for orientation."""
    prompts = [torch.tensor([tokenizer(fact.prompts[0])["input_ids"]]) for fact in facts]
    with torch.no_grad(), memory.disable_engram():
        memory(prompts[0])
        return timed(lambda: [memory(ids) for ids in prompts])[1] / len(prompts)


def measure(name, dtype, count):
    """One model as an entry, in a process of its own."""
    model, tokenizer = model_of(name)
    model.to(getattr(torch, dtype))
    editor = MemoryEditor.create(model, tokenizer)
    facts = load_facts(FACTS)[: count + 1]
    forward = forward_seconds(editor.memory, tokenizer, facts)
    before = peak_resident_bytes(start_anew=True)
    report, seconds = timed(editor.teach, facts[:count])
    more = timed(editor.teach, facts[count:])[1]
    answers = editor.verify()
    with tempfile.TemporaryDirectory() as folder:
        editor.save(Path(folder) / "memory")
        saved = sum(file.stat().st_size for file in (Path(folder) / "memory").iterdir())
    return {
        "model": name,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompts": report.prompts,
        "steps": report.steps,
        "seconds": seconds,
        "one_more_seconds": more,
        "forward_seconds": forward,
        "facts": len(answers),
        "exact": sum(answers.values()),
        "resident_before": before,
        "peak_bytes": peak_resident_bytes(),
        "saved_bytes": saved,
    }


def in_its_own_process(name, args):
    command = [sys.executable, __file__, "--one", name, "--dtype", args.dtype, "--facts", str(args.facts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[BUNDLED, *SHAPES], choices=[BUNDLED, *SHAPES])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--facts", type=int, default=FACTS_TAUGHT, help="facts in the first lesson")
    parser.add_argument(
        "--quick", action="store_true", help="the bundled model alone and two facts, to see that it runs; needs --out"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.dtype, args.facts)))
        return
    out = result_file(parser, args, "larger_models.json", "models", "dtype", "facts", "quick")
    if args.quick:
        args.models, args.facts = [BUNDLED], 2
    entries = []
    for name in args.models:
        entries.append(in_its_own_process(name, args))
        print(entries[-1], flush=True)
    write(out, {**provenance(0), "entries": entries})


if __name__ == "__main__":
    main()
