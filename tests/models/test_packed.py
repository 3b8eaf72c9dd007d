"""Several sequences packed into one row: refused if transformers keeps them apart, whichever argument tells it to."""

import contextlib

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reroute_kernels as rk
from tests.models.conftest import no_layer_runs
from tests.models.prompts import batch, policy, selections
from tests.models.test_ways import flash_attention_stand_in

FLASH = [
    "flash_attention_2",
    "flash_attention_4",
    "kernels-community/flash-attn2",
    "kernels-community/vllm-flash-attn3",
]


@contextlib.contextmanager
def attention(model, name):
    """Attention of the decoder by a stand-in for the CUDA kernels, under the name and with the masks of one of them."""
    config = model.model.language_model.config
    before, known = config._attn_implementation, name in AttentionMaskInterface._global_mapping
    ALL_ATTENTION_FUNCTIONS[name] = flash_attention_stand_in
    if not known:  # as transformers does when it has loaded a kernel
        AttentionMaskInterface.register(name, flash_attention_mask)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name]
        if not known:
            del AttentionMaskInterface._global_mapping[name]


def text_positions(inputs, positions):
    """position_ids of text (B, L) in the form that the family takes for packed sequences."""
    return positions.expand(4, *positions.shape) if "image_grid_thw" in inputs else positions


def block_diagonal(*lengths):
    blocks = [torch.ones(length, length).tril() for length in lengths]
    return torch.block_diag(*blocks).bool()[None, None]


def followed_by_text(inputs, count):
    """The prompt, and a sequence of text behind it in the same row."""
    ids = torch.cat([inputs["input_ids"], torch.arange(10, 10 + count)[None]], dim=1)
    return without_mask(inputs) | ids_of(inputs, ids)


def after_text(inputs, count):
    ids = torch.cat([torch.arange(10, 10 + count)[None], inputs["input_ids"]], dim=1)
    return without_mask(inputs) | ids_of(inputs, ids)


def ids_of(inputs, ids):
    types = {"mm_token_type_ids": (ids == 500).long()} if "mm_token_type_ids" in inputs else {}
    return {"input_ids": ids, **types}


def without_mask(inputs):
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("order", ["image first", "image last", "one token first"])
@torch.no_grad()
def test_block_diagonal_masks(model, inputs, order, additive):
    length = inputs["input_ids"].shape[1]
    if order == "image first":
        packed, mask = followed_by_text(inputs, 6), block_diagonal(length, 6)
    elif order == "image last":
        packed, mask = after_text(inputs, 6), block_diagonal(6, length)
    else:
        packed, mask = after_text(inputs, 3), block_diagonal(1, 2, length)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with (
        rk.apply(model, policy()),
        no_layer_runs(model),
        pytest.raises(NotImplementedError, match="of four dimensions must be causal with padding"),
    ):
        model(**packed, attention_mask=mask)


@pytest.mark.parametrize("what", ["the image", "the whole prompt"])
@torch.no_grad()
def test_mask_that_hides_from_the_last_token_alone(model, inputs, what):
    """It leaves a prompt without visual tokens that the last one sees; it is no prompt of text for that."""
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[-1, inputs["input_ids"][0] == 500 if what == "the image" else slice(0, length - 1)] = False
    with (
        rk.apply(model, policy()),
        no_layer_runs(model),
        pytest.raises(NotImplementedError, match="of four dimensions must be causal with padding"),
    ):
        model(**without_mask(inputs), attention_mask=mask[None, None])


@pytest.mark.parametrize("shape", [(1, 2), (1, 1, 3, 3), (1, 2, "length", "length"), (1, "length", "length")])
@torch.no_grad()
def test_masks_of_other_shapes(model, inputs, shape):
    length = inputs["input_ids"].shape[1]
    mask = torch.zeros([length if size == "length" else size for size in shape], dtype=torch.bool)
    with (
        rk.apply(model, policy()),
        no_layer_runs(model),
        pytest.raises(NotImplementedError, match="attention_mask must be None or of shape"),
    ):
        model(**without_mask(inputs), attention_mask=mask)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_in_four_dimensions(model, prompt, side):
    """Padding may see itself (but the last of a row, which would be a token), or as others do."""
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(1, 2, 4, seed=2)], side)
    valid = inputs["attention_mask"].bool()
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    positions = model.model.get_rope_index(**rope_inputs(inputs))[0] if "image_grid_thw" in inputs else None
    with rk.apply(model, policy()) as routing:
        expected = model(**inputs, position_ids=positions).logits
        selected = selections(routing.trace)
        itself = torch.eye(length, dtype=torch.bool) & (side == "left")
        for mask in (causal & valid[:, None], causal & (valid[:, None] | itself)):
            actual = model(**without_mask(inputs), attention_mask=mask[:, None], position_ids=positions).logits
            assert selections(routing.trace) == selected
            torch.testing.assert_close(actual[valid], expected[valid], atol=1e-5, rtol=0)


def rope_inputs(inputs):
    return {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}


@torch.no_grad()
def test_text_may_be_packed(model, inputs):
    """A call without visual tokens runs untouched."""
    text = {"input_ids": torch.arange(10, 30)[None], "attention_mask": block_diagonal(12, 8)}
    expected = model(**text).logits
    with rk.apply(model, policy()):
        assert torch.equal(model(**text).logits, expected)


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("mask", [False, True], ids=["no-mask", "mask-of-ones"])
@torch.no_grad()
def test_positions_under_flash_attention(model, inputs, name, mask):
    """Flash attention tells sequences apart by positions that do not count by one, with a cache as without."""
    packed = followed_by_text(inputs, 6)
    length = inputs["input_ids"].shape[1]
    positions = text_positions(inputs, torch.cat([torch.arange(length), torch.arange(6)])[None])
    if mask:
        packed["attention_mask"] = torch.ones(1, length + 6, dtype=torch.int64)
    for use_cache in (False, True):
        with (
            attention(model, name),
            rk.apply(model, policy()),
            no_layer_runs(model),
            pytest.raises(NotImplementedError, match="position_ids of a routed prompt must count by one"),
        ):
            model(**packed, position_ids=positions, use_cache=use_cache)


@pytest.mark.parametrize(
    "argument",
    [
        {"cu_seq_lens_q": torch.tensor([0, 9, 20], dtype=torch.int32)},
        {"cu_seq_lens_k": torch.tensor([0, 9, 20], dtype=torch.int32)},
        {"max_length_q": 11},
        {"max_length_k": 11},
        {"seq_idx": torch.zeros(1, 20, dtype=torch.int32)},
    ],
    ids=lambda argument: next(iter(argument)),
)
@torch.no_grad()
def test_sequence_ends(model, inputs, argument):
    (name,) = argument
    with (
        attention(model, "flash_attention_2"),
        rk.apply(model, policy()),
        no_layer_runs(model),
        pytest.raises(NotImplementedError, match=f"{name} must be None for a routed prompt, got"),
    ):
        model(**inputs, **argument)


@pytest.mark.parametrize("name", FLASH)
@torch.no_grad()
def test_every_kind_of_flash_attention_routes(model, prompt, name):
    """A padded batch and a sample alone, whose positions count by one from the first token on."""
    inputs = batch([prompt(1, 5, 12, seed=1), prompt(1, 2, 4, seed=2)])
    generated = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with rk.apply(model, policy()) as routing:
        expected = model(**inputs).logits
        selected, tokens = selections(routing.trace), model.generate(**inputs, **generated)
        with attention(model, name):
            actual = model(**inputs).logits
            assert selections(routing.trace) == selected
            assert torch.equal(model.generate(**inputs, **generated), tokens)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[valid], expected[valid], atol=1e-4, rtol=0)
