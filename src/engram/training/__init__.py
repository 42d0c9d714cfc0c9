"""Floor 5: training memories and base models."""

from engram.training.other_trainers import MemoryCallback
from engram.training.progress import LiveProgress
from engram.training.trainer import EngramTrainer, EngramTrainingArguments

__all__ = ["EngramTrainer", "EngramTrainingArguments", "LiveProgress", "MemoryCallback"]
