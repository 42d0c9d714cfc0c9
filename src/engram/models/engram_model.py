"""A Hugging Face causal language model with an Engram memory."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engram.checkpoint import again_if_saved
from engram.config import EngramConfig, TableConfig, names_unknown
from engram.distributed import is_fully_sharded, process_count
from engram.errors import AttachError
from engram.hashing import NgramHashMapping, build_mapping
from engram.layers import Engram, GraphTrace, layer_classes
from engram.models.architectures import accepts, find_decoder
from engram.models.attaching import (
    ATTACHED,
    check_fit,
    check_free,
    check_tables_fit,
    check_topmost,
    device_of,
    freeze,
    refuse_fused_head,
    tell_of_padding,
    trainable_flags,
)
from engram.models.cache import rename_cache
from engram.models.counting import parameters_by_kind
from engram.models.hooks import DecoderHooks
from engram.models.identity import adapter_parameters
from engram.models.packing import Packing
from engram.models.quantised import forget_layout, lay_out_for_gradients, note_layout, parameter_count
from engram.models.turns import Turns
from engram.tables import is_sharded, refuse_other_rows, row_file

__all__ = ["DEFAULT_ROLLBACK_WINDOW", "EngramModel", "get_engram_model"]

DEFAULT_ROLLBACK_WINDOW = 4096
"""Positions by which a cache may be cropped and continued when the memory has a convolution (ids alone can go back any distance)."""


def _of_the_base(name: str) -> Any:
    """An attribute of the base model: what is assigned on a memory goes there too, where the base model's own code looks for it."""

    def get(self: EngramModel) -> Any:
        return getattr(self.base_model, name)

    def put(self: EngramModel, value: Any) -> None:
        setattr(self.base_model, name, value)

    return property(get, put, doc=f"The base model's ``{name}``.")


@names_unknown("get_engram_model")
def get_engram_model(
    model: PreTrainedModel | EngramModel,
    config: EngramConfig,
    tokenizer: Any,
    table_config: TableConfig | None = None,
    rollback_window: int | None = DEFAULT_ROLLBACK_WINDOW,
    mapping: NgramHashMapping | None = None,
    layer_class: type[Engram] | Mapping[int, type[Engram]] | None = None,
) -> EngramModel:
    """Attach a new memory to a decoder language model. The base model's weights are frozen and never written; adapters (peft) on it stay as
    trainable as they are, unless the memory is to be taught (``EngramConfig.verify_rows``): facts are taught to what the model is.

    With the default zero tables the model's logits are exactly what they were.

    Args:
        model: any causal language model of an architecture in ``ARCHITECTURES`` (``register_architecture`` adds one), or a memory on one: the
            new one then comes on top of it, and both are read.
        config: what the memory is; ``hidden_size`` and ``hc_mult`` are taken from the model.
        tokenizer: the model's tokenizer.
        table_config: where the tables live.
        rollback_window: see ``DEFAULT_ROLLBACK_WINDOW``; None keeps everything.
        mapping: addresses of your own, made for ``config`` (``engram.hashing.build_mapping``); None has them follow from it.
        layer_class: a subclass of ``Engram`` (see ``Engram.gated_value``) for all layers, or ``{layer id: subclass}``. It is called as
            ``Engram`` is: ``layer_class(config, mapping, layer_id, table_config, device)``.

    Raises:
        AttachError: the model is of an unknown architecture, has a memory already, or does not fit the tokenizer.
        ConfigError: the config does not fit the model, the mapping not the config, or the class is no layer's.
        TableError: the tables do not fit into memory, or the row files hold the rows of something else (``TableConfig.changed_rows``); nothing
            is allocated then.
    """
    if table_config is not None and table_config.path is not None and table_config.changed_rows == "refuse":
        for layer_id in config.layer_ids:
            refuse_other_rows(row_file(table_config.path, layer_id))
    if isinstance(config, EngramConfig):
        tell_of_padding(config, tokenizer)
    return EngramModel(model, config, tokenizer, table_config, rollback_window, mapping, layer_class)


class EngramModel(nn.Module):
    """A base model whose listed blocks read from hashed n-gram tables. Made by ``get_engram_model`` or ``from_pretrained``.

    Anything not found here is looked up on the base model (``config``, ``generation_config``, ``device``, ...). Threads take turns: a call
    waits for the ``generate``, or the ``disable_engram``, ``routed`` or ``record`` context, of another thread to end. Calls of
    ``base_model`` itself do not wait: those are for one thread.

    ``EngramTrainer`` trains it, or a loop of your own (docs/guides.md). ``transformers.Trainer`` does not: it knows nothing of the base model's
    columns and row-sparse gradients.

    Attributes:
        base_model: the causal language model, with hooks on some of its modules.
        beneath: the memory on top of which this one was attached, frozen, or None. ``disable_engram``, ``routed``, ``record`` and
            ``save_pretrained`` are about this memory alone: switched off it leaves what is beneath.
        folder: where this memory was loaded from, or saved to first; None before.
        engrams: one ``Engram`` per layer, keyed by ``str(layer_id)``; another may be put in the place of one.
        engram_config: the memory's identity.
        mapping: the memory's addresses.
        tokenizer: the one that was given with the base model; ``EngramTrainer`` saves it beside a base model that it trains.
        prefetch_rows: whether rows of all layers are fetched when a forward pass starts, beside the blocks' computation: True, False, or
            None for where it pays (``RowPrefetcher``).
        ledger: JSON-ready account of what was taught (kept by ``MemoryEditor``, saved with the memory), or None.
        turns: what threads wait for; memories on one model share it.
        trained_beside: kinds of adapters (peft) that were on the base model while it was trained; saved with the memory.
        adapters_sha256: which those were, if it was loaded (``engram.models.identity.adapter_digests``); saved with the memory.
        known_versions: what was read or written here (``engram.checkpoint.saved_version``).
        is_being_changed: whether facts are just being taught or forgotten: rows and ledger are not in step then, and saving is refused.
    """

    base_model: Any
    beneath: EngramModel | None
    engram_config: EngramConfig
    turns: Turns
    engrams: Any  # an nn.ModuleDict, whose items torch types as bare modules
    is_distributed_loading_by_transformers = False
    """Whatever its base model says of itself: transformers' ``Trainer`` would neither divide readers nor save what is to be resumed."""
    is_quantized = False
    """Of a base model that is, ``Trainer`` would refuse to train what is on it; ``EngramTrainer`` says what of it cannot be trained."""

    def __init__(
        self,
        model: PreTrainedModel | EngramModel,
        config: EngramConfig,
        tokenizer: Any,
        table_config: TableConfig | None = None,
        rollback_window: int | None = DEFAULT_ROLLBACK_WINDOW,
        mapping: NgramHashMapping | None = None,
        layer_class: type[Engram] | Mapping[int, type[Engram]] | None = None,
    ) -> None:
        super().__init__()
        beneath = model if isinstance(model, EngramModel) else None
        base: PreTrainedModel = model.base_model if isinstance(model, EngramModel) else model
        decoder = find_decoder(base)
        check_free(decoder, beneath)
        check_fit(base, decoder, config, tokenizer)
        config = config.replace(hidden_size=decoder.hidden_size, hc_mult=decoder.streams)
        classes = layer_classes(layer_class, config.layer_ids)
        if mapping is None:
            mapping = build_mapping(config, tokenizer)
        mapping.check_config(config)
        embeddings: Any = base.get_input_embeddings()
        mapping.accept_ids(embeddings.weight.shape[0])
        devices = {i: device_of(decoder.blocks[i], base, i) for i in config.layer_ids}
        check_tables_fit(mapping, devices, table_config or TableConfig())
        with torch.inference_mode(False):  # tensors made in it cannot be trained, nor their changes seen
            engrams = nn.ModuleDict(
                {str(i): classes[i](config, mapping, i, table_config, device) for i, device in devices.items()}
            )
            for layer_id, device in devices.items():
                engrams[str(layer_id)].to(device)
        # Everything is checked and built; the model is touched from here on only.
        self.base_model, self.beneath = base, beneath
        self.engrams = engrams
        self.folder: str | None = None
        self.turns = Turns() if beneath is None else beneath.turns
        self.engram_config, self.mapping, self.rollback_window = config, mapping, rollback_window
        self.tokenizer = tokenizer
        self._placed = table_config or TableConfig()
        self.ledger: dict[str, Any] | None = None
        self.trained_beside: list[str] = []
        self.adapters_sha256: list[str] | None = None
        self.known_versions: set[str | None] = set()
        self.is_being_changed = False
        self.owner_token = secrets.token_hex(8)
        self._enabled = True
        self.given_ids: Tensor | None = None  # beside inputs_embeds, for the pass under way
        self._route: Tensor | None = None
        self._traces: dict[int, dict[str, Tensor]] | None = None
        self.static_decoder: Any = None  # the StaticDecoder whose buffers hold the state, while it is one
        self._trace_kind: type[dict[str, Tensor]] = dict
        self.prefetch_rows: bool | None = None
        self._flags_before = trainable_flags(model)
        freeze(model, {} if config.verify_rows else adapter_parameters(base))
        note_layout(base)
        self._hooks: DecoderHooks | None = DecoderHooks(self, decoder)
        decoder.module.__dict__[ATTACHED] = self.owner_token
        self.train(base.training)

    @property
    def below(self) -> PreTrainedModel | EngramModel:
        """What this memory was attached to: the memory beneath if there is one, else the base model."""
        return self.base_model if self.beneath is None else self.beneath

    @property
    def is_enabled(self) -> bool:
        """Whether the memory takes part in forward passes."""
        return self._enabled

    @property
    def table_config(self) -> TableConfig:
        """Where the tables live, in the format that they have now."""
        table = next(iter(self.engrams.values())).table
        return replace(self._placed, dtype=table.format_name, files=None, stamps=None)

    def train(self, mode: bool = True) -> Self:
        """As ``torch.nn.Module.train``; 4-bit weights of the base model that bitsandbytes laid out for inference pass gradients again."""
        if mode:
            lay_out_for_gradients(self.base_model)
        return super().train(mode)

    def forward(self, *args: Any, engram_input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's forward pass with the memory; takes and returns what the base model does.

        Args:
            *args: as for the base model.
            engram_input_ids: token ids ``[B, T]`` that address the memory when ``inputs_embeds`` is given instead of ``input_ids``.
            **kwargs: as for the base model; the cache may go by its older name, ``past_key_values``, or its newer one, ``cache``.
        """
        self.check_attached()
        rename_cache(self.base_model, kwargs)
        if kwargs.get("use_cache") is False and not accepts(self.base_model, "use_cache"):
            del kwargs["use_cache"]  # a model that knows no cache keeps none
        with nullcontext() if torch.compiler.is_compiling() else self.turns:
            for memory in self.and_beneath():
                memory.given_ids = engram_input_ids
            try:
                return self.base_model(*args, **kwargs)
            finally:
                for memory in self.and_beneath():
                    memory.given_ids = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate`` with the memory: KV cache, batches, beams and speculative decoding included.

        With a static cache transformers compiles each step into CUDA graphs, which the memory's growing state breaks in pieces and which
        would copy a table in host memory at every step. Steps are taken as they are, unless ``compile_config`` or ``disable_compile`` says
        otherwise; ``StaticDecoder`` has a step in one graph.
        """
        self.check_attached()
        config = kwargs.get("generation_config") or self.generation_config
        asked = kwargs.get("compile_config") or getattr(config, "compile_config", None)
        if any(memory.is_enabled for memory in self.and_beneath()) and asked is None and self.base_model.device.type != "cpu":
            if kwargs.get("generation_config") is None:
                kwargs.setdefault("disable_compile", True)
            elif "disable_compile" not in kwargs:  # transformers warns of arguments beside a configuration
                kwargs["generation_config"] = copy.copy(config)
                kwargs["generation_config"].disable_compile = True
        rename_cache(self.base_model, kwargs)
        if process_count() > 1 and any(map(is_sharded, self.and_beneath())):  # rows are asked of each other until all are done
            kwargs.setdefault("synced_gpus", True)
        with self.turns:
            return self.base_model.generate(*args, **kwargs)

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Not offered: continuous batching packs requests into one row, where the memory cannot tell them apart.

        Raises:
            AttachError: always.
        """
        raise AttachError(
            "continuous batching packs requests into one row, where the memory cannot tell them apart; use generate, or the base model alone "
            "(unload())."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    config = _of_the_base("config")
    generation_config = _of_the_base("generation_config")
    loss_function = _of_the_base("loss_function")

    def disable_engram(self) -> AbstractContextManager[None]:
        """Inside this context the model is exactly what it was attached to."""
        return self._switched(False)

    def enable_engram(self) -> AbstractContextManager[None]:
        """Inside this context the memory takes part, even within ``disable_engram``."""
        return self._switched(True)

    @contextmanager
    def _switched(self, on: bool) -> Iterator[None]:
        with self.turns:
            before, self._enabled = self._enabled, on
            try:
                yield
            finally:
                self._enabled = before

    @contextmanager
    def routed(self, route: Tensor | None) -> Iterator[None]:
        """Inside this context only the sequences for which ``route`` (bool ``[B]``) is True read the memory.

        The others get exactly the base model's computation; None routes all. Within ``generate`` each decision covers the beams of
        its sequence.
        """
        with self.turns:
            before, self._route = self._route, route
            try:
                yield
            finally:
                self._route = before

    @contextmanager
    def record(self, grad: bool = False) -> Iterator[dict[int, dict[str, Tensor]]]:
        """Collect, per layer, what the last forward pass read: ``hash_ids [B, T, H]``, ``gate [B, T, M]`` for M residual streams, the gated
        ``value`` and the incoming ``stream`` (both ``[B, T, M, d]``), and what was ``added`` to the stream, the convolution included.

        Of recordings inside each other the innermost collects.

        Args:
            grad: whether the tensors keep their graph. Without, they are detached: a loss made of them trains nothing. With it a term of
                the loss may be made of gates, to have them open less often for instance; the native core's pass over the gates, which
                keeps no graph, then stands aside, at the price of some speed. Backward while the traces are there, or after.
        """
        with self.turns:
            before, self._traces, self._trace_kind = (self._traces, self._trace_kind), {}, GraphTrace if grad else dict
            try:
                yield self._traces
            finally:
                self._traces, self._trace_kind = before

    def unload(self) -> Any:
        """Detach the memory and give back the very model, or memory, that it was attached to, trainable flags included.

        If parameters came, went or were renamed since (an adapter was added, say), flags stay as they are: they are somebody else's now.

        Raises:
            AttachError: it was unloaded before, another memory is attached on top of it, or it is divided between processes
                (``shard_model``).
        """
        with self.turns:
            return self._unload()

    def _unload(self) -> Any:
        decoder = find_decoder(self.base_model)
        check_topmost(self)
        if is_fully_sharded(self):
            raise AttachError(
                "unload: got a memory and a model that FSDP has divided together, expected whole ones; save both and load them anew."
            )
        assert self._hooks is not None
        marks = decoder.module.__dict__
        self._hooks.remove()
        self._hooks = None
        marks.pop(ATTACHED)
        if self.beneath is not None:
            marks[ATTACHED] = self.beneath.owner_token
        else:
            forget_layout(self.base_model)
        if trainable_flags(self.below).keys() == self._flags_before.keys():
            for name, parameter in self.below.named_parameters():
                parameter.requires_grad_(self._flags_before[name])
        return self.below

    def and_beneath(self) -> Iterator[EngramModel]:
        """This memory, the one that it is attached to, the one beneath that, and so on."""
        memory: EngramModel | None = self
        while memory is not None:
            yield memory
            memory = memory.beneath

    def num_parameters_by_kind(self) -> dict[str, int]:
        """Parameter counts: ``tables``, ``reader`` (projections, norms, convolution) and ``base``, with what adapters are on it."""
        counts = {kind: count for kind, (_, count) in parameters_by_kind(self).items()}
        return {"tables": counts["tables"], "reader": counts["reader"], "base": counts["base"] + counts.get("adapters", 0)}

    def print_trainable_parameters(self) -> None:
        """Print how many parameters would be trained, as peft does, and of which kind they are: of so many of that kind so many."""
        trainable = sum(parameter_count(p) for p in self.parameters() if p.requires_grad)
        total = sum(map(parameter_count, self.parameters()))
        kinds = ", ".join(f"{kind} {trained:,} of {count:,}" for kind, (trained, count) in parameters_by_kind(self).items())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f} ({kinds})"
        )

    def save_pretrained(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Save the memory (not the base model) into the folder ``path``, atomically; see ``engram.models.files``.

        Args:
            path: the folder. A trained memory in it is replaced.
            overwrite: replace facts too that were neither read nor written here.

        Raises:
            CheckpointError: the folder cannot be written or holds such facts, a seeded reader was trained, or facts are just being taught.
            AttachError: the memory lies beneath one that was divided.
        """
        from engram.models.files import save_memory

        save_memory(self, path, overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload memory",
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the memory (not the base model) to the Hugging Face hub; of what was pushed before, files that are not used any more go.

        It is saved into a temporary folder first. ``from_pretrained`` takes its name.

        Args:
            repo_id: ``owner/name``; made if there is none.
            commit_message: of the upload.
            private: whether a repository that is made is private.
            token: as for ``huggingface_hub``; that of ``hf auth login`` if not given.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: its tables are divided between processes.
            CheckpointError: it cannot be uploaded; the message carries the hub's reason.
        """
        from engram.models.hub import push_memory

        return push_memory(self, repo_id, commit_message, private, token)

    def load_memory(
        self,
        path: str | os.PathLike[str],
        allow_other_base: bool = False,
        changed_rows: Literal["refuse", "keep", "refill"] = "refuse",
    ) -> None:
        """Read a saved memory of the same identity into this one.

        Args:
            path: a folder written by ``save_pretrained``.
            allow_other_base: as for ``from_pretrained``.
            changed_rows: what becomes of row files that do not hold the saved rows, as in ``TableConfig``.

        Raises:
            CheckpointError: the files are missing, truncated or malformed, or a row file holds other rows.
            FingerprintError: the memory belongs to another tokenizer, mapping or base model.
            ConfigError: it has another configuration, or layers of another class.
        """
        from engram.models.files import load_memory

        load_memory(self, path, allow_other_base, changed_rows)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | EngramModel,
        path: str | os.PathLike[str],
        tokenizer: Any,
        table_config: TableConfig | None = None,
        rollback_window: int | None = DEFAULT_ROLLBACK_WINDOW,
        allow_other_base: bool = False,
        mapping: NgramHashMapping | None = None,
        layer_class: type[Engram] | Mapping[int, type[Engram]] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Attach a saved memory to ``model``.

        Args:
            model: the base model, or the memory on one, that it was made for.
            path: a folder written by ``save_pretrained``, or the name (``owner/name``) of what ``push_to_hub`` uploaded.
            tokenizer: the tokenizer it was made for.
            table_config: where the tables shall live now; as they were saved or placed (``engram place``) if not given.
            rollback_window: as for ``get_engram_model``.
            allow_other_base: accept another base model of the same sizes (a fine-tuned one, say), or with more tokens.
            mapping: addresses of your own, if it was made with a subclass of ``NgramHashMapping``; multipliers that were given are saved.
            layer_class: as for ``get_engram_model``: layers of your own, if it was made with such. Layers that were saved as ``Engram`` may be
                read by any class with the same parameters.
            revision: of a memory on the hub: branch, tag or commit.
            token: as for ``huggingface_hub``; that of ``hf auth login`` if not given.

        Raises:
            CheckpointError, FingerprintError, ConfigError, AttachError: see ``load_memory`` and ``get_engram_model``; the model is
                left as it was.
        """
        from engram.models.hub import check_order, found_at, remember_name

        check_order(model, path)
        folder, placement = found_at(path, revision, token)
        options = (table_config or placement, rollback_window, allow_other_base, mapping, layer_class)
        memory = again_if_saved(folder, lambda: cls._load(model, folder, tokenizer, *options))
        remember_name(memory, path, folder)
        return memory

    @classmethod
    def _load(
        cls,
        model: PreTrainedModel | EngramModel,
        path: str | os.PathLike[str],
        tokenizer: Any,
        table_config: TableConfig | None,
        rollback_window: int | None,
        allow_other_base: bool,
        mapping: NgramHashMapping | None,
        layer_class: type[Engram] | Mapping[int, type[Engram]] | None,
    ) -> Self:
        from engram.models.files import check_memory, load_memory

        mapping, placement = check_memory(model, path, tokenizer, allow_other_base, table_config, mapping, layer_class)
        memory = cls(model, mapping.config, tokenizer, placement, rollback_window, mapping, layer_class)
        try:
            load_memory(memory, path, allow_other_base, placement.changed_rows, just_checked=True)
        except BaseException:
            memory.unload()
            raise
        return memory

    def check_attached(self) -> None:
        """Refuse to go on with a memory that is on no model any more.

        Raises:
            AttachError: it was unloaded.
        """
        if self._hooks is None:
            raise AttachError("this memory was unloaded; attach it again with get_engram_model or EngramModel.from_pretrained.")

    @property
    def is_recording(self) -> bool:
        """Whether this is inside ``record()``."""
        return self._traces is not None

    def trace_for(self, layer_id: int, hash_ids: Tensor | None) -> dict[str, Tensor] | None:
        """Where a layer writes down what ``record`` is to show of this pass; None outside of it."""
        if self._traces is None:
            return None
        assert hash_ids is not None
        self._traces[layer_id] = self._trace_kind(hash_ids=hash_ids)
        return self._traces[layer_id]

    def put_together(self, layer_id: int, packing: Packing) -> None:
        """What was recorded of packed texts, by row."""
        trace = (self._traces or {}).get(layer_id, {})
        trace.update({name: packing.together(values) for name, values in trace.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            refuse_fused_head(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)
