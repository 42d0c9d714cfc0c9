"""Floor 5: facts and corpora."""

from engram.data.chat import chat_prompt, with_chat_prompts
from engram.data.facts import Fact, load_facts

__all__ = ["Fact", "chat_prompt", "load_facts", "with_chat_prompts"]
