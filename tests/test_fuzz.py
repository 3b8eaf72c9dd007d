"""Random cases, kernel against reference: shapes, dtypes, memory layouts, ties and special values.

`--fuzz-cases N` runs N of them, `--fuzz-seed S` begins at another seed. A case depends on its seed alone, which is in
the name of its test: `pytest "tests/test_fuzz.py::test_case[17]" --fuzz-seed 17 --fuzz-cases 1` runs one again.
"""

import random

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels import checks
from reroute_kernels.memory import Memory
from tests.conftest import LAYOUTS, WRITABLE_LAYOUTS
from tests.test_greedy import Diverse, Dpp, check, quarters, signs
from tests.test_rank import assert_scores_equal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = [torch.float16, torch.bfloat16]
COPYABLE = [torch.float32, torch.float64, *HALVES, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]
SPECIAL = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, 3e38]


class Case:
    """Random arguments, of a seed."""

    def __init__(self, seed, device):
        self.random = random.Random(seed)
        self.device = device
        torch.manual_seed(seed)

    def size(self, largest, smallest=0):
        """Small sizes as often as large ones, and powers of two with their neighbours."""
        size = round(2 ** self.random.uniform(0, (largest + 1).bit_length()))
        if self.random.random() < 0.3:
            size = 2 ** round(self.random.uniform(0, largest.bit_length() - 1)) + self.random.choice([-1, 0, 1])
        return min(max(size, smallest), largest)

    def chance(self, probability):
        return self.random.random() < probability

    def laid_out(self, tensor, layouts=LAYOUTS):
        if tensor.numel() == 0 or self.chance(0.6):
            return tensor
        return self.random.choice(list(layouts.values()))(tensor)

    def rows(self, *shape):
        """A tensor of any dtype that can be copied, over its whole range."""
        dtype = self.random.choice(COPYABLE)
        if dtype == torch.bool:
            return (torch.rand(shape) < 0.5).to(self.device)
        if not dtype.is_floating_point:
            limits = torch.iinfo(dtype)
            return torch.randint(limits.min, limits.max, shape, dtype=dtype).to(self.device)
        values = torch.randn(shape).to(dtype)
        if values.numel() and self.chance(0.3):
            values.view(-1)[self.random.randrange(values.numel())] = self.random.choice(SPECIAL)
        return values.to(self.device)

    def flags(self, *shape):
        probability = self.random.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        return self.laid_out((torch.rand(shape) < probability).to(self.device))

    def trailing(self):
        return self.random.choice([(), (1,), (self.size(300),), (self.size(9), self.size(40))])

    def ranking(self, batch, length):
        kv_heads = self.random.choice([1, 1, 2, 3, 4])
        heads = kv_heads * self.random.choice([1, 1, 2, 4, 7])
        head_dim = self.random.choice([2, 8, 16, 24, 32, 48, 64, 80])
        queries = self.random.randint(1, 3)
        if length > 1000:
            kv_heads = heads = queries = 1
            head_dim = 4
        elif length < 20 and self.chance(0.3):
            kv_heads = self.random.choice([1, 8, 32])
            heads, head_dim = 64, self.random.choice([96, 128, 192, 256])
        dtype = self.random.choice([torch.float32, *HALVES])

        def normal(*shape, dtype=dtype):
            return torch.randn(shape).to(self.device, dtype)

        arguments = {
            "query": self.laid_out(3 * normal(batch, queries, heads, head_dim)),
            "key": self.laid_out(normal(batch, length, kv_heads, head_dim)),
            "scale": self.random.choice([None, None, 0.0, -0.1, 0.3]),
            "query_reduction": self.random.choice(checks.REDUCTIONS),
            "head_reduction": self.random.choice(checks.REDUCTIONS),
            "rotary_style": self.random.choice(checks.ROTARY_STYLES),
        }
        arguments |= self.options(arguments["query"], arguments["key"], normal)
        if arguments["key"].numel() and arguments["key"].stride()[0] and self.chance(0.15):
            key = arguments["key"] = arguments["key"].clone(memory_format=torch.contiguous_format)
            key.view(-1)[self.random.randrange(key.numel())] = self.random.choice(SPECIAL[:5])
        return arguments

    def options(self, query, key, normal):
        """Tables, masks, places of the queries and keys of a cache, or not."""
        (batch, queries), (length, kv_heads, head_dim) = query.shape[:2], key.shape[1:]
        arguments = {}
        if self.chance(0.7):
            rotary = 2 * self.random.randint(1, head_dim // 2)
            samples = self.random.choice([1, batch]) or 1
            table_dtype = self.random.choice([query.dtype, torch.float32])
            for name in ("cos", "sin"):
                arguments[name] = self.laid_out(normal(samples, length, rotary, dtype=table_dtype))
        if self.chance(0.5):
            arguments["key_mask"] = self.flags(batch, length)
        if self.chance(0.5) or queries > length:
            places = torch.randint(-1, max(length, 1), (batch, queries)).clamp(max=length - 1)
            arguments["query_index"] = self.laid_out(places.to(self.device))
        if self.chance(0.3):
            past = self.size(70)
            arguments["past_key"] = self.laid_out(normal(batch, past, kv_heads, head_dim))
            if self.chance(0.5):
                arguments["past_mask"] = self.flags(batch, past)
        return arguments

    def scores(self, batch, length):
        scores = torch.randn(batch, length)
        kind = self.random.choice(["normal", "ties", "special"])
        if kind == "ties":
            scores = scores.round()
        if kind == "special":
            scores = torch.tensor([*SPECIAL, 1.0])[torch.randint(len(SPECIAL) + 1, scores.shape)]
        return self.laid_out(scores.to(self.device))

    def selection(self, batch, length):
        keep = torch.randint(-1, length + 3, (batch,), dtype=self.random.choice([torch.int32, torch.int64]))
        if keep.numel() and keep.dtype == torch.int64 and self.chance(0.2):
            keep[self.random.randrange(batch)] = self.random.choice([2**32, 2**32 + 1, 2**40, -(2**40)])
        return {
            "pool": self.flags(batch, length),
            "pinned": self.flags(batch, length),
            "keep": keep.to(self.device),
            "length": self.size(min(length + 5, 300)) if self.chance(0.5) else self.size(length + 5),
        }

    def index(self, batch, length):
        """Positions in order, none twice in a row, then places that name no token."""
        width = self.size(length + 3)
        rows = []
        for _ in range(batch):
            count = self.random.randint(0, min(width, length))
            filler = [self.random.choice([-1, -1, -2, length, 2**40]) for _ in range(width - count)]
            rows.append(sorted(self.random.sample(range(length), count)) + filler)
        # Expanded channels would name a position more than once in a row.
        return self.laid_out(torch.tensor(rows, dtype=torch.int64).view(batch, width).to(self.device), WRITABLE_LAYOUTS)


def assert_copies_equal(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0, equal_nan=True)


def check_rank(case):
    arguments = case.ranking(case.random.randint(0, 3), case.size(300) if case.chance(0.95) else 4097)
    assert_scores_equal(rk.triton.rank_tokens(**arguments), rk.ref.rank_tokens(**arguments))


def check_select(case):
    batch, length = case.random.randint(0, 4), case.size(300)
    if case.chance(0.3):
        length = case.random.choice([4096, 4097, 6200, 8193, 65_536, 65_537])
    arguments = {"scores": case.scores(batch, length), **case.selection(batch, length)}
    assert torch.equal(rk.triton.select_tokens(**arguments), rk.ref.select_tokens(**arguments))
    if case.chance(0.3):
        check_memory(case, arguments)


def check_memory(case, arguments):
    batch, length = arguments["scores"].shape
    scores, memory = (
        case.laid_out(torch.rand(batch, length).to(case.device)),
        Memory(case.random.choice([0.0, 0.3, 1.0])),
    )
    if case.chance(0.7):
        count = case.size(300)
        places = torch.randint(-3, count + 3, (batch, length), device=case.device)
        memory = memory._replace(scores=case.laid_out(torch.rand(batch, count, device=case.device)), places=places)
    arguments = {**arguments, "scores": scores}
    index, ranked = rk.triton.select_tokens(**arguments, memory=memory)
    torch.testing.assert_close(ranked, rk.ref.select_tokens(**arguments, memory=memory)[1], atol=1e-9, rtol=1e-6)
    # Two scores that are nearly equal may round to either order: selection follows the kernel's own.
    assert torch.equal(index, rk.ref.select_tokens(**{**arguments, "scores": ranked}))


def check_gather(case):
    batch, length = case.random.randint(0, 3), case.size(70)
    tensors = [case.laid_out(case.rows(batch, length, *case.trailing())) for _ in range(case.random.randint(1, 4))]
    index = case.index(batch, length)
    for actual, expected in zip(
        rk.triton.gather_tokens(index, *tensors), rk.ref.gather_tokens(index, *tensors), strict=True
    ):
        assert actual.is_contiguous()
        assert_copies_equal(actual, expected)


def check_scatter(case):
    batch, length = case.random.randint(0, 3), case.size(70)
    index = case.index(batch, length)
    full = case.rows(batch, length, *case.trailing())
    compact = case.rows(batch, index.shape[1], *full.shape[2:]).to(full.dtype)
    full, compact = case.laid_out(full, WRITABLE_LAYOUTS), case.laid_out(compact)
    expected = rk.ref.scatter_tokens_(full.clone(memory_format=torch.contiguous_format), index, compact)
    assert rk.triton.scatter_tokens_(full, index, compact) is full
    assert_copies_equal(full, expected)


def check_route(case):
    batch, length = case.random.randint(0, 3), case.size(150) if case.chance(0.9) else 4097
    ranking, selection = case.ranking(batch, length), case.selection(batch, length)
    tensors = [case.laid_out(case.rows(batch, length, *case.trailing())) for _ in range(case.random.randint(0, 3))]
    index, compact = rk.triton.route_tokens(**ranking, **selection, tensors=tensors)
    # Two scores that are nearly equal may round to either order: selection follows the kernel's own.
    assert torch.equal(index, rk.ref.select_tokens(rk.triton.rank_tokens(**ranking), **selection))
    for actual, expected in zip(compact, rk.ref.gather_tokens(index, *tensors), strict=True):
        assert_copies_equal(actual, expected)


def check_scatter_norm(case):
    batch, length, width = case.random.randint(0, 3), case.size(70), case.size(300)
    dtype = case.random.choice([torch.float32, torch.float16])  # Triton's interpreter rounds others its own way
    index = case.index(batch, length)
    if case.chance(0.3):
        index = torch.where(index < length, index, -1).sort().values  # filled up on the left
    full, compact, weight = (
        torch.randn(shape).to(case.device, dtype)
        for shape in ((batch, length, width), (batch, index.shape[1], width), (width,))
    )
    if compact.numel() and case.chance(0.3):
        compact.view(-1)[case.random.randrange(compact.numel())] = case.random.choice(SPECIAL)
    if case.chance(0.2):
        index = compact = None
    options = {"weight": weight, "eps": case.random.choice([0.0, 1e-6, 1e-5]), "one_plus": case.chance(0.5)}
    full = case.laid_out(full, LAYOUTS if index is None else WRITABLE_LAYOUTS)
    compact = None if compact is None else case.laid_out(compact)
    written = full.clone(memory_format=torch.contiguous_format)
    expected = rk.ref.scatter_norm_tokens_(written, index, compact, **options)
    normed = rk.triton.scatter_norm_tokens_(full, index, compact, **options)
    assert_copies_equal(full, written)
    assert normed.is_contiguous()
    # Sums in another order may round either way.
    atol, rtol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-7, 2e-3)
    torch.testing.assert_close(normed, expected, atol=atol, rtol=rtol, equal_nan=True)


def check_align(case):
    batch, length, width = case.random.randint(0, 3), case.size(70), case.size(300)
    dtype = case.random.choice([torch.float32, torch.float16])
    index = case.index(batch, length)
    if case.chance(0.3):
        index = torch.where(index < length, index, -1).sort().values  # filled up on the left
    full, compact = (torch.randn(batch, rows, width).to(case.device, dtype) for rows in (length, index.shape[1]))
    pool = torch.rand(batch, length, device=case.device) < case.random.random()
    full, compact = case.laid_out(full, WRITABLE_LAYOUTS), case.laid_out(compact)
    aligned = rk.ref.align_tokens_(full.clone(memory_format=torch.contiguous_format), index, compact, pool)
    rk.triton.align_tokens_(full, index, compact, pool)
    # Sums in another order may round either way.
    atol, rtol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-3, 2e-3)
    torch.testing.assert_close(full, aligned, atol=atol, rtol=rtol)


def check_saliency(case):
    batch, length = case.random.randint(0, 2), case.size(70)
    kv_heads = case.random.choice([1, 1, 2])
    heads, head_dim = kv_heads * case.random.choice([1, 2]), case.random.choice([1, 8, 24, 64, 72])
    dtype = case.random.choice([torch.float32, *HALVES])
    bounds = None
    queries = case.size(70, smallest=1)
    if length and case.chance(0.6):
        queries = length
        bounds = torch.randint(-2, length + 3, (case.size(9, smallest=2),), device=case.device).sort().values
    query, key = (
        case.laid_out(torch.randn(batch, tokens, each, head_dim).to(case.device, dtype))
        for tokens, each in ((queries, heads), (length, kv_heads))
    )
    options = {
        "scale": case.random.choice([None, 0.0, -0.1, 0.3]),
        "query_reduction": case.random.choice(["mean", "sum"]),
    }
    actual, expected = (each.column_saliency(query, key, bounds, **options) for each in (rk.triton, rk.ref))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def check_merge(case):
    samples, length, groups = case.random.randint(0, 3), case.size(70), case.size(40)
    dtype = case.random.choice([torch.float32, torch.float16])  # Triton's interpreter rounds others its own way
    features = case.laid_out(torch.randn(samples, length, case.size(300)).to(case.device, dtype))
    assignment = case.laid_out(torch.randint(-3, groups + 3, (samples, length), device=case.device))
    (means, counts), (expected, expected_counts) = (
        each.merge_tokens(features, assignment, groups) for each in (rk.triton, rk.ref)
    )
    # Sums in another order may round either way.
    atol, rtol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-7, 2e-3)
    torch.testing.assert_close(means, expected, atol=atol, rtol=rtol)
    assert torch.equal(counts, expected_counts)


def check_greedy(case):
    rows, total, keep = case.random.randint(0, 3), case.size(70), case.size(12)
    lengths = torch.randint(-1, total + 2, (rows,), device=case.device) if case.chance(0.5) else None
    dtype = case.random.choice([torch.float32, *HALVES])
    if case.chance(0.3):  # every number is exact, and many are equal
        features = signs(rows, total, case.random.choice([1, 4, 16, 64])).to(case.device, dtype)
        check(rk.triton, Diverse, case.laid_out(features), quarters(rows, total).to(case.device), keep, lengths)
        return
    features = torch.randn(rows, total, case.size(100, smallest=6)).to(case.device, dtype)
    values = torch.rand(rows, total).to(case.device) + 0.1
    if values.numel() and case.chance(0.3):
        features[0, case.random.randrange(total), 0] = case.random.choice([torch.nan, torch.inf])
    kind = case.random.choice([Diverse, Dpp])
    check(rk.triton, kind, features, case.laid_out(values), keep, lengths, tolerance=1e-5)


CHECKS = [check_rank, check_select, check_gather, check_scatter, check_route, check_scatter_norm, check_align]
CHECKS += [check_saliency, check_merge, check_greedy]


def pytest_generate_tests(metafunc):
    first, cases = metafunc.config.getoption("fuzz_seed"), metafunc.config.getoption("fuzz_cases")
    metafunc.parametrize("seed", range(first, first + cases))


def test_case(seed, device):
    case = Case(seed, device)
    case.random.choice(CHECKS)(case)
