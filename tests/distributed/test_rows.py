"""Row gradients, requests and tables of three processes, held against one table in this process."""

import copy
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engram import ConfigError, EngramAdamW, TableConfig, TableError, replicate_tables
from engram.distributed import (
    agreed_number,
    anywhere,
    average_rows,
    everywhere_equal,
    from_first,
    leave_at_exit,
    process_count,
    process_rank,
    shard_group,
    sum_everywhere,
    wait_for_all,
)
from engram.optim import clip_grad_norm_
from engram.tables import (
    DeviceTable,
    HostTable,
    HybridTable,
    ShardedTable,
    available_memory,
    build,
    build_table,
    check_room,
    sharded,
)
from engram.testing import EXACT_ENOUGH, HALF_ENOUGH, assert_close, play_scenarios, run_processes

COUNT = 3
ROWS, DIM = 29, 4  # not a multiple of the processes


def gradient_of(rank, dtype=torch.float32, count=None, seed=0):
    """What a process brings: some rows, some of them twice; none with ``count=0``."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    count = 5 + 3 * rank if count is None else count
    rows = torch.randint(ROWS, (1, count), generator=generator)
    values = torch.randn((count, DIM), generator=generator).to(dtype)
    return torch.sparse_coo_tensor(rows, values, (ROWS, DIM), check_invariants=False)


def whole_rows(seed=0):
    return torch.randn((ROWS, DIM), generator=torch.Generator().manual_seed(7 + seed))


def ids_of(rank, seed, shape=None):
    """What a process asks for; nothing at all now and then."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    size = int(torch.randint(40, (), generator=generator)) if (seed + rank) % 5 else 0
    return torch.randint(ROWS, shape or (size,), generator=generator)


def weights_of(rank, seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(31 * seed + rank))


def divided(tier="device", dtype="float32", init="zero"):
    return build_table(ROWS, DIM, TableConfig(tier=tier, dtype=dtype, sharded=True), init)


# What the processes do ----------------------------------------------------------------------------------------------------------------


def averages(folder):
    rank = process_rank()
    return {
        "float32": average_rows(gradient_of(rank)).to_dense(),
        "bfloat16": average_rows(gradient_of(rank, torch.bfloat16)).float().to_dense(),
        "one has none": average_rows(gradient_of(rank, count=0 if rank == 1 else 4)).to_dense(),
        "nobody has any": average_rows(gradient_of(rank, count=0)).to_dense(),
        "dense": average_rows(gradient_of(rank).to_dense()),
    }


def small_talk(folder):
    rank = process_rank()
    shared = nn.Parameter(torch.zeros(1))
    own = agreed_number(10 + rank, shared)
    replicate_tables(nn.ModuleDict({"t": DeviceTable(4, 2)}))
    table = DeviceTable(4, 2)
    replicate_tables(nn.ModuleDict({"t": table}))
    wait_for_all()
    return {
        "count": process_count(),
        "anywhere": [anywhere(rank == 2), anywhere(False)],
        "equal": [everywhere_equal("a"), everywhere_equal(rank == 1)],
        "first": from_first(torch.tensor([rank + 5.0])),
        "sum": sum_everywhere(torch.tensor(rank + 1.0)),
        "numbers": [own, agreed_number(10 + rank, table.weight)],
    }


def look_ups(folder):
    """Thirty look-ups of any size, with gradients, in every place and type."""
    rank, seen = process_rank(), []
    for seed in range(30):
        tier, dtype = ("device", "host")[seed % 2], ("float32", "bfloat16", "float16")[seed % 3]
        table = divided(tier, dtype)
        table.load_rows(0, whole_rows(seed))
        ids = ids_of(rank, seed)
        rows = table.lookup(ids, torch.float32)
        (rows * weights_of(rank, seed, rows.shape)).sum().backward()
        seen.append((rows.detach(), table.weight.grad.float().to_dense(), table.nbytes))
    return seen


def other_calls(folder):
    table = divided()
    table.load_rows(0, whole_rows())
    table.load_rows(5, torch.ones(7, DIM))
    table.load_rows(ROWS, torch.ones(0, DIM))
    table.update_rows(torch.tensor([3, 28, 6]), lambda rows: rows + 10)
    shape = ids_of(0, 1, (2, 3, 5))
    with torch.no_grad():
        rows = table.lookup(shape)
    table.to(torch.float64).to(torch.float32)
    errors = []
    for wrong in (lambda: table.lookup(torch.tensor([ROWS])), lambda: table.load_rows(25, torch.ones(7, DIM))):
        with pytest.raises(TableError) as error:
            wrong()
        errors.append(str(error.value))
    torch.manual_seed(5)
    drawn = divided(init="normal")
    again = copy.deepcopy(table)
    with pytest.raises(TableError, match="assign"):
        again.load_state_dict(again.state_dict(), assign=True)
    again.load_state_dict(again.state_dict())
    return {
        "blocks": [(start, block.clone()) for start, block in table.iter_row_blocks(4)],
        "read": rows,
        "asked": shape,
        "alone": without_the_others(),
        "drawn": torch.cat([block for _, block in drawn.iter_row_blocks()]),
        "errors": errors,
        "copied": [block.clone() for _, block in again.iter_row_blocks(ROWS)],
        "left alone": left_alone(table),
        "part of a whole": [shard_group(each.weight) is not None for each in (table, again)],
        "copies": list(replicate_tables(nn.ModuleDict({"t": again})).tables),
        "location": table.location,
    }


def without_the_others():
    """What a look-up says whose exchange fails."""
    with pytest.MonkeyPatch.context() as patch:

        def fails(*_, **__):
            raise RuntimeError("Connection closed by peer")

        patch.setattr(dist, "all_to_all_single", fails)
        with pytest.raises(TableError) as error:
            divided().lookup(torch.tensor([1]))
    return str(error.value)


def left_alone(table):
    """What a table says that has outlived the other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "process_count", lambda group=None: 1)
        with pytest.raises(TableError) as error:
            table.lookup(torch.tensor([1]))
    return str(error.value)


def steps(folder):
    """Five steps of the optimiser with clipping, on a divided table and on copies; torch's random numbers differ by process."""
    torch.manual_seed(process_rank())
    results = {}
    for name, table in (("divided", divided()), ("copies", DeviceTable(ROWS, DIM))):
        table.load_rows(0, whole_rows())
        replicate_tables(nn.ModuleDict({"t": table}))
        results[name] = train(table, lambda seed: ids_of(process_rank(), seed, (9,)), process_rank())
    for dtype in (torch.bfloat16, torch.float16):
        table = DeviceTable(ROWS, DIM, dtype=dtype)
        table.load_rows(0, whole_rows())
        replicas = replicate_tables(nn.ModuleDict({"t": table}))
        train(table, lambda seed: ids_of(process_rank(), seed, (9,)), process_rank(), stochastic_rounding=True)
        results[str(dtype)] = [replicas.are_equal(), table.weight.detach().clone()]
    return results


def train(table, ids, rank, **options):
    optimizer, norms = EngramAdamW(table.parameters(), lr=0.05, **options), []
    for seed in range(1, 6):
        rows = table.lookup(ids(seed), torch.float32)
        (rows * weights_of(rank, seed, rows.shape)).sum().backward()
        norms.append(float(clip_grad_norm_(table.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, torch.cat([block.clone() for _, block in table.iter_row_blocks()])


def own_steps(folder):
    """A table that nobody keeps equal is stepped."""
    table, said = DeviceTable(ROWS, DIM), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("engram").addHandler(handler)
    for _ in range(2):
        optimizer = EngramAdamW(table.parameters(), lr=0.05)
        for _ in range(2):
            table.lookup(torch.tensor([1])).sum().backward()
            optimizer.step()
        replicate_tables(nn.ModuleDict({"t": table}))
    logging.getLogger("engram").removeHandler(handler)
    return said


def spoilt_pass(folder):
    """A backward pass that fails on its way; the next one exchanges what is its own. Then one in which a process reads nothing of a table."""
    rank = process_rank()
    tables = nn.ModuleDict({name: DeviceTable(ROWS, DIM) for name in "ab"})
    replicate_tables(tables)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("fails")

    ids = ids_of(rank, 3, (6,))
    rows = tables["a"].lookup(ids)
    with pytest.raises(RuntimeError, match="fails"):
        (rows.sum() + Fails.apply(tables["b"].lookup(ids)).sum()).backward()
    for table in tables.values():
        table.weight.grad = None
    for _ in range(2):  # accumulated
        parts = [tables["a"].lookup(ids).sum()] + [tables["b"].lookup(ids).sum()] * (rank != 1)
        sum(parts).backward()
    return [table.weight.grad.to_dense() for table in tables.values()]


def copies(folder):
    rank = process_rank()
    table, frozen = HostTable(ROWS, DIM), DeviceTable(ROWS, DIM)
    hybrid = HybridTable(HostTable(ROWS, DIM), 4)
    frozen.requires_grad_(False)
    for each in (table, hybrid, frozen):
        each.load_rows(0, whole_rows(seed=rank))
    model = nn.ModuleDict({"trained": table, "hybrid": hybrid, "frozen": frozen, "other": nn.Linear(DIM, 1)})
    replicas = replicate_tables(model)
    ddp = DistributedDataParallel(Reads(model))
    ddp(ids_of(rank, 3, (8,))).backward()
    gradient = table.weight.grad.to_dense()
    replicas.remove()
    alone = agreed_number(rank, table.weight)  # nobody is asked any more
    table.weight.grad = None
    Reads(model)(ids_of(rank, 3, (8,))).backward()
    with pytest.raises(TableError, match="expected the same in every process"):
        replicate_tables(nn.ModuleDict({"t": DeviceTable(ROWS + rank, DIM)}))
    return {
        "rows": [each.weight.detach().clone() for each in (table, hybrid, frozen)],
        "names": list(replicas.tables),
        "averaged": gradient,
        "own": table.weight.grad.to_dense(),
        "linear": model["other"].weight.grad.clone(),
        "equal": replicas.are_equal(),
        "alone": alone,
    }


class Reads(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        replicate_tables(self).remove()  # has DDP pass the tables by, under the names they have here

    def forward(self, ids):
        rows = self.parts["trained"].lookup(ids) + self.parts["hybrid"].lookup(ids)
        return self.parts["other"](rows).sum()


SCENARIOS = {f.__name__: f for f in (averages, small_talk, look_ups, other_calls, steps, copies, own_steps, spoilt_pass)}

# What comes of it ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run_processes("tests.distributed.test_rows", tmp_path_factory.mktemp("processes"), COUNT)


def of_all(seen, *path):
    for part in path:
        seen = [result[part] for result in seen]
    return seen


def all_equal(tensors):
    return all(torch.equal(tensors[0], other) for other in tensors)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "one has none", "nobody has any", "dense"])
def test_the_mean_of_row_gradients_is_that_of_dense_ones_and_the_same_in_all(seen, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    counts = {"one has none": [4, 0, 4], "nobody has any": [0, 0, 0]}.get(kind, [None] * COUNT)
    own = [gradient_of(rank, dtype, count).float().to_dense() for rank, count in enumerate(counts)]
    means = of_all(seen, "averages", kind)
    assert all_equal(means)
    assert_close(means[0], torch.stack(own).mean(dim=0), HALF_ENOUGH if dtype == torch.bfloat16 else EXACT_ENOUGH)


def test_processes_agree_on_flags_numbers_and_values(seen):
    for result in of_all(seen, "small_talk"):
        assert result["count"] == COUNT
        assert result["anywhere"] == [True, False]
        assert result["equal"] == [True, False]
        assert result["first"].tolist() == [5.0]
        assert result["sum"] == 6.0
    assert of_all(seen, "small_talk", "numbers") == [
        [10, 10],
        [11, 10],
        [12, 10],
    ]  # a parameter that is not shared keeps its own


@pytest.mark.parametrize("seed", range(30))
def test_a_divided_table_gives_the_rows_and_the_gradients_of_a_whole_one(seen, seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    whole = whole_rows(seed).to(dtype).float().requires_grad_()
    for rank, (rows, _, _) in enumerate(of_all(seen, "look_ups", seed)):
        expected = whole[ids_of(rank, seed)]
        assert torch.equal(rows, expected)
        (expected * weights_of(rank, seed, expected.shape)).sum().div(COUNT).backward()
    parts = torch.stack([gradient for _, gradient, _ in of_all(seen, "look_ups", seed)], dim=1).flatten(0, 1)[:ROWS]
    assert_close(parts, whole.grad, EXACT_ENOUGH if dtype == torch.float32 else HALF_ENOUGH)
    assert all(size == 10 * DIM * dtype.itemsize for _, _, size in of_all(seen, "look_ups", seed))


def test_a_divided_table_is_filled_changed_and_read_as_a_whole_one(seen):
    whole = whole_rows()
    whole[5:12] = 1.0
    whole[[3, 28, 6]] += 10
    for rank, result in enumerate(of_all(seen, "other_calls")):
        assert [start for start, _ in result["blocks"]] == list(range(0, ROWS, 4))
        assert torch.equal(torch.cat([block for _, block in result["blocks"]]), whole)
        assert torch.equal(result["read"], whole[result["asked"]])
        assert torch.equal(result["copied"][0], whole)
        assert result["part of a whole"] == [True, True]
        assert "got 1 process(es), expected the 3 that hold its parts" in result["left alone"]
        assert result["copies"] == []  # parts are no copies of one another
        assert "expected 0..28" in result["errors"][0]
        assert "up to row 28" in result["errors"][1]
        assert result["location"] == f"cpu, part {rank + 1} of 3"
    drawn = of_all(seen, "other_calls", "drawn")
    assert all_equal(drawn)
    torch.manual_seed(5)
    assert torch.equal(drawn[0], build_table(ROWS, DIM, TableConfig(), "normal").weight)  # as one process would have drawn them
    for said in of_all(seen, "other_calls", "alone"):
        assert "all must look up, generate, evaluate and save together" in said


@pytest.mark.parametrize("kind", ["divided", "copies"])
def test_steps_and_clipping_are_those_of_one_process_with_all_the_gradients(seen, kind):
    table, norms = DeviceTable(ROWS, DIM), []
    table.load_rows(0, whole_rows())
    optimizer = EngramAdamW(table.parameters(), lr=0.05)
    for seed in range(1, 6):
        for rank in range(COUNT):
            rows = table.lookup(ids_of(rank, seed, (9,)))
            (rows * weights_of(rank, seed, rows.shape)).sum().div(COUNT).backward()
        norms.append(float(clip_grad_norm_(table.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    for found, rows in of_all(seen, "steps", kind):
        assert found == pytest.approx(norms, rel=1e-5)
        assert_close(rows, table.weight.detach())
    assert all_equal([rows for _, rows in of_all(seen, "steps", kind)])


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_copies_throw_the_same_dice(seen, dtype):
    equal, rows = zip(*of_all(seen, "steps", dtype))
    assert equal == (True,) * COUNT
    assert all_equal(rows)


def test_copies_start_as_the_first_process_has_them_and_ddp_passes_them_by(seen):
    for rank, result in enumerate(of_all(seen, "copies")):
        trained, hybrid, frozen = result["rows"]
        assert torch.equal(trained, whole_rows())
        assert torch.equal(hybrid, whole_rows())
        assert torch.equal(frozen, whole_rows(seed=rank))  # what nobody trains is left alone
        assert result["names"] == ["trained", "hybrid"]
        assert result["equal"]
        assert result["alone"] == rank
    averaged, own = of_all(seen, "copies", "averaged"), of_all(seen, "copies", "own")
    assert all_equal(averaged)
    assert not all_equal(own)
    assert_close(averaged[0], torch.stack(own).mean(dim=0))


def test_processes_that_each_train_a_table_of_their_own_are_told_once(seen):
    for said in of_all(seen, "own_steps"):
        assert len(said) == 1
        assert "3 processes, and each trains a table of its own" in said[0]


def test_a_pass_that_failed_and_a_table_that_one_process_did_not_read(seen):
    counts = [torch.bincount(ids_of(rank, 3, (6,)), minlength=ROWS).float() for rank in range(COUNT)]
    for number, readers in enumerate((range(COUNT), (0, 2))):
        expected = 2 * sum(counts[rank] for rank in readers) / COUNT
        for gradient in of_all(seen, "spoilt_pass", number):
            assert_close(gradient, expected[:, None].expand(ROWS, DIM))


# Without processes --------------------------------------------------------------------------------------------------------------------


def test_alone_nothing_is_asked_and_tables_are_whole():
    gradient = gradient_of(0)
    assert average_rows(gradient) is gradient
    assert process_count() == 1
    assert process_rank() == 0
    assert anywhere(True)
    assert not anywhere(False)
    assert everywhere_equal(object())
    number = torch.ones(1)
    assert from_first(number) is number
    assert sum_everywhere(number) is number
    wait_for_all()
    leave_at_exit()
    leave_at_exit.cache_clear()
    assert isinstance(divided(), DeviceTable)
    assert isinstance(divided("host"), HostTable)
    model = nn.ModuleDict({"t": DeviceTable(4, 2)})
    replicas = replicate_tables(model)
    assert replicas.are_equal()
    assert list(replicas.tables) == ["t"]
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_tables_that_will_be_divided_wait_for_their_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="one of 4 processes that are not set up yet"):
        divided()


@pytest.mark.parametrize(
    "fields",
    [
        {"sharded": 1},
        {"sharded": True, "tier": "mmap", "path": "rows"},
        {"sharded": True, "tier": "hybrid", "hot_rows": 4},
        {"sharded": True, "dtype": "int8"},
    ],
)
def test_what_cannot_be_divided_is_refused(fields):
    with pytest.raises(ConfigError, match=r"TableConfig\.sharded: got"):
        TableConfig(**fields)


def test_verified_rows_are_not_divided():
    with pytest.raises(ConfigError, match="expected 'device' and whole"):
        build_table(ROWS, DIM, TableConfig(sharded=True), verified=True)


@pytest.mark.parametrize(("sharded", "fits"), [(False, False), (True, True)])
def test_copies_of_all_processes_of_a_machine_must_fit_together(monkeypatch, sharded, fits):
    monkeypatch.setattr(build, "process_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    rows = available_memory() // (4 * 256) // 4  # a quarter of what there is: four copies would fit
    config = TableConfig(tier="host", sharded=sharded)
    with nullcontext() if fits else pytest.raises(TableError, match="tier='host' in 8 processes"):
        check_room([rows], 256, config)


def test_a_part_of_another_size_is_refused():
    with pytest.raises(TableError, match="got a part of 4 rows, expected 8"):
        ShardedTable(DeviceTable(4, 2), 8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    leave_at_exit()
    play_scenarios(SCENARIOS, Path(sys.argv[1]))
