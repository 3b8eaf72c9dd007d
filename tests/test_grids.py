"""Grids stay within the limits of a device: large batches run in parts, and tensors that would not fit are refused."""

import pytest
import torch

import reroute_kernels as rk
from reroute_kernels.triton import launch, rank, saliency, select


@pytest.fixture
def few_programs(monkeypatch):
    """As if a grid held two programs along its second and third axis."""
    for module in (launch, rank, saliency, select):
        monkeypatch.setattr(module, "MAX_PROGRAMS", 2)


def ranking(batch, device, tables=None):
    return {
        "query": torch.randn(batch, 1, 4, 16, device=device),
        "key": torch.randn(batch, 20, 2, 16, device=device),
        "cos": torch.randn(tables or batch, 20, 8, device=device),
        "sin": torch.randn(tables or batch, 20, 8, device=device),
        "key_mask": torch.rand(batch, 20, device=device) < 0.8,
        "past_key": torch.randn(batch, 7, 2, 16, device=device),
        "past_mask": torch.rand(batch, 7, device=device) < 0.8,
    }


@pytest.mark.parametrize("tables", [None, 1], ids=["tables", "one-table"])
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_ranking_in_parts(device, few_programs, launches, batch, tables):
    given = ranking(batch, device, tables)
    expected = rk.ref.rank_tokens(**given)
    torch.testing.assert_close(rk.triton.rank_tokens(**given), expected, atol=1e-5, rtol=0)
    grids = [grid for name, grid in launches if name in ("attention_logits", "reduce_attention")]
    assert len(grids) == 2 * -(-batch // 2)
    assert all(size <= 2 for grid in grids for size in grid[1:])


@pytest.mark.everyday(5)
@pytest.mark.parametrize("total", [20, 5000, 66_000], ids=["one-program", "passes", "tiles"])
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_selection_in_parts(device, few_programs, launches, batch, total):
    scores = torch.rand(batch, total, device=device)
    pinned = torch.rand(batch, total, device=device) < 0.1
    keep = torch.arange(batch, device=device)
    given = (scores, ~pinned, pinned, keep, int(pinned.sum(1).max()) + batch)
    assert torch.equal(rk.triton.select_tokens(*given), rk.ref.select_tokens(*given))
    assert all(size <= 2 for _, grid in launches for size in grid[1:])


@pytest.mark.parametrize("batch", [2, 5])
def test_saliency_in_parts(device, few_programs, launches, batch):
    given = torch.randn(batch, 20, 2, 16, device=device), torch.randn(batch, 20, 2, 16, device=device)
    bounds = torch.tensor([0, 7, 20], device=device)
    expected = rk.ref.column_saliency(*given, bounds)
    torch.testing.assert_close(rk.triton.column_saliency(*given, bounds), expected, atol=1e-5, rtol=0)
    assert len(launches) == 2 * -(-batch // 2)
    assert all(size <= 2 for _, grid in launches for size in grid[1:])


def test_too_many_rows_of_queries(device, launches, monkeypatch):
    monkeypatch.setattr(rank, "MAX_FIRST_PROGRAMS", 2)
    query = torch.randn(1, 40, 4, 16, device=device)
    key = torch.randn(1, 40, 2, 16, device=device)
    most = 4 if torch.version.hip else 32
    with pytest.raises(ValueError, match=f"query must have at most {most} queries of 4 heads for this backend, got 40"):
        rk.triton.rank_tokens(query, key)
    assert launches == []
    rk.triton.rank_tokens(query[:, :most], key)
    assert launches


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_programs_beside_each_other_are_of_heads(device, launches):
    """They read whole rows of the key together."""
    rk.triton.rank_tokens(torch.randn(2, 1, 6, 16, device=device), torch.randn(2, 700, 6, 16, device=device))
    assert launches[0] == ("attention_logits", (6, 6, 2))


def test_rows_that_no_grid_holds(device, launches, monkeypatch):
    """A row of more blocks than a grid has programs along its second axis, and more rows than along the first."""
    index = torch.tensor([[0, 2]], device=device)
    wide = torch.zeros(1, 4, 1, device=device).expand(1, 4, 2 * 2048 + 1)
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 2)
    with pytest.raises(ValueError, match=r"must have at most .* rows of at most 4096 elements .*, got 2 rows of 4097"):
        rk.triton.gather_tokens(index, wide)
    full = torch.zeros(1, 4, 2 * 2048 + 1, device=device)
    with pytest.raises(ValueError, match="of at most 4096 elements for this backend, got 2 rows of 4097 elements"):
        rk.triton.scatter_tokens_(full, index, wide[:, :2])
    pool = torch.zeros(1, 4, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="for this backend, got 4 rows of 4097 elements"):
        rk.triton.align_tokens_(full, index, wide[:, :2], pool)
    monkeypatch.setattr(launch, "MAX_FIRST_PROGRAMS", 1)
    with pytest.raises(ValueError, match=r"must have at most 1 rows of .*, got 2 rows of 4 elements"):
        rk.triton.gather_tokens(index, wide[..., :4])
    assert launches == []
