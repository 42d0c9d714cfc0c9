"""Training and held-out blocks out of a token store, each computed from its number alone: a resumed run sees what the first would have seen."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engram.data.recipe import KINDS
from engram.data.store import TokenStore
from engram.errors import ConfigError, DataError

__all__ = ["IGNORED", "HeldOutBlocks", "TrainingBlocks", "epoch_order", "held_out_order"]

IGNORED = -100
"""Label of a position that is not to be predicted (PyTorch's own number for it)."""
_HELD_OUT_SEED = 0
_PART_OF_A_FILE = re.compile(r"#(?:doc)?\d+$")
_LARGEST_SHARE = 8
_KEPT_ORDERS = 2  # a block may lie across two epochs


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A seeded order of ``count`` things, int64 ``[count]``. Of NumPy only PCG64's raw stream is promised to stay, so that alone is used."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


class _Sequence:
    """Some documents of a store, one after another in a given order, read anywhere without copying the rest."""

    def __init__(self, store: TokenStore, documents: np.ndarray) -> None:
        self.store, self.documents = store, documents
        self.ends = np.cumsum(store.documents["length"][documents])

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and document numbers of positions ``start`` to ``end`` (as far as there are any), both int64."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        ids: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        while start < end and first < len(self.documents):
            document = int(self.documents[first])
            whole = self.store.ids(document)
            begin = start - (int(self.ends[first]) - len(whole))
            piece = whole[begin : begin + end - start]
            ids.append(piece.astype(np.int64))
            numbers.append(np.full(len(piece), document))
            start, first = start + len(piece), first + 1
        return np.concatenate(ids), np.concatenate(numbers)


class TrainingBlocks(Dataset[dict[str, Tensor]]):
    """``blocks`` blocks of the store's training documents: epoch after epoch, each in its own seeded order, cut to equal lengths.

    A document comes as often per epoch as its weight says, led by the begin token. Nothing is materialised but one epoch's order, so block
    n costs the same whether or not those before it were read. ``training_stream`` in `reference.py` is the definition.

    Args:
        store: where the ids are.
        seq_len: tokens per block.
        blocks: how many.
        seed: of the orders.

    Raises:
        ConfigError: a number is impossible.
    """

    def __init__(self, store: TokenStore, seq_len: int, blocks: int, seed: int) -> None:
        for name, value, least in (("seq_len", seq_len, 1), ("blocks", blocks, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"TrainingBlocks.{name}: got {value}, expected at least {least}.")
        self.store, self.seq_len, self.blocks, self.seed = store, seq_len, blocks, seed
        train = store.split("train")
        self._copies = np.repeat(train, store.documents["weight"][train])
        self.tokens_per_epoch = int(store.documents["length"][self._copies].sum())
        """Tokens until every training document was seen as often as its weight says."""
        self._orders: dict[int, _Sequence] = {}

    @property
    def epochs(self) -> float:
        """How many epochs all blocks together are."""
        return self.blocks * self.seq_len / self.tokens_per_epoch

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 ``[seq_len]`` each and equal: the model shifts them."""
        if not -self.blocks <= index < self.blocks:
            raise IndexError(f"block {index}: there are {self.blocks}")
        start = index % self.blocks * self.seq_len
        end, pieces = start + self.seq_len, []
        while start < end:
            epoch, offset = divmod(start, self.tokens_per_epoch)
            ids, _ = self._epoch(epoch).read(offset, min(self.tokens_per_epoch, offset + end - start))
            pieces.append(ids)
            start += len(ids)
        block = torch.from_numpy(np.concatenate(pieces))
        return {"input_ids": block, "labels": block.clone()}

    def _epoch(self, epoch: int) -> _Sequence:
        if epoch not in self._orders:
            if len(self._orders) >= _KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            order = epoch_order(self.seed, epoch, len(self._copies))
            self._orders[epoch] = _Sequence(self.store, self._copies[order])
        return self._orders[epoch]


def held_out_order(store: TokenStore) -> np.ndarray:
    """Numbers of all held-out documents in one fixed order, in which the first of them are of all kinds; empty if nothing is held out."""
    documents = store.split("held_out")
    return documents[epoch_order(_HELD_OUT_SEED, 0, len(documents))]


def _file_of(name: str) -> str:
    """The file that a document is from: documentation inside a program, and each text of a file of many, is a document of its own."""
    return _PART_OF_A_FILE.sub("", name)


def _part_by_file(store: TokenStore, documents: np.ndarray, part: tuple[int, int]) -> np.ndarray:
    """Documents of every ``of``-th file from the ``n``-th on, files of one kind after another, so that all parts have the same kinds."""
    files = [_file_of(store.names[document]) for document in documents]
    by_kind = np.argsort(store.documents["kind"][documents], kind="stable")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(files[place] for place in by_kind))}
    return documents[np.array([numbers[name] % part[1] == part[0] for name in files], dtype=bool)]


def _without_giants(store: TokenStore, documents: np.ndarray, largest: int) -> np.ndarray:
    """Documents of at most so many tokens; all of them if there are none."""
    small = documents[store.documents["length"][documents] <= largest]
    return small if len(small) else documents


def _filled(store: TokenStore, documents: np.ndarray, tokens: int) -> np.ndarray:
    """Of these documents as many as fit into so many tokens; what does not fit is passed over, and the shortest is taken if none does.

    Kinds come in the proportions in which they are there, and of every file one document comes before a second.
    """
    lengths = dict(zip(documents.tolist(), store.documents["length"][documents].tolist()))
    queues = _queues(store, documents)
    there = {kind: sum(lengths[document] for document in queue) for kind, queue in queues.items()}
    taken, chosen = dict.fromkeys(queues, 0), []
    while queues:
        kind = min(queues, key=lambda kind: (taken[kind] / there[kind], kind))
        document = queues[kind].popleft()
        if lengths[document] <= tokens:
            chosen.append(document)
            taken[kind] += lengths[document]
            tokens -= lengths[document]
        if not queues[kind]:
            del queues[kind]
    return np.array(chosen or [min(lengths, key=lambda document: lengths[document])])


def _queues(store: TokenStore, documents: np.ndarray) -> dict[int, deque[int]]:
    """Documents by kind: the first of every file, in the order given, then the second of every file, and so on."""
    before: Counter[tuple[int, str]] = Counter()
    ranked: dict[int, list[tuple[int, int]]] = {}
    for document in documents.tolist():
        kind, file = int(store.documents["kind"][document]), _file_of(store.names[document])
        ranked.setdefault(kind, []).append((before[kind, file], document))
        before[kind, file] += 1
    return {kind: deque(d for _, d in sorted(found, key=lambda entry: entry[0])) for kind, found in ranked.items()}


class HeldOutBlocks(Dataset[dict[str, Tensor]]):
    """Held-out documents in one fixed order, as blocks that overlap by one token, so that every token is predicted exactly once.

    ``labels`` are the ids (the model shifts them), ``IGNORED`` at begin tokens, which no text predicts, and where the last block is filled
    up. ``kinds(index)`` tells whose loss is whose.

    Args:
        store: where the ids are.
        seq_len: tokens per block.
        limit: about how many blocks: whole documents are taken up to the first that does not fit (one at least). All documents if None.
        part: ``(n, of)``: every ``of``-th document from the ``n``-th on, so that settings are chosen by other text than what reports.
        by_file: count files in place of documents in ``part``, so that a program and the documentation in it are in one part; pass over
            documents of more than an eighth of the limit, so that no single text decides, and over what does not fit; and take kinds in
            the proportions in which they are held out, of every file one document before a second.

    Raises:
        DataError: nothing is held out.
        ConfigError: a number is impossible.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        limit: int | None = None,
        part: tuple[int, int] = (0, 1),
        by_file: bool = False,
    ) -> None:
        if not 0 <= part[0] < part[1]:
            raise ConfigError(f"HeldOutBlocks.part: got {part}, expected (n, of) with 0 <= n < of.")
        if seq_len < 2 or (limit is not None and limit < 1):
            raise ConfigError(f"HeldOutBlocks: got seq_len {seq_len} and limit {limit}, expected at least 2 and at least 1.")
        documents = held_out_order(store)
        if not len(documents):
            raise DataError(
                f"{store.folder} holds nothing out; whole files are held out, so split a large one into many (a hundred, say), raise "
                "held_out_percent, or add text files of weight 1."
            )
        self.store, self.seq_len = store, seq_len
        documents = _part_by_file(store, documents, part) if by_file else documents[part[0] :: part[1]]
        if not len(documents):
            what = "files" if by_file else "documents"
            raise DataError(
                f"{store.folder} holds too few {what} out for {part[1]} parts; raise held_out_percent, or split large files into many."
            )
        self.passed_over = np.zeros(0, dtype=np.int64)
        """Numbers of the documents left out by ``by_file`` for their size alone."""
        if limit is not None and by_file:
            fitting = _without_giants(store, documents, limit * seq_len // _LARGEST_SHARE)
            self.passed_over = np.setdiff1d(documents, fitting)
            documents = _filled(store, fitting, limit * (seq_len - 1) + 1)
        elif limit is not None:
            ends = np.cumsum(store.documents["length"][documents])
            documents = documents[: max(1, int(np.searchsorted(ends, limit * (seq_len - 1) + 1, side="right")))]
        self.documents = documents
        """Numbers of the documents measured, in their order."""
        self._sequence = _Sequence(store, documents)
        self._tokens = int(self._sequence.ends[-1])

    @property
    def composition(self) -> dict[str, Any]:
        """What is measured: number of documents and files, and the file with the largest share of the bytes, with that share."""
        sizes: Counter[str] = Counter()
        for document in self.documents:
            sizes[_file_of(self.store.names[document])] += int(self.store.documents["bytes"][document])
        name, largest = sizes.most_common(1)[0]
        share = round(largest / sum(sizes.values()), 4)
        return {"documents": len(self.documents), "files": len(sizes), "largest": name, "largest_share": share}

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """UTF-8 bytes of the documents measured: summed losses of a kind over these and ln 2 are its bits per byte."""
        records = self.store.documents[self.documents]
        sums = {kind: int(records["bytes"][records["kind"] == number].sum()) for number, kind in enumerate(KINDS)}
        return {kind: size for kind, size in sums.items() if size}

    def __len__(self) -> int:
        return max(1, -(-(self._tokens - 1) // (self.seq_len - 1)))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 ``[seq_len]`` each."""
        ids, _ = self._read(index)
        block = torch.full((self.seq_len,), self.store.begin_id)
        block[: len(ids)] = torch.from_numpy(ids)
        labels = block.masked_fill(self.kinds(index) < 0, IGNORED)
        return {"input_ids": block, "labels": labels}

    def kinds(self, index: int) -> Tensor:
        """Number in ``KINDS`` of each position's document, int64 ``[seq_len]``; -1 where the label is ignored."""
        ids, numbers = self._read(index)
        kinds = np.full(self.seq_len, -1)
        kinds[: len(ids)] = self.store.documents["kind"][numbers]
        begins = self._sequence.ends - self.store.documents["length"][self.documents] - index * (self.seq_len - 1)
        kinds[begins[(begins >= 0) & (begins < self.seq_len)]] = -1
        return torch.from_numpy(kinds)

    def sum_by_kind(self, losses: Sequence[Tensor], indices: Sequence[int]) -> dict[str, tuple[float, int]]:
        """Sum of losses and number of tokens by kind.

        Args:
            losses: for each block, the loss of predicting positions 1, 2, ..., ``[seq_len - 1]``.
            indices: which blocks those are.
        """
        sums = np.zeros(len(KINDS))
        tokens = np.zeros(len(KINDS), dtype=np.int64)
        for loss, index in zip(losses, indices, strict=True):
            kinds = self.kinds(index)[1:].numpy()
            predicted = kinds >= 0
            sums += np.bincount(kinds[predicted], loss.double().cpu().numpy()[predicted], minlength=len(KINDS))
            tokens += np.bincount(kinds[predicted], minlength=len(KINDS))
        return {kind: (float(sums[n]), int(tokens[n])) for n, kind in enumerate(KINDS) if tokens[n]}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index}: there are {len(self)}")
        start = index * (self.seq_len - 1)
        return self._sequence.read(start, min(self._tokens, start + self.seq_len))
