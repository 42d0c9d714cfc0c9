"""What only a GPU can show: kernels, streams, page-locked memory and graphs give what the CPU gives."""

import gc
import warnings

import pytest
import torch

from engram import EngramAdamW, TableConfig, get_engram_model
from engram.hashing import mapping_without_tokenizer, ngram
from engram.models import StaticDecoder
from engram.ops import dispatch
from engram.tables import FORMATS, HostTable, HybridTable, QuantisedTable, RowPrefetcher, build_table
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of whatever versions that machine has
]

ROWS, DIM = 3000, 64
IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def random_rows(rows=ROWS, dim=DIM):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["triton", "torch"])
def kernels(request, monkeypatch):
    """With the Triton kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "triton_kernel", lambda *_: None)
        monkeypatch.setattr(ngram, "triton_kernel", lambda *_: None)
    elif dispatch.triton_gather() is None:
        pytest.skip("Triton is not installed")
    return request.param


def places(path):
    yield from ((TableConfig(tier=tier, dtype=form), f"{tier} {form}") for tier in ("device", "host") for form in FORMATS)
    yield from ((TableConfig(tier="mmap", dtype=form, path=str(path / form)), f"mmap {form}") for form in FORMATS)
    yield from ((TableConfig(tier="hybrid", dtype=form, hot_rows=ROWS), f"hybrid {form}") for form in FORMATS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_look_ups_from_every_place(kernels, dtype, tmp_path):
    numbers = torch.randint(ROWS, (4, 33, 3), generator=torch.Generator().manual_seed(1))
    for config, name in places(tmp_path):
        table = build_table(ROWS, DIM, config)
        table.load_rows(0, random_rows())
        expected = table.read(numbers, dtype)
        table.to("cuda")
        if isinstance(table, HybridTable):
            table.promote(torch.arange(0, ROWS, 3))
        with torch.no_grad():
            assert torch.equal(table.lookup(numbers.cuda(), dtype).cpu(), expected), name
            for static in (False, True):
                through = RowPrefetcher(True, static)
                handle = table.prefetch(numbers.cuda(), dtype, through)
                assert torch.equal(table.lookup(handle).cpu(), expected), name
                through.close()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dim", [2, 62, 64, 1300])  # every width is compiled anew
def test_odd_sizes_and_numbers_out_of_range(name, dim):
    kernel = dispatch.triton_gather()
    if kernel is None:
        pytest.skip("Triton is not installed")
    stored, scales = FORMATS[name].encode(random_rows(70, dim))
    for count in (0, 1, 63, 1000):
        numbers = torch.randint(70, (count,))
        numbers[: count // 20] = 70
        numbers[: count // 40] = -1
        out = torch.full((count, dim), float("nan"), device="cuda")
        kernel(stored.cuda(), None if scales is None else scales.cuda(), numbers.cuda(), out)
        expected = FORMATS[name].decode(stored, scales)[numbers.clamp(0, 69)]
        expected[(numbers < 0) | (numbers >= 70)] = 0
        assert torch.equal(out.cpu(), expected)


def test_host_memory_is_read_by_the_device_itself_and_unlocked_again():
    table = HostTable(ROWS, DIM)
    table.load_rows(0, random_rows())
    device = torch.device("cuda", torch.cuda.current_device())
    assert table.is_read_by(device)
    assert table.weight.is_pinned()
    before = torch.cuda.memory_allocated()
    view = table._lock.view(table.weight, device)
    assert view.data_ptr() == table.weight.data_ptr()
    assert torch.cuda.memory_allocated() == before
    table.update_rows(torch.tensor([5]), lambda rows: rows * 0 + 7)
    assert bool((table.lookup(torch.tensor([5], device="cuda")) == 7).all())
    weight = table.weight
    del table, view
    gc.collect()
    assert not weight.is_pinned()
    quantised = QuantisedTable(ROWS, DIM, "float8", host=True)
    assert quantised.is_read_by(device)


def test_memory_that_cannot_be_locked_goes_through_the_cpu(caplog):
    table = HostTable(ROWS, DIM)
    table.load_rows(0, random_rows())
    status = torch.cuda.cudart().cudaHostRegister(table.weight.data_ptr() + 4096, 4096, 0)  # a part of it is taken already
    assert int(status) == 0
    numbers = torch.randint(ROWS, (50,), device="cuda")
    with caplog.at_level("WARNING", logger="engram"):
        rows = table.lookup(numbers)
    torch.ones(3, device="cuda").add_(1)  # no error is left behind
    torch.cuda.cudart().cudaHostUnregister(table.weight.data_ptr() + 4096)
    if table.is_read_by(numbers.device):
        pytest.skip("this system locks memory twice")
    assert "could not be page-locked" in caplog.text
    assert torch.equal(rows.detach().cpu(), random_rows()[numbers.cpu()])


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("tier", ["device", "host", "mmap"])
def test_training_steps_are_those_of_the_cpu(kernels, tier, mode, tmp_path):
    outcomes = []
    for device in ("cpu", "cuda"):
        config = TableConfig(tier=tier, path=str(tmp_path / device) if tier == "mmap" else None)
        memory = get_engram_model(tiny_model().to(device), tiny_config(table_init="normal"), tiny_tokenizer(), config)
        memory.prefetch_rows = mode
        for engram in memory.engrams.values():
            table = engram.table
            table.load_rows(0, random_rows(table.rows, table.dim))
        with torch.no_grad():
            for name, parameter in memory.engrams.named_parameters():
                if "embedding" not in name:
                    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.copy_(values * 0.3)
        optimizer = EngramAdamW([p for p in memory.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = memory(input_ids=IDS.to(device), labels=IDS.to(device), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        outcomes.append(torch.tensor(losses))
    assert_close(outcomes[1], outcomes[0], 1e-4)


@pytest.mark.parametrize("mode", [None, True])
def test_a_whole_model_on_the_gpu_is_that_on_the_cpu(kernels, mode):
    memory = tiny_memory()
    with torch.no_grad():
        expected = memory(input_ids=IDS, use_cache=False).logits
        tokens = memory.generate(IDS, max_new_tokens=12, do_sample=False)
        memory.to("cuda")
        memory.prefetch_rows = mode
        assert_close(memory(input_ids=IDS.cuda(), use_cache=False).logits.cpu(), expected, 1e-4)
        assert torch.equal(memory.generate(IDS.cuda(), max_new_tokens=12, do_sample=False).cpu(), tokens)


def test_hashes_and_tags_are_those_of_the_cpu(kernels):
    for orders, sizes in ((3, 300), (32, 1 << 31)):
        config = tiny_config(
            engram_vocab_size=sizes, max_ngram_size=orders, hash_spec="exact_v1", n_embed_per_ngram=12, n_head_per_ngram=3
        )
        mapping = mapping_without_tokenizer(config, 128_000)
        ids = torch.randint(128_000, (5, 70), generator=torch.Generator().manual_seed(orders))
        mask = (torch.rand(5, 40, generator=torch.Generator().manual_seed(orders)) > 0.2).long()
        for given in ((ids,), (ids[:, 30:], ids[:, :30], mask), (ids[:, 69:], ids[:, 68:69])):
            expected, on_device = mapping.hash_with_tags(*given), [x.cuda() for x in given]
            indices, tagged = mapping.hash(*on_device), mapping.hash_with_tags(*on_device)
            for layer, (rows, tags) in expected.items():
                assert torch.equal(indices[layer].cpu(), rows)
                assert torch.equal(tagged[layer][0].cpu(), rows)
                assert torch.equal(tagged[layer][1].cpu(), tags)


def test_hash_look_up_and_layer_never_wait():
    memory = tiny_memory()
    memory.to("cuda")
    ids, hidden = IDS.cuda(), torch.randn(2, 12, 32, device="cuda")
    mask = torch.ones_like(ids)

    def once():
        with torch.no_grad():
            for layer, hash_ids in memory.mapping.hash(ids, None, mask).items():
                engram, through = memory.engrams[str(layer)], RowPrefetcher(True)
                engram(hidden, hash_ids=hash_ids, attention_mask=mask, fetched=engram.prefetch(hash_ids, through))
                engram(hidden, hash_ids=hash_ids, attention_mask=mask)

    once()  # constants are uploaded and kernels compiled
    torch.cuda.synchronize()
    try:
        _let_waits_be("error")
        once()
    finally:
        _let_waits_be("default")


def _let_waits_be(mode):
    with warnings.catch_warnings():  # torch says that the mode is a prototype, once it is on
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def test_verified_rows_on_the_gpu():
    memory = get_engram_model(tiny_model(), tiny_config(verify_rows=True, longest_only=True, use_bias=False), tiny_tokenizer())
    with torch.no_grad():
        for parameter in memory.engrams.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.5)
    for layer, engram in memory.engrams.items():
        hash_ids, tags = memory.mapping.hash_with_tags(IDS)[int(layer)]
        rows = engram.multi_head_embedding.row_ids(hash_ids)[0, ::3].flatten()
        unique, where = torch.unique(rows, return_inverse=True)
        owners = torch.zeros(len(unique), dtype=torch.int32).scatter_(0, where, tags[0, ::3].flatten())
        engram.table.insert(unique, owners, random_rows(len(unique), 4))
    memory.eval()
    with torch.no_grad():
        expected = memory(input_ids=IDS, use_cache=False).logits
        memory.to("cuda")
        assert_close(memory(input_ids=IDS.cuda(), use_cache=False).logits.cpu(), expected, 1e-4)
        _check_graph(memory, IDS.cuda())


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("mode", [False, True])
def test_decoding_as_a_graph(kernels, tier, mode):
    memory = get_engram_model(
        tiny_model().cuda(), tiny_config(table_init="normal"), tiny_tokenizer(), TableConfig(tier=tier)
    ).eval()
    memory.prefetch_rows = mode
    _check_graph(memory, IDS.cuda())


@pytest.mark.parametrize("changes", [{"fuse": "add"}, {"fuse": "concat"}, {"layer_orders": {0: [3], 2: [2]}}])
def test_variants_as_a_graph(kernels, changes):
    memory = tiny_memory(tiny_model(), **changes)
    with torch.no_grad():
        expected = memory(input_ids=IDS, use_cache=False).logits
        memory.to("cuda")
        assert_close(memory(input_ids=IDS.cuda(), use_cache=False).logits.cpu(), expected, 1e-4)
    _check_graph(memory, IDS.cuda())


@torch.no_grad()
def _check_graph(memory, ids):
    """Steps of one captured graph against whole passes without a cache."""
    decoder = StaticDecoder(memory, max_length=64)
    decoder.prefill(ids)
    addresses = set()
    for step in range(8):
        tokens = torch.randint(2, 300, (len(ids),), generator=torch.Generator().manual_seed(step)).cuda()
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        logits = decoder.step(tokens)
        addresses.add(logits.data_ptr())
        assert_close(logits, memory(input_ids=ids, use_cache=False).logits[:, -1], 1e-4)
    assert decoder._graph is not None
    assert len(addresses) == 1
