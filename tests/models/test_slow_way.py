"""Routing equals the same thing done the slow way: one sample, full attention matrices, gather and scatter by index."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import reroute_kernels as rk
from tests.models.prompts import ACTIONS, GOLDEN, IMAGE, VIDEO, batch, llava_prompt, policy, selections


def decoder_of(model):
    return model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model


def decoder_arguments(model, inputs):
    """What the model hands its language model for these inputs."""
    caught = {}
    handle = decoder_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return caught


def mixed_axes(model, tables):
    """cos and sin of three rotary axes as one table, for versions whose layers mix them."""
    if tables[0].ndim == 3:
        return tables
    sections = model.config.text_config.rope_parameters["mrope_section"] * 2
    return tuple(
        torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1) for table in tables
    )


def attention_of_last_token(layer, hidden, cos, sin, interleaved):
    """Mean over heads of the last row of the whole L x L attention matrix."""
    attention, states = layer.self_attn, layer.input_layernorm(hidden)
    length, size = hidden.shape[1], attention.head_dim

    def heads(name):
        x = getattr(attention, f"{name}_proj")(states)[0].view(length, -1, size)
        x = getattr(attention, f"{name}_norm", torch.nn.Identity())(x).transpose(0, 1)
        x, rest = x.split([cos.shape[-1], size - cos.shape[-1]], dim=-1)
        if interleaved:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        else:
            turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
        return torch.cat([x * cos[0] + turned * sin[0], rest], dim=-1)

    query, key = heads("q"), heads("k")
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = query @ key.transpose(1, 2) / size**0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return logits.masked_fill(~causal, -torch.inf).softmax(dim=-1).mean(dim=0)[-1]


@torch.no_grad()
def slow_forward(model, inputs, policy):
    decoder = decoder_of(model)
    arguments = decoder_arguments(model, inputs)
    hidden = arguments["inputs_embeds"]
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(hidden.shape[1])[None]
    tables = decoder.rotary_emb(hidden, positions[-3:] if positions.ndim == 3 else positions)
    visual = (inputs["input_ids"][0] == IMAGE) | (inputs["input_ids"][0] == VIDEO)
    candidates = visual.nonzero().flatten().tolist()
    # What DeepStack adds after the first layers, to every visual token.
    features = arguments.get("deepstack_visual_embeds") or []
    running, total, selected = torch.arange(hidden.shape[1]), len(candidates), []
    stages = {stage.layer: stage for stage in policy.schedule}
    for number, layer in enumerate(decoder.layers):
        if number in stages:
            # `remove` ranks among the survivors, `reroute` among all tokens.
            among = running if policy.action == "remove" else torch.arange(hidden.shape[1])
            cos, sin = (table[:, among] for table in mixed_axes(model, tables))
            interleaved = model.config.model_type == "glm4v"
            if interleaved and torch.equal(*cos.chunk(2, dim=-1)):  # versions whose layers order the entries
                cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cos, sin))
            scores = dict(
                zip(
                    among.tolist(),
                    attention_of_last_token(layer, hidden[:, among], cos, sin, interleaved).tolist(),
                    strict=True,
                )
            )
            count = min(len(candidates), max(1, int(total * stages[number].keep)))
            best = sorted(candidates, key=lambda position: (-scores[position], position))[:count]
            selected.append(sorted(best))
            if policy.action == "remove":
                candidates = selected[-1]
            running = torch.tensor(sorted([*selected[-1], *(~visual).nonzero().flatten().tolist()]))
        compact_tables = tuple(table[..., running, :] for table in tables)
        hidden = hidden.clone()
        hidden[:, running] = layer(hidden[:, running], attention_mask=None, position_embeddings=compact_tables)
        if number < len(features):
            hidden[0, visual] += features[number]
    return model.lm_head(decoder.norm(hidden)), selected


def check(model, inputs, this):
    expected, selected = slow_forward(model, inputs, this)
    with rk.apply(model, this) as routing, torch.no_grad():
        logits = model(**inputs).logits
    assert selections(routing.trace) == selected
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("first", [0, 3])
def test_golden_models(model, prompt, action, images, first):
    this = policy(action, (rk.Stage(first, 0.35), rk.Stage(6, 0.25), rk.Stage(7, 0.3), rk.Stage(11, 0.1)))
    check(model, batch([prompt(images, 6, 14, seed=11)]), this)


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def text_model_type(request):
    return request.param


@pytest.mark.parametrize("action", ACTIONS)
def test_every_text_model_of_llava_with_grouped_queries(text_model_type, action):
    torch.manual_seed(4)
    config = AutoConfig.from_pretrained(GOLDEN / "llava")
    values = {
        **config.text_config.to_dict(),
        "model_type": text_model_type,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "num_hidden_layers": 6,
        "initializer_range": 0.2,
    }
    config.text_config = AutoConfig.for_model(**values)
    model = AutoModelForImageTextToText.from_config(config).eval()
    this = policy(action, (rk.Stage(1, 0.35), rk.Stage(4, 0.25)))
    check(model, batch([llava_prompt(1, 6, 14, seed=11)]), this)
