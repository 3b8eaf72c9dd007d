"""Routing done the slow way: one sample, whole attention matrices, full-length gather and scatter around every layer.

Nothing of the library is used here but the names of its rankings. The hidden states keep their full length between
layers, so that the model's own work there (DeepStack) happens as usual.
"""

from __future__ import annotations

import inspect
import math

import torch

from reroute_kernels.models.adapter import cache_of
from reroute_kernels.rankings import AllText, KeyNorm, Mixed, Random, Remembered, TextRaters, Uniform
from tests.models.prompts import IMAGE, VIDEO

NORMS = {"exaone4": None, "apertus1p5_text": "attention_layernorm", "lfm2": "operator_norm", "lfm3": "operator_norm"}
"""Norms that layers begin with, by text model, if they have another name or are none."""
FEATURES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")
SEES_IMAGES = ("gemma", "gemma3_text", "gemma4_text", "gemma4_unified_text")
"""Decoders of models in which the tokens of an image see each other."""


def decoder_of(model):
    core = model.model
    return core.language_model if hasattr(core, "language_model") else core.text_model


def layer_types(decoder):
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is None:
        sliding = getattr(decoder.config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * len(decoder.layers)
    return ["linear_attention" if kind == "conv" else kind for kind in kinds]


def mixed_axes(decoder, tables):
    """cos and sin of three rotary axes as one table, for versions whose layers mix them."""
    if tables[0].ndim == 3:
        return tables
    sections = decoder.config.rope_parameters["mrope_section"] * 2
    return tuple(
        torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1) for table in tables
    )


def projected(attention, name, states, gated):
    """(H, L, D) queries or keys of one sample before rotation, in float32."""
    if hasattr(attention, "kv_b_proj"):
        return rotating_first(attention, expanded(attention, name, states)[0].transpose(0, 1)).float()
    x = getattr(attention, f"{name}_proj")(states)[0]
    if name == "q" and gated:
        x = x.unflatten(-1, (-1, 2, attention.head_dim))[:, :, 0]
    else:
        x = x.unflatten(-1, (-1, attention.head_dim))
    norms = (getattr(attention, each, None) for each in (f"{name}_norm", f"{name}_layernorm", "qk_norm"))
    x = next((norm for norm in norms if norm is not None), torch.nn.Identity())(x)
    factor = getattr(attention, "qk_scale_factor", 1.0) if name == "q" else 1.0
    return x.transpose(0, 1).float() * factor


def expanded(attention, name, states):
    """(1, L, H, D) queries or keys of latent attention before rotation."""
    if name == "q":
        low = attention.q_a_proj is not None
        x = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(states))) if low else attention.q_proj(states)
        return x.unflatten(-1, (-1, attention.qk_head_dim))
    latent, shared = attention.kv_a_proj_with_mqa(states).split(
        [attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1
    )
    keys = attention.kv_b_proj(attention.kv_a_layernorm(latent)).unflatten(-1, (attention.num_heads, -1))
    keys = keys[..., : attention.qk_nope_head_dim]
    return torch.cat([keys, shared[:, :, None].expand(-1, -1, keys.shape[2], -1)], dim=-1)


def rotating_first(attention, x):
    """The channels that rotate, which stand behind the others, before them."""
    return torch.cat([x[..., attention.qk_nope_head_dim :], x[..., : attention.qk_nope_head_dim]], dim=-1)


def rotated(x, cos, sin, interleaved):
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return torch.cat([x * cos[0].float() + turned * sin[0].float(), rest], dim=-1)


def scale_of(config, attention):
    """Of logits of attention."""
    if config.model_type.startswith("gemma4"):
        return 1.0
    if config.model_type.startswith("gemma3"):
        return config.query_pre_attn_scalar**-0.5
    size = getattr(attention, "head_dim", None) or attention.qk_head_dim
    return getattr(config, "attention_multiplier", None) or size**-0.5


def attention(decoder, layer, hidden, tables, past_key, past_seen, rotary=True):
    """(H, L, L), the whole attention matrix of one sample, at the tokens of this call; past_seen: (P,) bool.

    Without rotary position, keys of earlier turns do not count.
    """
    attention, kind = layer.self_attn, decoder.config.model_type
    name = NORMS.get(kind, "input_layernorm")
    states = hidden if name is None else getattr(layer, name)(hidden)
    length = hidden.shape[1]
    query, key = (projected(attention, name, states, kind.startswith("qwen3_5")) for name in "qk")
    if not rotary:
        past_key = None
    windowed = kind == "cohere2" or (kind == "exaone4" and decoder.config.sliding_window is not None)
    if rotary and tables is not None and not windowed:  # beside windows, layers of full attention do not rotate
        cos, sin = mixed_axes(decoder, tables)
        interleaved = kind in ("glm4v_text", "glm_ocr_text", "ernie4_5_vl_moe_text")
        interleaved |= kind == "deepseek_v3" and decoder.config.rope_interleave
        if interleaved and torch.equal(*cos.chunk(2, dim=-1)):  # versions whose layers order the entries
            cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cos, sin))
        query, key = (rotated(x, cos, sin, interleaved) for x in (query, key))
    if past_key is not None:
        key = torch.cat([past_key[0].float(), key], dim=1)
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = query @ key.transpose(1, 2) * scale_of(decoder.config, attention)
    past = key.shape[1] - length
    causal = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    if past_key is not None:
        causal[:, :past] &= past_seen
    return logits.masked_fill(~causal, -torch.inf).softmax(dim=-1)[:, :, past:]


def reduced(rows, ranking):
    """(L,) of the rows (H, Q, L) of some queries, over queries first, then over heads."""
    for reduction in (ranking.query_reduction, ranking.head_reduction):
        dim = 1 if rows.ndim == 3 else 0
        rows = rows.amax(dim=dim) if reduction == "max" else rows.mean(dim=dim)
    return rows


def at_even_distances(pool, count):
    return {pool[-(-number * len(pool) // count) - 1] for number in range(1, count + 1)}


def best_of(pool, scores, sure):
    """The pool in the order in which it is selected, those that are taken for sure first."""
    return sorted(pool, key=lambda row: (row not in sure, -scores[row], row))


def unwrapped(ranking):
    """The ranking that scores, the share that is taken at even distances, and the decay of a memory, or None."""
    uniform, decay = 0, None
    while isinstance(ranking, (Mixed, Remembered)):
        uniform, decay = getattr(ranking, "uniform", uniform), getattr(ranking, "decay", decay)
        ranking = ranking.ranking
    return ranking, uniform, decay


def with_memory(scores, places, decay, remembered):
    """Shares of scores by row, with what is remembered by place."""
    if decay is None:
        return scores
    total = sum(scores.values())
    return {row: score / total + decay * remembered.get(places[row], 0.0) for row, score in scores.items()}


def murmur(number):
    number &= 0xFFFFFFFF
    number = (number ^ number >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    number = (number ^ number >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return number ^ number >> 16


def raters_of(embeddings, visual, length):
    """Places of the text tokens behind `visual` places that are relevant to these, pair by pair."""
    text = range(visual[-1] + 1, length)
    relevance = dict.fromkeys(text, 0.0)
    for place in visual:
        products = torch.stack([embeddings[place].double() @ embeddings[other].double() for other in text])
        for other, share in zip(text, products.softmax(dim=0).tolist(), strict=True):
            relevance[other] += share / len(visual)
    return [place for place in text if relevance[place] >= sum(relevance.values()) / len(text)]


def scored(ranking, decision, count, pool, text, decoder, layer, hidden, tables, past_key, past_seen, raters=()):
    """Scores that a ranking gives the places of `hidden` that are in `pool`, of which `count` will be chosen."""
    if isinstance(ranking, Uniform):
        taken = at_even_distances(pool, count)
        return {place: float(place in taken) for place in pool}
    if isinstance(ranking, Random):
        start = (2 * ranking.seed + 1) * 0x9E3779B9 + decision * 0x7F4A7C15
        scores = {place: murmur(number + 1 + start) >> 8 for number, place in enumerate(pool)}
    elif isinstance(ranking, KeyNorm):
        states = layer.input_layernorm(hidden)
        key = layer.self_attn.k_proj(states)[0].unflatten(-1, (-1, layer.self_attn.head_dim))  # before a norm of keys
        scores = -key.float().norm(dim=-1).mean(dim=1)
    else:
        rows = attention(decoder, layer, hidden, tables, past_key, past_seen, ranking.rotary)
        if isinstance(ranking, AllText):
            asking = text
        else:
            asking = raters if isinstance(ranking, TextRaters) else slice(-ranking.queries, None)
        scores = reduced(rows[:, asking], ranking)
        if isinstance(ranking, TextRaters) and ranking.query_reduction == "mean":
            scores = scores * len(raters) / len(text)  # the library counts all text, which changes no order
    return {place: float(scores[place]) for place in pool}


def clustered(states, places, count):
    """Clusters of tokens by the place of their centre, in order: dense tokens that are far from denser ones."""
    if not count:
        return {}
    tokens = states[places]
    apart = (tokens[:, None] - tokens).norm(dim=-1) / tokens.shape[1] ** 0.5
    density = (-apart.sort(dim=1).values[:, :count].square().mean(dim=1)).exp().tolist()
    scores = []
    for row, own in enumerate(density):
        denser = [float(apart[row, other]) for other, its in enumerate(density) if (-its, other) < (-own, row)]
        scores.append(own * (min(denser) if denser else float(apart.max())))
    centres = sorted(sorted(range(len(places)), key=lambda row: (-scores[row], row))[:count])
    groups = {places[centre]: [places[centre]] for centre in centres}
    for row in set(range(len(places))) - set(centres):
        groups[places[centres[int(apart[row, centres].argmin())]]].append(places[row])
    return groups


class Proxy:
    """The mean of a group of waiting tokens, which runs in their place; all copies of the sample are alike."""

    def __init__(self, group, tokens):
        self.group = group
        self.state = self.start = tokens.float().mean(dim=1).to(tokens.dtype)


def rows_of(tables, rows, batch=slice(None)):
    """Rotary tables of some tokens; None of layers that do not rotate."""
    return None if tables is None else tuple(table[..., batch, rows, :] for table in tables)


def of_tokens(kwargs, given):
    """Arguments of a layer that have an entry for each token, of those it is given."""
    kinds = kwargs.get("moe_mm_token_type_ids")
    return {} if kinds is None else {"moe_mm_token_type_ids": kinds[:, given]}


class SlowWay:
    """Routes every call of the model while the `with` block runs. All rows of a batch must be the same sample.

    Args:
        model: unrouted.
        policy: the policy.
        visual: (L,) bool, for a prompt whose ids are not handed to the model.
        total: the visual tokens of that prompt, if a reducer dropped some before.
    """

    def __init__(self, model, policy, visual=None, total=None):
        self.model, self.policy, self.visual, self.total_before = model, policy, visual, total
        self.decoder = decoder_of(model)
        self.kinds = layer_types(self.decoder)
        # The layers that cache; those after them read what the last of their kind among these has cached, as it does.
        self.caching = len(self.kinds) - (getattr(self.decoder.config, "num_kv_shared_layers", None) or 0)
        self.masks, self.pasts = {}, {}
        # Whether the tokens of an image see each other.
        self.sees_images = self.decoder.config.model_type in SEES_IMAGES
        self.stages = {stage.layer: stage for stage in policy.schedule}
        # Selections of the latest routed prompt as positions in the conversation; candidates' scores by place in the
        # prompt.
        self.selected: list[list[int]] = []
        self.scores: list[dict[int, float]] = []
        # Whether a text is to be numbered as if prompts with images were in its batch.
        self.beside_images = False
        # Positions in the conversation that the masks of calls hide from now on.
        self.hidden = torch.empty(0, dtype=torch.int64)

    def __enter__(self):
        self.handle = self.model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        # Layers that cache nothing are not to leave tokens out by themselves.
        self.unshared = getattr(self.decoder, "first_kv_shared_layer_idx", None)
        if self.unshared is not None:
            self.decoder.first_kv_shared_layer_idx = len(self.kinds)
        self.positions = {}  # of the tokens that each layer has cached, by cache
        self.ends = {}  # of conversations, by cache
        for number, layer in enumerate(self.decoder.layers):
            layer.forward = self._around(number, layer, layer.forward)
        return self

    def __exit__(self, *exception):
        self.handle.remove()
        if self.unshared is not None:
            self.decoder.first_kv_shared_layer_idx = self.unshared
        for layer in self.decoder.layers:
            del layer.forward

    def _begin(self, core, args, kwargs):
        names = inspect.signature(core.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
        if ids is None:
            visual = self.visual if self.visual is not None else torch.zeros(0, dtype=torch.bool)
        else:
            assert (ids == ids[0]).all() or ids.shape[1] == 1
            visual = (ids[0] == IMAGE) | (ids[0] == VIDEO)
        filled = cache is not None and int(cache.get_seq_length()) > 0
        features = any(kwargs.get(name) is not None for name in FEATURES)
        self.routes = bool(visual.any()) and (not filled or features)
        # The first layer may have cached less than the conversation.
        self.past = max(int(cache.get_seq_length()), self.ends.get(id(cache), 0)) if filled else 0
        if cache is not None:
            tokens = ids if ids is not None else kwargs["inputs_embeds"]
            self.ends[id(cache)] = self.past + tokens.shape[1]
        # The next token is predicted from the last one, so the last one runs even if it is visual.
        self.current = visual[:-1].nonzero().flatten().tolist()
        if self.routes:
            self.total = self.total_before or int(visual.sum())
            self.selected, self.scores, self.running, self.inputs, self.change = [], [], None, {}, 0.0
            self.memory, self.proxies, self.output = {}, {}, None

    def _around(self, number, layer, forward):
        @torch.no_grad()
        def select(tables, cache, past):
            stage = self.stages[number]
            ranking, uniform, decay = unwrapped(stage.ranking or self.policy.ranking)
            ranks = number - 1 if getattr(ranking, "layer", "this") == "previous" else number
            hidden = self.inputs[ranks]
            length = hidden.shape[1]
            # `remove` ranks among the survivors, `reroute` among all tokens.
            survivors = self.policy.action == "remove" and self.running is not None
            among = self.running if survivors else torch.arange(length)
            compact = rows_of(tables, among, slice(1))
            if survivors and self.policy.positions == "contiguous" and tables is not None:
                compact = self._numbered(hidden, torch.arange(len(among)), self.kinds[number])
            places = among.tolist()
            pool = [row for row, place in enumerate(places) if place in self.current]
            text = [row for row, place in enumerate(places) if place not in self.visual_places]
            count = min(len(pool), max(1, int(self.total * stage.keep)))
            scores = scored(
                ranking,
                len(self.selected),
                count,
                pool,
                text,
                self.decoder,
                self.decoder.layers[ranks],
                hidden[:1, among],
                compact,
                cached_keys(cache, ranks, self.decoder.layers[ranks]) if past else None,
                self._seen(cache, ranks, past),
                self._raters(places) if isinstance(ranking, TextRaters) else (),
            )
            scores = with_memory(scores, places, decay, self.memory)
            sure = at_even_distances(pool, math.trunc(uniform * count))
            proxies = self._proxies_of(number, count, len(pool), len(sure))
            clusters, recycled = self._recycled_of(count, len(pool), len(sure))
            best = best_of(pool, scores, sure)
            waiting = sorted(best[count - proxies :])
            led = sorted(at_even_distances(waiting, proxies))
            chosen = [places[row] for row in [*best[: count - proxies - clusters], *led]]
            tokens = sorted(places[row] for row in best[count - clusters :][:recycled])
            self.merged = clustered(self.full[0].float(), tokens, clusters)
            chosen += self.merged
            self.scores.append({places[row]: score for row, score in scores.items()})
            self.memory |= {} if decay is None else self.scores[-1]
            if self.policy.action == "remove":
                self.current = chosen
            self.selected.append([self.past + place for place in sorted(chosen)])
            self.chosen = chosen
            deferred = set(self.visual_places) - set(chosen)
            self.running = torch.tensor([place for place in range(length) if place not in deferred])
            self._begin_proxies([places[row] for row in led], [places[row] for row in waiting], self.full)

        def slow(hidden, *args, **kwargs):
            cache = cache_of(kwargs)
            kind, length = self.kinds[number], hidden.shape[1]
            counts = cache is not None and kind != "linear_attention" and number < self.caching
            past = int(cache.get_seq_length(number)) if counts else self._past_of(number, kind)
            running = torch.arange(length)
            if self.routes:
                self.full = hidden = self._aligned(number, self._added(hidden))
                self.inputs[number] = hidden[:1]
                if self.running is None and number == min(self.stages):
                    self.visual_places = list(self.current)
                if number in self.stages:
                    select(kwargs["position_embeddings"], cache, past)
                    self.full = hidden = self._merged(hidden)
                    self.inputs[number] = hidden[:1]
                if self.running is not None:
                    running = self.running
            # Frozen tokens take part in the layer, and then are what they were.
            given = torch.arange(length) if self.policy.action == "freeze" else running
            tables, numbers = kwargs["position_embeddings"], past + torch.arange(len(running))
            kwargs["position_embeddings"] = self._embeddings(number, tables, given, hidden, numbers)
            kwargs["attention_mask"] = self._mask(number, kind, past, given, cache, kwargs["attention_mask"])
            kwargs["position_ids"] = None
            kwargs |= of_tokens(kwargs, given)
            before, hidden = hidden, self._with_proxies(hidden)
            # Further tensors have a row for each token.
            output = forward(hidden[:, given], *(arg if arg is None else arg[:, given] for arg in args), **kwargs)
            hidden[:, running] = output[:, running] if len(given) == length else output
            self._note_change(hidden - before)
            self._take_proxies(hidden, before)
            return hidden

        return slow

    def _past_of(self, number, kind):
        """Tokens that the layer whose keys this one reads had cached before the call."""
        return 0 if number < self.caching else self.pasts[kind]

    def _raters(self, places):
        """Rows, of those at `places`, of the raters, which are chosen before the first layer."""
        raters = raters_of(self.inputs[0][0], self.visual_places, self.inputs[0].shape[1])
        return [row for row, place in enumerate(places) if place in raters]

    def _proxies_of(self, number, count, candidates, sure):
        if self.policy.align != "proxy" or number == max(self.stages):
            return 0
        return min(count // 8, candidates - count, count - sure)

    def _recycled_of(self, count, candidates, sure):
        """How many of the tokens that a stage runs are means of removed ones, and how many these are."""
        most = max(count - sure - 1, 0)
        if not self.policy.recycle or count == candidates or not most:
            return 0, 0
        for clusters in range(1, most + 1):
            removed = candidates - count + clusters
            recycled = min(removed, int(self.policy.recycle * removed) + 1)
            if recycled // 10 + 1 <= clusters:
                break
        return clusters, recycled

    def _merged(self, hidden):
        """A copy with the means of clusters in the places of their centres."""
        merged = hidden.clone()
        for place, group in self.merged.items():
            merged[:, place] = hidden[:, group].float().mean(dim=1)
        return merged

    def _with_proxies(self, hidden):
        """A copy with the proxies in the places of their leaders."""
        hidden = hidden.clone()
        for place, proxy in self.proxies.items() if self.routes else ():
            hidden[:, place] = proxy.state
        return hidden

    def _take_proxies(self, hidden, before):
        """Take the proxies out of the hidden states that a layer left, and put the leaders back."""
        for place, proxy in self.proxies.items() if self.routes else ():
            proxy.state, hidden[:, place] = hidden[:, place].clone(), before[:, place]
        self.output = hidden

    def _begin_proxies(self, led, waiting, hidden):
        """A proxy for each leader: the mean of the waiting tokens that are closest to it."""
        groups = {place: [place] for place in led}
        for place in set(waiting) - set(led) if led else ():
            own, heads = hidden[0, place].float(), hidden[0, led].float()
            groups[led[int(torch.cosine_similarity(own, heads, dim=-1).argmax())]].append(place)
        self.proxies = {place: Proxy(group, hidden[:, group]) for place, group in groups.items()}

    def _added(self, hidden):
        """Hidden states with what the model added between layers, which proxies receive as the mean of their groups."""
        for proxy in self.proxies.values() if self.output is not None else ():
            addition = (hidden - self.output)[:, proxy.group].float().mean(dim=1)
            proxy.state, proxy.start = proxy.state + addition, proxy.start + addition
        return hidden

    def _note_change(self, change):
        """Count what a layer did to the visual tokens that ran."""
        if self.routes and self.running is not None:
            self.change = self.change + change[:, self.chosen].float().mean(dim=1, keepdim=True)

    def _aligned(self, number, hidden):
        """Where a decision ranks or begins, waiting tokens receive what the layers since added to those that ran."""
        later = self.stages.get(number + 1)
        ahead = later is not None and getattr(later.ranking or self.policy.ranking, "layer", "this") == "previous"
        if self.policy.align is None or self.running is None or not (ahead or number in self.stages):
            return hidden
        hidden = hidden.clone()
        if self.policy.align == "proxy":
            for proxy in self.proxies.values():
                hidden[:, proxy.group] += (proxy.state - proxy.start)[:, None]
                proxy.start = proxy.state
            return hidden
        waiting = [place for place in self.visual_places if place not in self.chosen]
        change, self.change = self.change, 0.0
        hidden[:, waiting] = (hidden[:, waiting].float() + change).to(hidden.dtype)
        return hidden

    def _embeddings(self, number, tables, given, hidden, numbers):
        """Those of the tokens that a layer is given, of its tables; numbers: of those that run, if contiguous."""
        is_routed = (bool(self.selected) or self.beside_images) and number >= min(self.stages)
        if tables is not None and is_routed and self.policy.positions == "contiguous":
            return self._numbered(hidden, numbers, self.kinds[number])
        return rows_of(tables, given)

    def _numbered(self, hidden, positions, kind):
        """Rotary tables of text at these positions."""
        positions, rope = positions[None], self.decoder.config.rope_parameters or {}
        by_kind = kind in rope  # each kind of layer has its own
        if "mrope_section" in (rope[kind] if by_kind else rope):
            positions = positions.expand(3, -1, -1)
        return self.decoder.rotary_emb(hidden, positions, *([kind] if by_kind else []))

    def _seen(self, cache, number, past):
        """(P,) bool, the tokens cached by a layer that the mask of this call does not hide."""
        if not past:
            return None
        return ~torch.isin(self.positions[id(cache), number][:past], self.hidden)

    def _mask(self, number, kind, past, running, cache, full):
        """Causal, by rows; in a sliding window also by positions in the conversation.

        Where the tokens of an image see each other, a token sees what the model's own mask lets it see, of what runs.
        """
        if kind == "linear_attention":
            return None
        if number < self.caching:
            self.pasts[kind] = past
            self.masks[kind] = self._new_mask(number, kind, past, running, cache, full)
        return self.masks[kind]

    def _new_mask(self, number, kind, past, running, cache, full):
        places = running + self.past
        if cache is not None:
            earlier = self.positions.get((id(cache), number), torch.empty(0, dtype=torch.int64))[:past]
            places = torch.cat([earlier, places])
            self.positions[id(cache), number] = places
        sdpa = self.decoder.config._attn_implementation == "sdpa"
        if self.sees_images and full is not None and past == 0:
            if isinstance(full, torch.Tensor):
                return full[:, :, running][..., running]
            own = torch.zeros((), dtype=torch.int64)  # flex attention
            return self._in_form(full.mask_mod(own, own, running[:, None], running)[None, None], sdpa)
        window = self.decoder.config.sliding_window if kind == "sliding_attention" else None
        hides = len(self.hidden) > 0
        if window is None and not hides and (len(running) == 1 or (past == 0 and sdpa)):
            return None
        rows = torch.arange(past + len(running))
        mask = rows <= rows[past:, None]
        if hides:
            mask = mask & ~torch.isin(places, self.hidden)
        if window is not None:
            mask &= places[past:, None] - places < window
            held = min(past, window - 1) + len(running) if past else len(running)
            mask = mask[:, -held:]
        return self._in_form(mask[None, None], sdpa)

    @staticmethod
    def _in_form(mask, boolean):
        return mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def cached_keys(cache, number, layer):
    if hasattr(layer.self_attn, "kv_b_proj"):  # what is cached is expanded, and rotated channels are halves
        keys, _ = layer.self_attn.expand_kv(cache.layers[number].keys, cache.layers[number].values)
        keys, size = rotating_first(layer.self_attn, keys), layer.self_attn.qk_rope_head_dim
        if not layer.self_attn.config.rope_interleave:
            return keys
        halves = keys[..., :size].chunk(2, dim=-1)
        return torch.cat([torch.stack(halves, dim=-1).flatten(-2), keys[..., size:]], dim=-1)
    return cache.key_cache[number] if hasattr(cache, "key_cache") else cache.layers[number].keys
