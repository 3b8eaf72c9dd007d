import pytest
import torch

from reroute_kernels.models.masks import causal_mask

LIKE = torch.zeros(1, dtype=torch.float16)
VALID = torch.tensor([[True, True, False, True, True], [True] * 5])


@pytest.mark.parametrize(("implementation", "queries", "keys"), [("sdpa", 1, 5), ("sdpa", 5, 5), ("eager", 1, 5)])
def test_no_mask_where_none_is_needed(implementation, queries, keys):
    assert causal_mask(implementation, queries, keys, None, LIKE) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("valid", [None, VALID], ids=["dense", "ragged"])
@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 5), (1, 5)])
def test_queries_see_valid_keys_up_to_their_own(implementation, queries, keys, valid):
    mask = causal_mask(implementation, queries, keys, valid, LIKE)
    if mask is None:
        assert valid is None
        return
    batch = 1 if valid is None else 2
    assert mask.shape == (batch, 1, queries, keys)
    if implementation == "eager":
        assert mask.dtype == LIKE.dtype
        assert set(mask.unique().tolist()) <= {0.0, torch.finfo(LIKE.dtype).min}
    visible = mask if implementation == "sdpa" else mask == 0
    for sample in range(batch):
        for query in range(queries):
            for key in range(keys):
                expected = key <= keys - queries + query and (valid is None or bool(valid[sample, key]))
                assert bool(visible[sample, 0, query, key]) == expected
