import copy

import pytest

from engram import DataError, Fact, MemoryEditor
from engram.data import chat_prompt, with_chat_prompts
from engram.data.facts import tokenize_prompt
from engram.evaluation import check_facts
from engram.testing import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def tiny_tokenizer_with(template):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def chat_tokenizer():
    return tiny_tokenizer_with(TEMPLATE)


def test_a_chat_prompt_is_tokenised_as_the_template_says():
    tokenizer = chat_tokenizer()
    text = chat_prompt(tokenizer, "What is alpha 17?")
    assert text.endswith("<user> What is alpha 17?\n<assistant>\n")
    turns = [{"role": "user", "content": "What is alpha 17?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tokenize_prompt(tokenizer, text) == expected
    assert expected.count(tokenizer.bos_token_id) == 1


def test_facts_are_exact_as_plain_prompts_and_as_chat_turns():
    tokenizer = chat_tokenizer()
    facts = [
        Fact(("What is alpha 17?",), "blue window", held_out=("Say what alpha 17 is.",), id="alpha"),
        Fact(("What is alpha 18?",), "a quiet green door", id="door"),
    ]
    chat = with_chat_prompts(tokenizer, facts)
    assert [len(fact.prompts) for fact in chat] == [2, 2]
    assert chat[0].held_out == ("Say what alpha 17 is.", chat_prompt(tokenizer, "Say what alpha 17 is."))
    assert chat[0].id == "alpha"
    editor = MemoryEditor.create(tiny_model(hidden_size=64, intermediate_size=96), tokenizer)
    assert not editor.teach(chat).not_exact
    assert all(answer.exact for answer in check_facts(editor.memory, tokenizer, chat))
    later = tokenizer.apply_chat_template(  # a key holds in any conversation, not in the first turn alone
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "What is alpha 17?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    ).removeprefix(tokenizer.bos_token)
    assert check_facts(editor.memory, tokenizer, [Fact((later,), "blue window")])[0].exact


def test_prompts_that_are_chat_turns_already_are_not_wrapped_again():
    """A facts file of a memory that was taught so (``engram facts --yaml``) holds both."""
    tokenizer = chat_tokenizer()
    facts = [Fact(("What is alpha 17?", "KEY:alpha"), "blue window", held_out=("Say what alpha 17 is.",), id="alpha")]
    once = with_chat_prompts(tokenizer, facts)
    assert len(once[0].prompts) == 4
    assert with_chat_prompts(tokenizer, once) == once


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(DataError, match="no chat template"):
        chat_prompt(tiny_tokenizer(), "Hello")


def test_a_template_that_reads_parts_alone_is_given_parts():
    """As of models that take pictures: text that is no list of parts leaves nothing behind."""
    tokenizer = tiny_tokenizer_with(
        "{% for m in messages %}<{{ m.role }}> {% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
        "{% endfor %}<assistant>"
    )
    assert chat_prompt(tokenizer, "Where is Rome?") == "<user> Where is Rome?<assistant>"


@pytest.mark.parametrize("template", ["<user> <assistant>", "{{ raise_exception('no users here') }}"])
def test_a_template_that_leaves_the_prompt_out_is_refused(template):
    with pytest.raises(DataError, match=r"leaves the prompt 'Where is Rome\?' out"):
        chat_prompt(tiny_tokenizer_with(template), "Where is Rome?")
