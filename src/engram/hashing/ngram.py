"""The fast path of the n-gram hash: all layers, positions and heads at once, on any device.

Shape legend: B batch, T new positions, H history, L layers, N largest order, K heads per order.

Kernels compute all orders for all layers, a rectangle; layers that read fewer take their columns out of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from engram.config import EngramConfig
from engram.errors import ConfigError
from engram.hashing.compression import CompressedTokenizer, ExactTokenizer, check_id_range, unknown_id
from engram.hashing.layout import given_multipliers, layer_multipliers, prime_layout, prime_walk
from engram.hashing.spec import get_hash_spec
from engram.native import HashKernel, RowIndex, core, have_addresses
from engram.native.optional import triton_kernel

__all__ = ["TAG_MODULUS", "NgramHashMapping", "build_mapping", "mapping_without_tokenizer"]

TAG_MODULUS = 2**31 - 1
"""Tags are ``1 + (mix // prime) % TAG_MODULUS``: they fit 32 bits and are never zero."""

Multipliers = Mapping[int, Sequence[int] | np.ndarray]


def build_mapping(config: EngramConfig, tokenizer: Any, multipliers: Multipliers | None = None) -> NgramHashMapping:
    """The addresses of a memory over a tokenizer, with the id map that its hash specification asks for.

    Args:
        config: the memory's identity.
        tokenizer: the model's tokenizer.
        multipliers: as for ``NgramHashMapping``.
    """
    kind = ExactTokenizer if get_hash_spec(config.hash_spec).ids == "raw" else CompressedTokenizer
    return NgramHashMapping(config, kind(tokenizer), multipliers)


def mapping_without_tokenizer(
    config: EngramConfig, vocab_size: int, multipliers: Multipliers | None = None
) -> NgramHashMapping:
    """The same addresses for a specification with raw ids, which needs nothing of the tokenizer but its size. It has no fingerprint.

    Args:
        config: the memory's identity.
        vocab_size: how many ids there are; they are 0..vocab_size - 1.
        multipliers: as for ``NgramHashMapping``.

    Raises:
        ConfigError: the specification compresses ids.
    """
    if get_hash_spec(config.hash_spec).ids != "raw":
        raise ConfigError(
            f"hash_spec {config.hash_spec!r} compresses ids: its addresses cannot be computed without the tokenizer."
        )
    return NgramHashMapping(config, ExactTokenizer.of_size(vocab_size), multipliers)


class NgramHashMapping:
    """Addresses of a memory: which rows each position of a text reads in each layer. They never change once it is made.

    A subclass may compute them otherwise: ``hash``, and for verified rows ``hash_with_tags``, are what memories call. Its class name
    enters the fingerprint, and kernels, which know the stock formula alone, stand aside.

    Args:
        config: the memory's identity.
        compressed_tokenizer: the compression map of the model's tokenizer.
        multipliers: of your own, ``{layer_id: N ints}``, that of the newest token first; for specifications whose ``multipliers`` are
            ``given`` (``exact_given``, ``demo_given``), and for those only. Odd ones lose nothing of an id.

    Attributes:
        pad_id: canonical id of ``config.pad_id``.

    Raises:
        ConfigError: ``config.pad_id`` is not in the tokenizer's vocabulary, the hash specification is unknown, or the multipliers are
            missing, not wanted or impossible.
    """

    def __init__(
        self, config: EngramConfig, compressed_tokenizer: CompressedTokenizer, multipliers: Multipliers | None = None
    ) -> None:
        if not isinstance(compressed_tokenizer, CompressedTokenizer):
            raise ConfigError(
                f"compressed_tokenizer: got {type(compressed_tokenizer).__name__}, expected a CompressedTokenizer; "
                "build_mapping(config, tokenizer) makes one of a Hugging Face tokenizer."
            )
        self.config = config
        self.spec = get_hash_spec(config.hash_spec)
        self.compressed_tokenizer = compressed_tokenizer
        table = compressed_tokenizer.lookup_table
        if config.pad_id >= len(table):
            raise ConfigError(
                f"EngramConfig.pad_id: got {config.pad_id}, expected an id of the tokenizer (0..{len(table) - 1}); "
                "use tokenizer.pad_token_id or tokenizer.eos_token_id."
            )
        if (largest := max(config.boundary_ids, default=0)) >= len(table):
            raise ConfigError(f"EngramConfig.boundary_ids: got {largest}, expected ids of the tokenizer (0..{len(table) - 1}).")
        self.pad_id = int(table[config.pad_id])
        self._lookup = table
        self._multipliers = self._make_multipliers(multipliers)
        self._primes_of_all_orders = prime_walk(config)
        self._primes = prime_layout(config, self._primes_of_all_orders)
        self._constants: dict[torch.device, _HashConstants] = {}
        self._kernel: HashKernel | None = None

    def __repr__(self) -> str:
        config, layers = self.config, list(self.config.layer_ids)
        rows = sum(sum(self.head_sizes(layer)) for layer in layers)
        orders = f"2..{config.max_ngram_size}"
        return f"{type(self).__name__}(hash_spec={self.spec.name!r}, layers={layers}, orders={orders}, heads={config.num_heads}, rows={rows})"

    def _make_multipliers(self, given: Multipliers | None) -> dict[int, np.ndarray]:
        count = len(self.compressed_tokenizer)
        if self.spec.multipliers == "given" and given is not None:
            return given_multipliers(self.config, count, given)
        if given is not None:
            raise ConfigError(
                f"multipliers: got some with hash_spec {self.spec.name!r}, which draws its own from the seed; expected hash_spec "
                f"'{'exact_given' if self.spec.ids == 'raw' else 'demo_given'}', or none."
            )
        if self.spec.multipliers == "given":
            raise ConfigError(
                f"multipliers: got none, expected {{layer: ints}}, as hash_spec {self.spec.name!r} says that they are given: make the mapping "
                "by build_mapping(config, tokenizer, multipliers=...) and pass it as mapping=..."
            )
        return layer_multipliers(self.config, count)

    @property
    def layer_multipliers(self) -> Mapping[int, np.ndarray]:
        """``{layer_id: int64 [N]}``, that of the newest token first. Read-only: kernels have theirs in copies; own ones are given when the
        mapping is made.
        """
        return MappingProxyType({layer: _read_only(multipliers) for layer, multipliers in self._multipliers.items()})

    @property
    def vocab_size_across_layers(self) -> Mapping[int, list[list[int]]]:
        """``{layer_id: [[K primes of order 2], [K primes of order 3], ...]}``, a copy; no primes in an order that the layer does not read."""
        return MappingProxyType({layer: [list(primes) for primes in orders] for layer, orders in self._primes.items()})

    def check_config(self, config: EngramConfig) -> None:
        """Refuse to be the addresses of a memory of another configuration; the model's sizes, which are filled in later, do not count.

        Raises:
            ConfigError: fields differ.
        """
        own, asked = (c.replace(hidden_size=None, hc_mult=None).to_dict() for c in (self.config, config))
        differing = [f"{name} {own[name]!r}, not {asked[name]!r}" for name in own if own[name] != asked[name]]
        if differing:
            raise ConfigError(
                f"mapping: made for another configuration ({'; '.join(differing)}); expected one made from the memory's own EngramConfig."
            )

    def accept_ids(self, count: int) -> None:
        """Take ids 0..count - 1 from now on. Embeddings are often wider than the tokenizer, and a model that samples may say ids that no
        token has: in n-grams they count as ``pad_id``. Addresses of texts and the fingerprint do not change.
        """
        table = self.compressed_tokenizer.lookup_table
        self._lookup = np.concatenate([table, np.full(max(0, count - len(table)), self.pad_id, dtype=table.dtype)])
        self._constants, self._kernel = {}, None

    @property
    def accepted_ids(self) -> int:
        """How many ids are taken, from 0 on."""
        return len(self._lookup)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides an address: specification, ids, multipliers, primes, padding, layers.

        Two mappings with equal fingerprints read the same rows for every text; a saved memory is refused under any other.
        """
        identity = {
            "spec": self.spec.to_dict(),
            "pad": self.pad_id,
            "raw_pad": self.config.pad_id,
            "multipliers": {str(k): v.tolist() for k, v in self._multipliers.items()},
            "primes": {str(k): v for k, v in self._primes.items()},
        }
        if self.config.boundary_ids:
            identity["boundaries"] = sorted(self.config.boundary_ids)
        if type(self) is not NgramHashMapping:
            identity["class"] = type(self).__name__
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        digest.update(self.compressed_tokenizer.identity)
        return digest.hexdigest()

    def head_sizes(self, layer_id: int) -> list[int]:
        """Rows of each head of one layer, order-major: the primes in one flat list."""
        return [prime for order in self._primes[layer_id] for prime in order]

    @overload
    def hash(
        self, input_ids: Tensor, history: Tensor | None = ..., attention_mask: Tensor | None = ...
    ) -> dict[int, Tensor]: ...

    @overload
    def hash(
        self, input_ids: np.ndarray, history: np.ndarray | None = ..., attention_mask: np.ndarray | None = ...
    ) -> dict[int, np.ndarray]: ...

    def hash(self, input_ids, history=None, attention_mask=None):
        """Head indices of every layer (before head offsets are added).

        Args:
            input_ids: raw token ids ``[B, T]``, a tensor or a NumPy array.
            history: raw ids ``[B, H]`` that came before; only the last N - 1 matter, fewer are padded. Masked positions of the
                past must hold ``config.pad_id``.
            attention_mask: ``[B, T]``, zero at padding, which then counts as ``pad_id`` in every n-gram.

        Returns:
            ``{layer_id: int64 [B, T, (N - 1) * K]}``, in the kind and on the device of ``input_ids``; of a layer that reads fewer orders
            the columns of those alone.

        Raises:
            ConfigError: a shape or an id is impossible.
        """
        if not isinstance(input_ids, Tensor):
            return self._hash_arrays(input_ids, history, attention_mask)
        return self._up_to_boundaries(self._hash_tensors, input_ids, history, attention_mask)

    def _hash_tensors(self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None) -> dict[int, Tensor]:
        """``hash`` by the fastest code that serves, across boundaries."""
        kernel = self.kernel_for(input_ids)
        if kernel is not None:
            self._check_shapes(input_ids, history, attention_mask)
            try:
                hashed = kernel.hash(input_ids, history, attention_mask, False)[0]
            except IndexError as error:
                raise self._unknown_id(error) from None
            return self._by_layer(hashed)
        launched = self._launch(input_ids, history, attention_mask, None)
        if launched is not None:
            return self._by_layer(launched[0])
        return self._hash_plainly(input_ids, history, attention_mask)

    def _up_to_boundaries(
        self,
        hash_ids: Callable[[Tensor, Tensor | None, Tensor | None], dict[int, Tensor]],
        input_ids: Tensor,
        history: Tensor | None,
        attention_mask: Tensor | None,
    ) -> dict[int, Tensor]:
        """What ``hash_ids`` gives where no n-gram reaches across one of ``boundary_ids``: every position's window as a sequence of its own."""
        if not self.config.boundary_ids or not input_ids.numel():
            return hash_ids(input_ids, history, attention_mask)
        windows_PN = self.windows(input_ids, history, attention_mask).flatten(0, 1)
        hashed = hash_ids(windows_PN[:, -1:].contiguous(), windows_PN[:, :-1].contiguous(), None)
        return {layer: of_layer.unflatten(0, input_ids.shape).squeeze(2) for layer, of_layer in hashed.items()}

    def windows(self, input_ids: Tensor, history: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Raw ids ``[B, T, N]`` that the n-grams ending at each position are made of, the newest last; arguments as for ``hash``.

        ``pad_id`` stands before the start, at padding, and at a boundary and all that is older (``EngramConfig.boundary_ids``).

        Raises:
            ConfigError: a shape or an id is impossible.
        """
        self._check(input_ids, history, attention_mask)
        context_BX = self._context(input_ids, history, attention_mask)
        windows_BTN = (
            context_BX.unfold(1, self.config.max_ngram_size, 1)
            if input_ids.shape[1]
            else context_BX.new_empty((*input_ids.shape, self.config.max_ngram_size))
        )
        if not self.config.boundary_ids:
            return windows_BTN
        ends_BTN = self._constants_on(context_BX.device).is_boundary[windows_BTN]
        cut_BTN = ends_BTN.flip(-1).cummax(-1).values.flip(-1)  # at a boundary, and at what is older
        return windows_BTN.masked_fill(cut_BTN, self.config.pad_id)

    def _hash_arrays(
        self, input_ids: np.ndarray, history: np.ndarray | None, attention_mask: np.ndarray | None
    ) -> dict[int, np.ndarray]:
        """``hash`` for arrays; plain int64 ids alone, which the demo's users have, go the shortest way."""
        kernel = self._kernel
        alone = history is None and attention_mask is None and self.config.layer_orders is None and not self.config.boundary_ids
        if alone and kernel is not None and core() is not None:
            try:
                return dict(zip(self.config.layer_ids, kernel.hash_array(input_ids)))
            except IndexError as error:
                raise self._unknown_id(error) from None
            except (BufferError, TypeError, ValueError, AttributeError):
                pass  # another type, shape or layout: below it is converted, or refused with a message
        as_tensors: Any = [None if x is None else torch.from_numpy(np.asarray(x)) for x in (input_ids, history, attention_mask)]
        return {layer: ids.numpy() for layer, ids in self.hash(*as_tensors).items()}

    def hash_plain(
        self, input_ids: Tensor, history: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """What ``hash`` gives, by tensor operations on any device."""
        return self._up_to_boundaries(self._hash_plainly, input_ids, history, attention_mask)

    def _hash_plainly(self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None) -> dict[int, Tensor]:
        """``hash_plain`` across boundaries."""
        mixes_LBTO, primes_LOK = self._mixes(input_ids, history, attention_mask)
        hashed_LBTH = (mixes_LBTO.unsqueeze(-1) % primes_LOK).flatten(-2)
        return self._by_layer(hashed_LBTH)

    def _by_layer(self, values_LBTH: Tensor) -> dict[int, Tensor]:
        """Every layer's own columns of what was computed for all orders."""
        by_layer = dict(zip(self.config.layer_ids, values_LBTH.unbind(0)))
        for layer, orders in dict(self.config.layer_orders or ()).items():
            of_order_BTK = by_layer[layer].split(self.config.n_head_per_ngram, dim=-1)
            by_layer[layer] = torch.cat([of_order_BTK[order - 2] for order in orders], dim=-1)
        return by_layer

    def hash_with_tags(
        self, input_ids: Tensor, history: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Head indices as ``hash`` gives them, and the tag of every n-gram under every head.

        A tag comes from the part of the n-gram's mix that the modulus throws away: index and tag together tell n-grams apart that
        share a row.

        Returns:
            ``{layer_id: (indices int64 [B, T, H], tags int32 [B, T, H])}``; tags are at least 1.

        Raises:
            ConfigError: a shape or an id is impossible, or the configuration has ``boundary_ids``.
        """
        hashed, tags = (
            self._by_layer(values_LBTH) for values_LBTH in self._hashed_and_tags(input_ids, history, attention_mask)
        )
        return {layer: (hashed[layer], tags[layer]) for layer in self.config.layer_ids}

    def _hashed_and_tags(
        self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Head indices and tags of all orders, ``[L, B, T, (N - 1) * K]`` both."""
        if self.config.boundary_ids:
            raise ConfigError(
                "boundary_ids: got some, expected none where n-grams have tags (verify_rows): keys of facts may hold any token."
            )
        kernel = self.kernel_for(input_ids)
        if kernel is not None:
            self._check_shapes(input_ids, history, attention_mask)
            try:
                hashed, tags = kernel.hash(input_ids, history, attention_mask, True)
            except IndexError as error:
                raise self._unknown_id(error) from None
            assert tags is not None
            return hashed, tags
        launched = self._launch(input_ids, history, attention_mask, TAG_MODULUS)
        if launched is not None:
            return launched
        mixes_LBTO, primes_LOK = self._mixes(input_ids, history, attention_mask)
        quotients_LBTOK = mixes_LBTO.unsqueeze(-1) // primes_LOK
        hashed_LBTH = (mixes_LBTO.unsqueeze(-1) - quotients_LBTOK * primes_LOK).flatten(-2)
        tags_LBTH = (quotients_LBTOK % TAG_MODULUS + 1).int().flatten(-2)
        return hashed_LBTH, tags_LBTH

    def _launch(
        self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None, tag_modulus: int | None
    ) -> tuple[Tensor, Any] | None:
        """Head indices ``[L, B, T, H]`` and tags by one Triton kernel; None unless the ids are on a CUDA device and Triton is there."""
        if input_ids.device.type != "cuda" or not have_addresses(input_ids) or type(self) is not NgramHashMapping:
            return None
        kernel = triton_kernel("engram.hashing.triton_hash", "hash_ngrams_triton")
        if kernel is None:
            return None
        self._check_shapes(input_ids, history, attention_mask)
        constants = self._constants_on(input_ids.device)
        tensors = (constants.lookup_table, constants.multipliers, constants.primes[:, 0, 0])
        with torch.cuda.device(input_ids.device):  # Triton launches on the current device
            return kernel(input_ids, history, attention_mask, *tensors, self.config.pad_id, tag_modulus)

    def _mixes(self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mixes ``[L, B, T, N - 1]`` of every n-gram, and the primes ``[L, 1, 1, N - 1, K]`` of the heads that share them."""
        self._check(input_ids, history, attention_mask)
        constants = self._constants_on(input_ids.device)
        context_BX = self._context(input_ids, history, attention_mask)
        return _mix_context(constants, constants.lookup_table[context_BX], input_ids.shape[1]), constants.primes

    def kernel_for(self, input_ids: Tensor) -> HashKernel | None:
        """The native kernel, where it can serve: it is built, the ids are on the CPU, no graph is being traced and no subclass has a say."""
        if (
            core() is None
            or input_ids.device.type != "cpu"
            or not have_addresses(input_ids)
            or type(self) is not NgramHashMapping
        ):
            return None
        if self._kernel is None:
            layers = self.config.layer_ids
            self._kernel = HashKernel(
                self._lookup,
                np.stack([self._multipliers[layer] for layer in layers]),
                np.array(list(self._primes_of_all_orders.values())).reshape(len(layers), -1),
                self.config.n_head_per_ngram,
                self.config.pad_id,
            )
        return self._kernel

    def find(
        self,
        layer_id: int,
        index: RowIndex,
        input_ids: Tensor,
        history: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | None:
        """Slots int64 ``[B, T, H]`` of the written rows that positions read in one layer, -1 elsewhere; None if nothing is read.

        Hash, tag and search in one native call; ``kernel_for(input_ids)`` must not be None.

        Raises:
            ConfigError: a shape or an id is impossible.
        """
        kernel = self.kernel_for(input_ids)
        assert kernel is not None
        self._check_shapes(input_ids, history, attention_mask)
        layer = self.config.layer_ids.index(layer_id)
        try:
            return kernel.find(layer, index, input_ids, history, attention_mask, self.config.longest_only)
        except IndexError as error:
            raise self._unknown_id(error) from None

    def _unknown_id(self, error: IndexError) -> ConfigError:
        return unknown_id(int(str(error)), len(self._lookup))

    def _check(self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None) -> None:
        self._check_shapes(input_ids, history, attention_mask)
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the check would stall the device
            for ids in (input_ids, history):
                if ids is not None:
                    check_id_range(ids.numpy(), len(self._lookup))

    @staticmethod
    def _check_shapes(input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ConfigError(f"input_ids: got {input_ids.dtype} {list(input_ids.shape)}, expected integers of shape [B, T].")
        if history is not None and (history.dim() != 2 or history.shape[0] != input_ids.shape[0]):
            raise ConfigError(f"history: got shape {list(history.shape)}, expected [{input_ids.shape[0]}, H].")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ConfigError(f"attention_mask: got shape {list(attention_mask.shape)}, expected {list(input_ids.shape)}.")

    def _context(self, input_ids: Tensor, history: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Raw ids ``[B, N - 1 + T]``: the N - 1 ids before the first position, then the positions themselves."""
        reach = self.config.max_ngram_size - 1
        ids = input_ids.long()
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask == 0, self.config.pad_id)  # where() may copy a scalar to the device, and wait
        past = ids.new_empty((ids.shape[0], 0)) if history is None else history.long()[:, -reach:]
        missing = reach - past.shape[1]
        return torch.cat([ids.new_full((ids.shape[0], missing), self.config.pad_id), past, ids], dim=1)

    def _constants_on(self, device: torch.device) -> _HashConstants:
        constants = self._constants.get(device)
        if constants is None:
            constants = self._constants[device] = _HashConstants(self, device)
        return constants

    def __getstate__(self) -> dict:
        """Copies and pickles leave what is computed behind; it is rebuilt on first use."""
        return {**self.__dict__, "_constants": {}, "_kernel": None}


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


class _HashConstants:
    """The mapping's arrays as tensors of one device."""

    def __init__(self, mapping: NgramHashMapping, device: torch.device) -> None:
        layers = mapping.config.layer_ids
        self.lookup_table = torch.from_numpy(mapping._lookup).to(device)
        multipliers_LN = np.stack([mapping._multipliers[layer] for layer in layers])
        self.multipliers = torch.from_numpy(multipliers_LN).to(device)
        primes_LOK = torch.tensor(list(mapping._primes_of_all_orders.values()), dtype=torch.int64)
        self.primes = primes_LOK.to(device)[:, None, None]
        is_boundary = torch.zeros(len(mapping._lookup), dtype=torch.bool)
        is_boundary[list(mapping.config.boundary_ids)] = True
        self.is_boundary = is_boundary.to(device)


def _mix_context(constants: _HashConstants, context_BX: Tensor, length: int) -> Tensor:
    """Mixes ``[L, B, T, N - 1]`` from compressed ids with their N - 1 predecessors."""
    layers, orders = constants.multipliers.shape
    reach = orders - 1
    mix_LBT = context_BX[:, reach:] * constants.multipliers[:, 0].view(layers, 1, 1)
    mixes = []
    for step in range(1, orders):
        token_BT = context_BX[:, reach - step : reach - step + length]
        mix_LBT = mix_LBT ^ (token_BT * constants.multipliers[:, step].view(layers, 1, 1))
        mixes.append(mix_LBT)
    return torch.stack(mixes, dim=-1)
