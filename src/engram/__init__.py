"""engram: a conditional memory for PyTorch language models.

Names are loaded on first use (PEP 562), so that ``import engram`` needs neither transformers nor a model.
"""

from typing import TYPE_CHECKING

from engram._version import __version__
from engram.lazy import loaded_on_use

if TYPE_CHECKING:
    from engram.config import EngramConfig, TableConfig
    from engram.data import Fact, load_facts
    from engram.editing import ForgetReport, MemoryEditor, TeachReport, TeachSettings
    from engram.errors import (
        AttachError,
        CheckpointError,
        ConfigError,
        DataError,
        EngramError,
        FingerprintError,
        TableError,
        TeachError,
        TrainingError,
    )
    from engram.hashing import CompressedTokenizer, NgramHashMapping
    from engram.layers import Engram, EngramState
    from engram.models import (
        DecoderLayout,
        EngramModel,
        EngramRouter,
        LearnedRouter,
        get_engram_model,
        load_bundled,
        register_architecture,
    )
    from engram.optim import EngramAdamW, EngramMuon
    from engram.tables import EmbeddingTable, replicate_tables
    from engram.training import EngramTrainer, EngramTrainingArguments, LiveProgress

_HOMES = {
    "AttachError": "engram.errors",
    "CheckpointError": "engram.errors",
    "CompressedTokenizer": "engram.hashing",
    "ConfigError": "engram.errors",
    "DataError": "engram.errors",
    "DecoderLayout": "engram.models",
    "EmbeddingTable": "engram.tables",
    "Engram": "engram.layers",
    "EngramAdamW": "engram.optim",
    "EngramConfig": "engram.config",
    "EngramError": "engram.errors",
    "EngramModel": "engram.models",
    "EngramMuon": "engram.optim",
    "EngramRouter": "engram.models",
    "EngramState": "engram.layers",
    "EngramTrainer": "engram.training",
    "EngramTrainingArguments": "engram.training",
    "Fact": "engram.data",
    "FingerprintError": "engram.errors",
    "ForgetReport": "engram.editing",
    "LearnedRouter": "engram.models",
    "LiveProgress": "engram.training",
    "MemoryEditor": "engram.editing",
    "NgramHashMapping": "engram.hashing",
    "TableConfig": "engram.config",
    "TableError": "engram.errors",
    "TeachError": "engram.errors",
    "TeachReport": "engram.editing",
    "TeachSettings": "engram.editing",
    "TrainingError": "engram.errors",
    "get_engram_model": "engram.models",
    "load_bundled": "engram.models",
    "load_facts": "engram.data",
    "register_architecture": "engram.models",
    "replicate_tables": "engram.tables",
}

__all__ = sorted([*_HOMES, "__version__"])


__getattr__ = loaded_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
