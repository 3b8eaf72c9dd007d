import pytest
import torch

from reroute_kernels.models.masks import attention_mask, mask_format

LIKE = torch.zeros(1, dtype=torch.float16)
VALID = torch.tensor([[True, True, False, True, True], [True] * 5])


@pytest.mark.parametrize(("implementation", "queries", "keys"), [("sdpa", 1, 5), ("sdpa", 5, 5), ("eager", 1, 5)])
def test_no_mask_where_none_is_needed(implementation, queries, keys):
    assert attention_mask(implementation, queries, keys - queries, keys, LIKE) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("valid", [None, VALID], ids=["dense", "ragged"])
@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 5), (1, 5)])
def test_queries_see_valid_keys_up_to_their_own(implementation, queries, keys, valid):
    mask = attention_mask(implementation, queries, keys - queries, keys, LIKE, valid)
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
            own = keys - queries + query
            for key in range(keys):
                counts = valid is None or bool(valid[sample, key])
                assert bool(visible[sample, 0, query, key]) == (key == own or (key < own and counts))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("valid", [None, VALID], ids=["dense", "ragged"])
def test_a_window_is_one_of_positions(implementation, valid):
    positions = torch.tensor([[0, 1, 4, 9, 10], [2, 3, 5, 6, 7]])
    mask = attention_mask(implementation, 2, 3, 5, LIKE, valid, positions, window=4)
    visible = mask if implementation == "sdpa" else mask == 0
    for sample in range(2):
        for query in (3, 4):
            expected = [
                key == query
                or (
                    key < query
                    and int(positions[sample, query] - positions[sample, key]) < 4
                    and (valid is None or bool(valid[sample, key]))
                )
                for key in range(5)
            ]
            assert visible[sample, 0, query - 3].tolist() == expected


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_room_that_a_cache_has_left_is_not_seen(implementation):
    mask = attention_mask(implementation, 1, 4, 8, LIKE)
    visible = mask if implementation == "sdpa" else mask == 0
    assert visible[0, 0, 0].tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("valid", [None, VALID], ids=["dense", "ragged"])
@pytest.mark.parametrize(("queries", "past", "keys"), [(5, 0, 5), (2, 3, 5), (2, 3, 9)])
def test_flex_attention_sees_what_sdpa_sees(valid, queries, past, keys):
    expected = attention_mask("sdpa", queries, past, keys, LIKE, valid)
    if expected is None:
        expected = torch.ones(queries, keys, dtype=torch.bool).tril()
    block = attention_mask("flex_attention", queries, past, keys, LIKE, valid)
    for sample in range(1 if valid is None else 2):
        for query in range(queries):
            seen = [bool(block.mask_mod(*map(torch.tensor, (sample, 0, query, key)))) for key in range(keys)]
            assert seen == expected.expand(2, 1, queries, keys)[sample, 0, query].tolist()


@pytest.mark.parametrize("valid", [None, torch.tensor([[True] * 7, [False] * 2 + [True] * 5])], ids=["dense", "ragged"])
@pytest.mark.parametrize("form", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("keys", [7, 9], ids=["full", "with-room"])
def test_queries_at_places_of_their_own(form, valid, keys):
    """Two keys of the past, and five of the call, among which three queries stand."""
    places = torch.tensor([[0, 2, 4], [1, 4, 0]])
    mask = attention_mask(form, 3, 2, keys, LIKE, valid, places=places)
    for sample in range(2):
        for query in range(3):
            own = 2 + int(places[sample, query])
            expected = [
                key == own or (key < own and (valid is None or bool(valid[sample, key]))) for key in range(keys)
            ]
            if form == "flex_attention":
                seen = [bool(mask.mask_mod(*map(torch.tensor, (sample, 0, query, key)))) for key in range(keys)]
            else:
                seen = (mask if form == "sdpa" else mask == 0)[sample, 0, query].tolist()
            assert seen == expected
    with pytest.raises(ValueError, match="flash attention takes no"):
        attention_mask("flash_attention", 3, 2, 7, LIKE, places=places)


def test_flash_attention_takes_the_valid_keys():
    assert attention_mask("flash_attention", 5, 0, 5, LIKE) is None
    assert attention_mask("flash_attention", 1, 4, 5, LIKE) is None
    assert torch.equal(attention_mask("flash_attention", 2, 3, 5, LIKE, VALID), VALID)
    with pytest.raises(ValueError, match="flash attention takes no"):
        attention_mask("flash_attention", 2, 3, 5, LIKE, None, torch.arange(5)[None], window=3)
    with pytest.raises(ValueError, match="flash attention takes no"):
        attention_mask("flash_attention", 2, 3, 8, LIKE)


@pytest.mark.parametrize(
    ("implementation", "form"),
    [
        ("sdpa", "sdpa"),
        ("eager", "eager"),
        ("flex_attention", "flex_attention"),
        ("flash_attention_2", "flash_attention"),
        ("flash_attention_3", "flash_attention"),
        ("flash_attention_4", "flash_attention"),
        ("kernels-community/flash-attn2", "flash_attention"),
        ("kernels-community/vllm-flash-attn3", "flash_attention"),
        ("paged|flash_attention_2", None),
        ("paged|sdpa", None),
        ("someone's", None),
    ],
)
def test_format_of_an_implementation(implementation, form):
    assert mask_format(implementation) == form


@pytest.mark.parametrize("name", ["my_attention", "kernels-community/my-flash"])
def test_format_of_a_registered_implementation(name):
    """As transformers registers kernels of the hub, and as users do: under any name, with the masks of another."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        assert mask_format(name) == "sdpa"
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
        assert mask_format(name) is None
    finally:
        del AttentionMaskInterface._global_mapping[name]
