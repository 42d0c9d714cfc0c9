"""The commands that move knowledge, on a tiny model saved to disk."""

import copy
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch

from engram import Fact
from engram.checkpoint import lock_store
from engram.editing import MemoryEditor
from engram.errors import CheckpointError
from engram.models import load_model
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from tests.cli.conftest import TWO
from tests.cli.test_outputs import cells


def test_taught_facts_are_asked_explained_and_forgotten(engram, taught):
    assert engram("ask", "KEY:beta 20", "--memory", taught)[:2] == (0, "7319\n")
    assert engram("ask", "KEY:beta 20", "--memory", taught, "--route")[:2] == (0, "7319\n")
    off = engram("ask", "KEY:beta 20", "--memory", taught, "--off")
    assert off[0] == 0
    assert off[1] != "7319\n"
    code, out, _ = engram("facts", "--memory", taught, "--json")
    listed = json.loads(out)
    assert [(f["id"], f["prompts"], f["answer"], f["source"]) for f in listed] == [
        ("alpha", ["KEY:alpha 17", "What is alpha 17?"], "blue window", "one.yaml"),
        ("beta", ["KEY:beta 20"], "7319", "one.yaml"),
    ]
    assert listed[1]["rows"]["2"]
    assert "beta  'KEY:beta 20' -> '7319'" in engram("facts", "--memory", taught)[1]
    code, out, _ = engram("why", "KEY:beta 20", "--memory", taught, "--json")
    why = json.loads(out)
    assert why["answer"] == "7319"
    assert list(why["facts"]) == ["beta"]
    assert "beta: 'KEY:beta 20' -> '7319' adds" in engram("why", "KEY:beta 20", "--memory", taught)[1]
    assert "bit for bit" in engram("why", "The memory", "--memory", taught)[1]
    code, out, _ = engram("forget", "KEY:beta 20", "--memory", taught)
    assert code == 0
    assert "forgot 1 facts" in out
    code, out, err = engram("forget", "beta", "--memory", taught)
    assert (code, out) == (1, "")
    assert "no fact 'beta' in this memory" in err
    assert [f["id"] for f in json.loads(engram("facts", "--memory", taught, "--json")[1])] == ["alpha"]


def test_the_facts_of_a_memory_are_a_file_to_teach_another(engram, taught, world, tmp_path):
    code, out, err = engram("facts", "--memory", taught, "--yaml")
    assert (code, err) == (0, "")
    (tmp_path / "again.yaml").write_text(out)
    assert engram("teach", tmp_path / "again.yaml", "--memory", tmp_path / "other", "--model", world / "base")[0] == 0
    assert engram("diff", taught, tmp_path / "other")[0] == 0
    assert engram("facts", "--memory", tmp_path / "other", "--yaml")[1] == out
    code, _, err = engram("facts", "--memory", taught, "--yaml", "--json")
    assert (code, "expected one form" in err) == (2, True)


def test_more_facts_join_and_contradictions_do_not(engram, taught, tmp_path):
    code, out, _ = engram("teach", "two.yaml", "--memory", taught)
    assert code == 0
    assert "the memory holds 3" in out
    assert re.search(r"taught 0 facts in [\d.]+ s, 1 were known", engram("teach", "two.yaml", "--memory", taught)[1])
    other = tmp_path / "other.yaml"
    other.write_text('- {prompt: "KEY:gamma 4", answer: "none", id: new}')
    code, _, err = engram("teach", other, "--memory", taught)
    assert code == 1
    assert "contradict the memory" in err
    assert "teaching" not in err  # no bar of a lesson that never began
    assert engram("teach", other, "--memory", taught, "--replace")[0] == 0
    assert engram("ask", "KEY:gamma 4", "--memory", taught)[1] == "none\n"


def pipe_with(content, pipe):
    """A pipe into which a thread writes; one that nobody reads holds nobody up."""
    os.mkfifo(pipe)
    Thread(target=pipe.write_text, args=[content], daemon=True).start()
    return pipe


def test_facts_from_a_pipe_are_read_once(engram, world, tmp_path):
    facts = pipe_with(TWO, tmp_path / "facts")
    code, _, err = engram("teach", facts, "--memory", tmp_path / "m", "--model", world / "base")
    assert code == 0, err
    (fact,) = json.loads(engram("facts", "--memory", tmp_path / "m", "--json")[1])
    assert (fact["source"], fact["sha256"]) == ("facts", hashlib.sha256(TWO.encode()).hexdigest())
    code, _, err = engram("teach", pipe_with("[", tmp_path / "wrong"), "--memory", tmp_path / "m")
    assert code == 2
    assert f"{tmp_path / 'wrong'} is not valid YAML" in err


@pytest.mark.parametrize("moment", ["teaching", "saving"])
def test_an_interrupted_lesson_says_how_far_it_came(engram, world, tmp_path, monkeypatch, moment):
    def stop_at(number, method):
        calls = []

        def then_stop(*arguments):
            calls.append(arguments)
            if moment == "saving":  # the file is there, and nobody has counted it yet
                method(*arguments)
            if len(calls) == number:
                raise KeyboardInterrupt
            return None if moment == "saving" else method(*arguments)

        return then_stop

    monkeypatch.setattr("engram.cli.teach._SAVE_EVERY", 1)
    given = ("teach", "one.yaml", "--memory", tmp_path / "m", "--model", world / "base")
    with monkeypatch.context() as patch:
        name, number = ("teach", 2) if moment == "teaching" else ("save", 1)
        patch.setattr(MemoryEditor, name, stop_at(number, getattr(MemoryEditor, name)))
        code, _, err = engram(*given)
    assert code == 130
    assert f"stopped; 1 of 2 facts are saved in {tmp_path / 'm'}, and the same command goes on from there" in err
    assert "Traceback" not in err
    code, out, _ = engram(*given)
    assert code == 0
    assert "taught 1 facts" in out
    assert "1 were known" in out


def test_what_is_not_exact_is_listed(engram, world, tmp_path, monkeypatch):
    from engram.editing import TeachSettings

    monkeypatch.setattr(TeachSettings, "max_steps", 1)
    monkeypatch.setattr(TeachSettings.__init__, "__defaults__", (1e-9, 1, *TeachSettings.__init__.__defaults__[2:-1], 0))
    code, out, err = engram("teach", "one.yaml", "--memory", tmp_path / "m", "--model", world / "base")
    assert code == 1
    assert "taught 0 facts" in out
    assert "not exact: 'KEY:beta 20'" in err
    # What this command can do comes first.
    assert "reword the prompt or shorten the answer (in Python also: TeachSettings" in err


def test_facts_that_are_not_found_in_running_text_are_counted(engram, world, tmp_path):
    facts = tmp_path / "short.yaml"
    facts.write_text('- {prompt: Phone, answer: "12"}\n- {prompt: "KEY:beta 20", answer: "7319"}')
    code, _, err = engram("teach", facts, "--memory", tmp_path / "m", "--model", world / "base")
    assert code == 0
    assert f"note: 1 of the taught facts ({Fact(('Phone',), '12').id}) speak at the start of an input or of a line only" in err
    assert "note:" not in engram("teach", facts, "--memory", tmp_path / "m")[2]  # known facts are not told of again


def test_memories_are_compared_and_united(engram, taught, world, tmp_path):
    assert engram("teach", "two.yaml", "--memory", tmp_path / "n", "--model", world / "base")[0] == 0
    code, out, _ = engram("diff", taught, tmp_path / "n")
    assert code == 1
    assert out.splitlines()[:3] == [
        "- alpha  'KEY:alpha 17' -> 'blue window'",
        "- beta  'KEY:beta 20' -> '7319'",
        "+ gamma  'KEY:gamma 4' -> 'ninety'",
    ]
    assert json.loads(engram("diff", taught, tmp_path / "n", "--json")[1])["only_b"] == ["gamma"]
    assert engram("diff", taught, taught)[0] == 0
    code, out, _ = engram("merge", taught, tmp_path / "n", "--out", tmp_path / "u")
    assert code == 0
    assert "3 facts (2 from a, 1 from b)" in out
    assert engram("ask", "KEY:gamma 4", "--memory", tmp_path / "u")[1] == "ninety\n"
    (world / "three.yaml").write_text('- {prompt: "KEY:beta 20", answer: "1", id: z}')
    engram("teach", "three.yaml", "--memory", tmp_path / "o", "--model", world / "base")
    code, out, err = engram("merge", taught, tmp_path / "o", "--out", tmp_path / "v")
    assert (code, out) == (1, "")
    assert "prompt 'KEY:beta 20': answer '7319' in a, '1' in b" in err
    assert not (tmp_path / "v" / "engram.json").exists()
    code, out, err = engram("merge", taught, tmp_path / "o", "--out", tmp_path / "v", "--prefer", "b", "--no-verify")
    assert code == 0
    assert "decided for b" in err
    assert engram("merge", taught, tmp_path / "o", "--out", tmp_path / "v", "--prefer", "c")[0] == 2
    with pytest.MonkeyPatch.context() as patch:  # a folder that is taken is refused before anything is united or asked
        patch.setattr("engram.editing.merge._both", None)
        code, out, err = engram("merge", taught, tmp_path / "n", "--out", tmp_path / "v")
    assert (code, out) == (2, "")
    assert "holds a memory already; choose another folder" in err


def test_evaluation_is_written(engram, taught, tmp_path):
    texts = tmp_path / "texts.yaml"
    texts.write_text("prose: [The memory is addressed by the last tokens.]")
    arguments = ("--memory", taught, "--facts", "one.yaml", "--texts", texts, "--json", tmp_path / "r.json")
    code, _, err = engram("eval", *arguments, "--markdown", tmp_path / "r.md", "--plots", tmp_path / "p")
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["recall"], result["kl_to_base"]) == (1.0, 0.0)
    assert [(f["answer"], f["expected"], f["exact"]) for f in result["facts"]][2] == ("7319", "7319", True)
    assert "colour" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "p" / "recall.png").is_file()
    assert result["provenance"]["command"] == f"engram eval --memory {taught} --facts one.yaml --texts {texts}"


def test_a_demo_does_not_write_over_what_somebody_taught(engram, taught, world, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "memory").symlink_to(taught)
    monkeypatch.setattr("engram.cli.demo._Demo.run", None)  # a refusal comes before the work
    command = ("demo", "--facts", "two.yaml", "--model", world / "base", "--out", tmp_path / "out")
    code, _, err = engram(*command)
    assert code == 2
    assert "holds 2 facts that are not among those of this demo ('KEY:alpha 17' for one)" in err
    with pytest.raises(TypeError):  # its own facts are no obstacle
        engram("demo", "--facts", "one.yaml", *command[3:])
    tiny_memory(load_model(str(world / "base"))[0]).save_pretrained(tmp_path / "trained" / "memory")
    code, _, err = engram(*command[:-1], tmp_path / "trained")
    assert code == 2
    assert "a memory that no demo made" in err


def test_facts_are_generated(engram, tmp_path):
    code, out, _ = engram("generate", tmp_path / "g.yaml", "--kind", "mime", "--limit", 5)
    assert (code, out) == (0, f"5 facts written to {tmp_path / 'g.yaml'}\n")
    assert engram("generate", tmp_path / "g.yaml", "--kind", "nope")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("ask", "x", "--memory", "nowhere"), 1, "no memory in nowhere"),
        (("facts", "--memory", "nowhere"), 1, "no memory in nowhere"),
        (("forget", "x", "--memory", "nowhere"), 1, "no memory in nowhere"),
        (("diff", "nowhere", "nowhere"), 2, "no memory in nowhere"),
        (("ask", " ", "--memory", "nowhere"), 2, "empty text"),
        (("why", "", "--memory", "nowhere"), 2, "empty text"),
        (("teach", "none.yaml", "--memory", "x"), 2, "does not exist"),
        (("ask", "x", "--memory", "x", "--rules", "none.yaml"), 2, "routing rules"),
        (["facts", "--memory", "bundled"], 2, "the bundled memory was trained, not taught"),
        (["why", "hi", "--memory", "bundled"], 2, "the bundled memory was trained, not taught"),
        (["eval", "--facts", "one.yaml", "--memory", "bundled"], 2, "the bundled memory was trained, not taught"),
        (["diff", "bundled", "nowhere"], 2, "A: the bundled memory was trained, not taught"),
        (["diff", "nowhere", "bundled"], 2, "B: the bundled memory was trained, not taught"),
        (["merge", "nowhere", "bundled", "--out", "nowhere"], 2, "B: the bundled memory was trained, not taught"),
        (["merge", "one", "two", "--out", "bundled"], 2, "got 'bundled', which names the memory that ships with engram"),
        (["convert", "one", "--dtype", "int8", "--out", "bundled"], 2, "got 'bundled', which names the memory that ships"),
        (["place", "one", "--tier", "host", "--out", "bundled"], 2, "got 'bundled', which names the memory that ships"),
        (["forget", "x", "--memory", "bundled"], 2, "the bundled memory was trained, not taught"),
        (["teach", "one.yaml", "--memory", "bundled"], 2, "the bundled memory was trained, not taught"),
        (["facts", "--memory", "one.yaml"], 1, "no memory in one.yaml: it is a file"),
        (("ask", "x", "--memory", "nowhere", "--off", "--route"), 2, "expected it to be off, or routed"),
        (("ask", "x", "--memory", "nowhere", "--off", "--rules", "none.yaml"), 2, "expected it to be off, or routed"),
        (("ask", "x", "--memory", "nowhere", "--off", "--router", "none"), 2, "expected it to be off, or routed"),
    ],
)
def test_mistakes_get_one_clear_line(engram, world, arguments, code, message):
    got, out, err = engram(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not (world / "nowhere").exists()
    assert not (world / "bundled").exists()


def test_a_locked_memory_is_refused(engram, taught):
    with ThreadPoolExecutor(1) as other:
        held = lock_store(taught)
        other.submit(held.__enter__).result()
        code, _, err = engram("teach", "two.yaml", "--memory", taught)
        other.submit(held.__exit__, None, None, None).result()
    assert code == 1
    assert "locked: another process" in err


def test_a_memory_of_another_model_is_refused_by_name(engram, taught, world):
    tiny_model(seed=3, hidden_size=64, intermediate_size=96).save_pretrained(world / "stranger")
    tiny_tokenizer().save_pretrained(world / "stranger")
    code, _, err = engram("ask", "KEY:beta 20", "--memory", taught, "--model", world / "stranger")
    assert code == 1
    assert str(world / "base") in err
    assert "stranger" in err


def test_a_tuned_base_is_accepted_where_that_is_asked_for(engram, taught, world, tmp_path):
    tuned = tiny_model(hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 0.001
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    (tmp_path / "texts.yaml").write_text("prose: [The memory is addressed by the last tokens.]")
    (tmp_path / "text.txt").write_text("The memory is addressed by the last tokens of the text.")
    other = tmp_path / "other"
    shutil.copytree(taught, other)
    on_tuned = ("--model", tmp_path / "tuned", "--allow-other-base")
    code, _, err = engram("ask", "KEY:beta 20", "--memory", taught, *on_tuned[:2])
    assert code == 1
    assert "--allow-other-base" in err
    for arguments in (
        ("ask", "KEY:beta 20", "--memory", taught),
        ("why", "KEY:beta 20", "--memory", taught),
        ("eval", "--memory", taught, "--facts", "one.yaml", "--texts", tmp_path / "texts.yaml"),
        ("trace", "KEY:beta 20", "--memory", taught),
        ("recall", "--memory", taught, "--lengths", "128", "--examples", "1", "--tasks", "needle"),
        ("look", taught, "--what", "gates", "--texts", tmp_path / "text.txt", "--out", tmp_path / "look"),
        ("convert", taught, "--dtype", "float32", "--out", tmp_path / "converted"),
        ("merge", taught, other, "--out", tmp_path / "union"),
        ("teach", "two.yaml", "--memory", taught),
        ("forget", "alpha", "--memory", other),
    ):
        code, out, err = engram(*arguments, *on_tuned)
        assert code == 0, (arguments, out, err)
        assert "not verified" not in err


def test_prompts_are_taught_and_asked_as_chat_turns(engram, world, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>\n"
    tiny_model(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    assert engram("teach", "one.yaml", "--memory", tmp_path / "m", "--model", tmp_path / "chat", "--chat")[0] == 0
    for options in ((), ("--chat",)):
        assert engram("ask", "What is alpha 17?", "--memory", tmp_path / "m", *options)[:2] == (0, "blue window\n")
    assert (
        "<user> What is alpha 17?"
        in json.loads(engram("why", "What is alpha 17?", "--memory", tmp_path / "m", "--json", "--chat")[1])["prompt"]
    )
    code, out, err = engram("teach", "one.yaml", "--memory", tmp_path / "n", "--model", world / "base", "--chat")
    assert (code, out) == (2, "")
    assert "no chat template" in err
    assert "Traceback" not in err


def test_what_a_careless_user_does_is_said_plainly(engram, taught, world, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text('- {prompt: "The kettle is in", answer: room 13, id: beta}')
    code, _, err = engram("teach", other, "--memory", taught)
    assert code == 1
    assert "the id 'beta' names 'KEY:beta 20' -> '7319' in the memory, 'The kettle is in' -> 'room 13' now" in err
    assert engram("teach", other, "--memory", tmp_path / "b", "--model", world / "base")[0] == 0
    code, _, err = engram("merge", taught, tmp_path / "b", "--out", tmp_path / "c")
    assert code == 1
    assert "id 'beta': one id, 'KEY:beta 20' -> '7319' in a, 'The kettle is in' -> 'room 13' in b" in err
    assert not (tmp_path / "c").exists()
    code, _, err = engram("merge", taught, tmp_path / "b", "--out", taught, "--prefer", "a")
    assert code == 2
    assert "choose another folder" in err
    other.write_text("- {prompts: ['KEY:beta 20', 'What is beta?'], answer: 0042}")
    code, _, err = engram("teach", other, "--memory", taught, "--replace")
    assert code == 0
    assert "replaced: 'KEY:beta 20' is '7319' in the memory (fact beta), '0042' now" in err
    assert engram("ask", "What is beta?", "--memory", taught)[1] == "0042\n"
    code, _, err = engram("teach", other, "--memory", taught, "--seed", 3)
    assert code == 2
    assert "--seed: got 3, but the memory in" in " ".join(err.split())
    assert "made with seed 0" in err
    assert engram("generate", other, "--limit", 3)[0] == 2
    assert "0042" in other.read_text()
    assert engram("generate", other, "--limit", 3, "--force")[0] == 0


def test_damaged_rows_and_ledgers_are_noticed(engram, taught):
    for suffix in (".safetensors", ".ledger.json"):
        (file,) = taught.glob(f"*{suffix}")
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes(b ^ 1 for b in whole[-9:]))
        code, _, err = engram("ask", "KEY:beta 20", "--memory", taught)
        assert code != 0
        assert "its checksum is not the one saved" in err
        file.write_bytes(whole)
    assert engram("ask", "KEY:beta 20", "--memory", taught)[0] == 0


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_a_memory_is_converted_and_compared(engram, taught, world, tmp_path, dtype):
    (world / "text.txt").write_text("The memory is addressed by the last tokens. KEY:beta 20")
    arguments = ("--dtype", dtype, "--out", tmp_path / "small", "--json", tmp_path / "r.json", "--text", "text.txt")
    code, out, err = engram("convert", taught, *arguments)
    assert code == 0, err
    assert "facts exact: 2 of 2 before, 2 after" in out
    assert "held-out bits per byte" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["facts"] == {"facts": 2, "before": 2, "after": 2, "lost": []}
    assert report["layers"][0]["bytes_after"] < report["layers"][0]["bytes_before"]
    assert 0 < report["layers"][0]["relative_error"] < 0.05
    assert report["bits_per_byte"]["before"] == pytest.approx(report["bits_per_byte"]["after"], rel=0.05)
    assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "small")[1] == "7319\n"
    assert len(json.loads(engram("facts", "--memory", tmp_path / "small", "--json")[1])) == 2
    assert engram("teach", "two.yaml", "--memory", tmp_path / "small")[0] == 0
    assert engram("forget", "gamma", "--memory", tmp_path / "small")[0] == 0
    assert engram("diff", taught, tmp_path / "small")[0] == 1  # the same facts, in rows that are not the same bits
    assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "small")[1] == "7319\n"


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_lost_facts_are_listed_and_missing_models_are_no_obstacle(engram, taught, tmp_path, monkeypatch):
    from engram.editing import MemoryEditor

    monkeypatch.setattr(
        MemoryEditor, "verify", lambda editor: {"alpha": True, "beta": editor.memory.table_config.dtype != "int4"}
    )
    code, out, err = engram("convert", taught, "--dtype", "int4", "--out", tmp_path / "a")
    assert (code, "2 of 2 before, 1 after" in out) == (1, True)
    assert "not exact any more: beta; choose a format with more bits" in err
    code, out, err = engram("convert", taught, "--dtype", "int8", "--out", tmp_path / "b", "--model", "./nowhere")
    assert (code, "cannot load model './nowhere'" in err) == (1, True)  # said before the work
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr("engram.models.load_model", raising(CheckpointError("cannot load model 'bundled'")))
    code, out, err = engram("convert", taught, "--dtype", "int8", "--out", tmp_path / "b")
    assert (code, "not verified: cannot load model" in err) == (0, True)
    assert "int8" in out
    code, out, err = engram("convert", taught, "--dtype", "int8", "--out", tmp_path / "c", "--no-verify")
    assert (code, "facts exact" in out) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere", "--dtype", "int8", "--out", "x"), 1, "no memory in nowhere"),
        (("m", "--dtype", "int3", "--out", "x"), 2, "got 'int3', expected one of float32"),
        (("m", "--dtype", "int8", "--out", "m"), 2, "expected another folder"),
        (("m", "--dtype", "int8", "--out", "base/config.json/x"), 1, "cannot write the folder"),
        (("m", "--dtype", "int8", "--out", "x", "--text", "none.txt"), 2, "cannot read none.txt"),
    ],
)
def test_conversions_that_cannot_be_get_one_line(engram, taught, world, arguments, code, message):
    if not (world / "m").exists():
        (world / "m").symlink_to(taught)
    got, out, err = engram("convert", *arguments)
    (world / "m").unlink()
    assert (got, out) == (code, ""), err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (world / "x").exists()


def test_an_id_is_an_id_even_if_it_is_a_prompt_too(engram, taught, tmp_path):
    (tmp_path / "trap.yaml").write_text('- {prompt: "beta", answer: "not that one", id: other}\n')
    assert engram("teach", tmp_path / "trap.yaml", "--memory", taught)[0] == 0
    assert engram("forget", "beta", "--memory", taught)[0] == 0
    assert [fact["id"] for fact in json.loads(engram("facts", "--memory", taught, "--json")[1])] == ["alpha", "other"]


def test_prompts_that_are_no_text_or_too_long(engram, taught):
    code, _, err = engram("ask", "\udcff\udcfe", "--memory", taught)
    assert (code, "not UTF-8" in err) == (2, True)
    code, _, err = engram("why", "word " * 5000, "--memory", taught)
    assert (code, "the model's context" in err) == (2, True)


def test_what_looks_like_markup_is_shown(engram, taught):
    code, out, err = engram("why", "[INST] KEY:beta 20 [/INST]", "--memory", taught)
    assert code == 0, err
    assert "[INST] KEY:beta 20 [/INST]" in out
    code, _, err = engram("trace", "\udcff")
    assert (code, "not UTF-8" in err) == (2, True)


def test_explanations_are_whole_and_as_they_were_taught_in_a_narrow_terminal(engram, world, tmp_path, monkeypatch):
    (tmp_path / "cat.yaml").write_text(
        '- {prompt: "KEY:delta 3", answer: ":cat: [b]", id: a-name-that-is-longer-than-any-column}'
    )
    code, _, err = engram("teach", tmp_path / "cat.yaml", "--memory", tmp_path / "m", "--model", world / "base")
    assert code == 0, err
    monkeypatch.setattr("engram.cli.outputs.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = engram("why", "KEY:delta 3", "--memory", tmp_path / "m")
    assert "':cat: [b]'" in out
    assert "a-name-that-is-longer-than-any-column" in cells(out)[6]
    assert "…" not in out
    code, out, _ = engram("trace", "KEY:delta 3 :cat: [b] and more", "--memory", tmp_path / "m")
    assert code == 0
    assert ":cat:[b]andmore" in cells(out)[3].replace(" ", "")
    assert "…" not in out


def test_a_result_without_a_place_is_refused_before_the_work(engram, taught, tmp_path):
    for place in (tmp_path, "/proc/nowhere/r.json"):
        code, _, err = engram("eval", "--memory", taught, "--facts", "one.yaml", "--json", place)
        assert code == 2
        assert "expected a file" in err or "cannot write" in err


def test_a_moved_base_is_named(engram, taught, world):
    (world / "base").rename(world / "gone")
    code, _, err = engram("ask", "KEY:beta 20", "--memory", taught)
    (world / "gone").rename(world / "base")
    assert code == 1
    assert "no such folder" in err
    assert "--model" in err


def test_a_taught_memory_stays_on_the_device(engram, taught, tmp_path):
    code, out, err = engram("place", taught, "--json")
    assert code == 0, err
    fields = json.loads(out)
    assert {cost["tier"] for cost in fields["costs"]} == {"device"}
    assert fields["layers"][0]["dtype"] == "bfloat16"
    code, out, err = engram("place", taught)
    assert "always on the model's device" in out
    assert "hybrid" not in out
    code, out, err = engram("place", taught, "--tier", "host", "--out", tmp_path / "x")
    assert (code, out) == (2, "")
    assert "expected 'device': of a taught memory only written rows are stored" in err
    assert not (tmp_path / "x").exists()
    assert engram("place", taught, "--tier", "device", "--dtype", "int8", "--out", tmp_path / "y")[0] == 0
    assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "y")[1] == "7319\n"


def test_a_model_in_bfloat16_is_taught_and_asked(engram, world, tmp_path):
    half = ("--memory", tmp_path / "m", "--model-dtype", "bfloat16")
    code, out, err = engram("teach", "one.yaml", *half, "--model", world / "base")
    assert (code, "taught 2 facts" in out) == (0, True), err
    assert engram("ask", "KEY:beta 20", *half)[:2] == (0, "7319\n")
    assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "m")[:2] == (0, "7319\n")  # and in float32
    code, out, _ = engram("eval", *half, "--facts", "one.yaml", "--json", tmp_path / "out.json")
    assert code == 0
    assert json.loads((tmp_path / "out.json").read_text())["provenance"]["command"].endswith("--model-dtype bfloat16")


def test_memories_are_united_converted_and_traced_on_a_model_in_another_type(engram, taught, world, tmp_path, monkeypatch):
    types = []

    def noting(name, dtype):
        types.append(dtype)
        return load_model(name, dtype)

    monkeypatch.setattr("engram.models.load_model", noting)
    code, _, err = engram("teach", "two.yaml", "--memory", tmp_path / "b", "--model", world / "base")
    assert code == 0, err
    half = ("--device", "cpu", "--model-dtype", "bfloat16")
    code, out, err = engram("merge", taught, tmp_path / "b", "--out", tmp_path / "u", *half)
    assert (code, "3 facts" in out) == (0, True), err
    code, out, err = engram("convert", tmp_path / "u", "--dtype", "float32", "--out", tmp_path / "c", *half)
    assert (code, "facts exact: 3 of 3 before, 3 after" in out) == (0, True), err
    code, out, err = engram("trace", "KEY:beta 20", "--memory", taught, "--json", *half)
    assert (code, json.loads(out)["output_shape"][1] > 0) == (0, True), err
    assert [str(dtype) for dtype in types] == ["torch.float32", *["torch.bfloat16"] * 3]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "abacus", "got 'abacus', expected a device of this machine"),
        ("--device", "meta", "got 'meta', expected a device of this machine"),
        ("--device", "cuda:99", "got 'cuda:99', expected a device of this machine"),
        ("--model-dtype", "int8", "got 'int8', expected one of float32, bfloat16, float16"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(engram, world, tmp_path, option, value, message):
    code, _, err = engram("teach", "one.yaml", "--memory", tmp_path / "m", "--model", world / "base", option, value)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "m").exists()
    tiny_memory().save_pretrained(tmp_path / "a")
    for command in (
        ("merge", tmp_path / "a", tmp_path / "a", "--out", tmp_path / "m"),
        ("convert", tmp_path / "a", "--dtype", "int8", "--out", tmp_path / "m"),
        ("trace", "text", "--memory", tmp_path / "a"),
        ("trace", "text", "--demo-size"),
    ):
        code, _, err = engram(*command, option, value)
        assert (code, message in err) == (2, True), err
        assert not (tmp_path / "m").exists()


def test_a_router_is_fitted_to_gains_and_decides_who_reads(engram, taught, tmp_path):
    helped = [
        "KEY:alpha 17 blue window",
        "KEY:beta 20 7319",
        "What is alpha 17? blue window",
        "KEY:alpha 17 blue window KEY:beta 20 7319",
    ]
    (tmp_path / "my facts.txt").write_text("\n<|doc|>\n".join(helped))
    (tmp_path / "other.yaml").write_text(
        json.dumps({"[/prose]": [f"The memory is {word} the text." for word in ("in", "on", "by", "at")]})
    )
    files = (tmp_path / "my facts.txt", tmp_path / "other.yaml")
    router, figures = tmp_path / "new" / "router.safetensors", tmp_path / "route.json"
    code, out, err = engram("route", taught, *files, "--first-tokens", 3, "--out", router, "--json", figures)
    assert code == 0, err
    assert "read it" in out
    assert f"{router}: reads texts as far as the memory helps them" in out.replace("\n", " ")
    result = json.loads(figures.read_text())
    assert result["command"] == f"engram route {taught} '{files[0]}' {files[1]} --first-tokens 3"
    assert [(kind["kind"], kind["texts"], kind["read"]) for kind in result["kinds"]] == [("my facts", 2, 2), ("[/prose]", 2, 0)]
    assert engram("ask", "KEY:beta 20", "--memory", taught, "--router", router)[:2] == (0, "7319\n")
    plain = engram("ask", "The memory is under the text.", "--memory", taught, "--off")
    assert engram("ask", "The memory is under the text.", "--memory", taught, "--router", router) == plain
    code, _, err = engram("ask", "KEY:beta 20", "--memory", taught, "--router", router, "--route")
    assert (code, "expected one way to decide" in err) == (2, True)
    code, _, err = engram("ask", "KEY:beta 20", "--memory", taught, "--router", figures)
    assert (code, "cannot read a router from" in err) == (1, True)
    code, _, err = engram("route", taught, tmp_path / "other.yaml")
    assert (code, "the memory helps 0 of 2 prompts" in err) == (2, True)


def test_a_trained_memory_is_asked_with_a_router(engram, world, tmp_path):
    tiny_memory(load_model(str(world / "base"))[0]).save_pretrained(tmp_path / "trained")
    texts = {
        "some": ["The memory is in the text.", "KEY:alpha 17", "The text", "KEY"],
        "more": ["A window.", "It is.", "alpha 4", "beta"],
    }
    (tmp_path / "texts.yaml").write_text(json.dumps(texts))
    code, _, err = engram("route", tmp_path / "trained", tmp_path / "texts.yaml", "--out", tmp_path / "router")
    assert code == 0, err
    for options in ([], ["--router", tmp_path / "router"], ["--off"]):
        assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "trained", "--max-new-tokens", 3, *options)[0] == 0


def test_a_trained_memory_is_not_taught_facts(engram, world, tmp_path):
    tiny_memory(load_model(str(world / "base"))[0]).save_pretrained(tmp_path / "trained")
    for command in (("teach", "one.yaml"), ("why", "KEY:beta 20")):
        code, _, err = engram(*command, "--memory", tmp_path / "trained")
        assert code in (1, 2)
        assert "whose rows are not verified (a trained one)" in err.replace("\n", " ")
        assert "name a new folder" in err.replace("\n", " ")


def test_facts_over_another_memory(engram, world, tmp_path):
    beneath = tiny_memory(tiny_model(hidden_size=64, intermediate_size=96))
    beneath.base_model.config._name_or_path = str(world / "base")
    beneath.save_pretrained(tmp_path / "trained")
    facts = ("teach", "one.yaml", "--memory", tmp_path / "facts")
    code, _, err = engram(*facts, "--over", tmp_path / "trained")
    assert code == 0, err
    assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "facts")[:2] == (0, "7319\n")
    code, out, _ = engram(*facts, "--over", tmp_path / "trained")  # the same again
    assert code == 0
    assert "2 were known" in out
    code, _, err = engram(*facts, "--over", tmp_path / "elsewhere")
    assert code == 2
    assert "was not made on top of that one" in " ".join(err.split())
    (tmp_path / "trained").rename(tmp_path / "moved")
    code, _, err = engram("ask", "KEY:beta 20", "--memory", tmp_path / "facts")
    assert code == 1
    assert "was made on top of another, which is not in" in err
    assert "Traceback" not in err
