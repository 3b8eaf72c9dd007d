"""Random calls of routed models: each is equal to the slow way, sample by sample, or refused before a layer runs.

`--fuzz-cases N` runs 2 N of them, `--fuzz-seed S` begins at another seed. A case depends on its seed alone, which is in
the name of its test. A failure prints the case as `run(Case(...))`, which runs it again, also after it is edited.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
import transformers
from torch import Tensor

import reroute_kernels as rk
from reroute_kernels.models.adapter import cache_of
from reroute_kernels.rankings import AllText, KeyNorm, LastQuery, Random, Remembered, TextRaters, Uniform
from reroute_kernels.reducers import Nuwa
from reroute_kernels.reducers.base import rounded_up
from tests.models.families import CLIP, IDS, TEXT, aya_vision, qwen3_5, qwen3_vl, tiny
from tests.models.prompts import IMAGE, VIDEO, VISION_END, VISION_START
from tests.models.reduced_by_hand import has_equal_saliencies, reduced_prompt
from tests.models.slow_way import SlowWay, decoder_of, layer_types

# Weights


def llava():
    return tiny(
        "Llava",
        image_token_index=IMAGE,
        vision_config={**CLIP, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"},
    )


def qwen2_5_vl():
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    return tiny(
        "Qwen2_5_VL",
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        **IDS,
    )


@dataclass(frozen=True)
class Model:
    """How a tiny model and its images are made."""

    make: object
    tokens: int
    """Visual tokens of its smallest image."""
    axes: int = 1
    """Position ids of a token."""
    reducer: Nuwa | None = None


MODELS = {
    "llava": Model(llava, 16, reducer=Nuwa(keep=0.6, per_cell=3)),
    "qwen2_5_vl": Model(
        qwen2_5_vl, 24, axes=3, reducer=Nuwa(keep=0.6, per_cell=3, distance=0.8, quantile=0.1, keeps_own=False)
    ),
    "qwen3_vl": Model(qwen3_vl, 24, axes=3),
    "qwen3_5": Model(qwen3_5, 24, axes=3),
    "aya_vision": Model(aya_vision, 36),
}


@cache
def load(name: str, dtype: torch.dtype, role: str) -> torch.nn.Module:
    """Three models, since these must not share one: the unrouted call, the routed one, and the slow way."""
    torch.manual_seed(0)
    return MODELS[name].make().eval().to(dtype)


def picture(name: str, number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs that the processor would make of an image; number 1 is of twice the size if the family allows."""
    if name.startswith("qwen"):
        grid = (1, 8 * (number + 1), 12)
        pixels = torch.randn(grid[1] * grid[2], 1176 if name == "qwen2_5_vl" else 1536, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
    shape = (1, 3, 56, 56) if name == "llava" else (number + 1, 3, 168, 168)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def count(name: str, number: int) -> int:
    return MODELS[name].tokens * (1 if name == "llava" else number + 1)


# Cases

# Parts of a sample in a turn: text ("t5"), an image ("i0"), text and an image that the mask hides ("m2", "x0").
Layout = tuple[str, ...]

MASKS = ("none", "2d", "4d bool", "4d additive", "packed bool", "packed additive", "bidirectional")
POSITIONS = ("none", "given", "shifted", "packed")
CACHES = ("default", "dynamic", "static", "off")
MODES = ("greedy", "lookup", "chunks", "beams", "static", "no cache")
SIDES = ("left", "right", "none")
RANKINGS = (
    LastQuery(),
    LastQuery("previous"),
    LastQuery(queries=3, head_reduction="max"),
    AllText(),
    AllText("previous"),
    KeyNorm(),
    KeyNorm("previous"),
    Random(3),
    Uniform(),
    LastQuery(rotary=False),
    Remembered(LastQuery(), decay=0.8),
    Remembered(AllText(rotary=False)),
    TextRaters(),
)


@dataclass(frozen=True)
class Turn:
    """Content of a call: a layout for each sample, an empty one if it sits out."""

    layouts: tuple[Layout, ...]
    mask: str = "2d"
    positions: str = "none"
    hides: float = 0.0
    """The share of earlier tokens that its mask hides."""
    embeds: bool = False
    """Whether embeddings stand in for ids."""

    @property
    def has_images(self) -> bool:
        return any(segment[0] == "i" for layout in self.layouts for segment in layout)

    @property
    def has_holes(self) -> bool:
        return any(segment[0] in "mx" for layout in self.layouts for segment in layout)


@dataclass(frozen=True)
class Case:
    """A conversation with a routed model."""

    seed: int
    model: str = "llava"
    dtype: str = "float32"
    attention: str = "sdpa"
    stages: tuple[tuple[int, float], ...] = ((2, 0.4), (4, 0.2))
    action: str = "reroute"
    ranking: int = 0
    positions: str = "original"
    reduces: bool = False
    side: str = "left"
    cache: str = "default"
    mode: str = "call"
    """How prompts run: "call", or a way of `generate`."""
    turns: tuple[Turn, ...] = ()
    align: str | None = None
    recycle: float = 0.0
    own: tuple[int | None, ...] = ()
    """Rankings of the stages, if any has its own."""

    @property
    def policy(self) -> rk.Policy:
        rankings = [None if number is None else RANKINGS[number] for number in self.own] or [None] * len(self.stages)
        stages = [rk.Stage(*stage, ranking) for stage, ranking in zip(self.stages, rankings, strict=True)]
        reducer = MODELS[self.model].reducer if self.reduces else None
        ranking, others = RANKINGS[self.ranking], {"align": self.align, "recycle": self.recycle}
        return rk.Policy(stages, self.action, ranking, self.positions, reducer, **others)

    @property
    def keeps_all(self) -> bool:
        return not self.reduces and self.positions == "original" and all(keep == 1 for _, keep in self.stages)

    @property
    def is_plain(self) -> bool:
        """Whether it must not be refused: a padded batch of prompts, and text on the cache that they fill."""
        prompt, *later = self.turns
        return (
            MODELS[self.model].axes + len(set(layer_types(self.decoder))) < 5
            and (self.model not in ("qwen3_5", "aya_vision") or self.side != "right")
            and self.attention != "flex_attention"
            and self.stages[0][0] > 0
            and not (self.policy.ranks_by_previous_layer and self.model in ("qwen3_5", "aya_vision"))
            and not self.reduces
            and self.cache in ("default", "dynamic")
            and self.mode in ("call", "greedy", "beams", "no cache")
            and (prompt.mask in ("none", "2d") or (prompt.mask.startswith("4d") and self.is_plain_in_four_dimensions))
            and prompt.positions in ("none", "given", "shifted")
            and not any(turn.has_holes or turn.embeds for turn in self.turns)
            and all(prompt.layouts)
            and all(turn.mask in ("none", "2d") and not turn.hides and not turn.has_images for turn in later)
            and not any(turn.mask == "none" and self.side != "none" for turn in self.turns)
            and not (self.side == "right" and self.mode != "call" and self.ends_in_image_of_axes)
        )

    @property
    def ends_in_image_of_axes(self) -> bool:
        """Whether later tokens stand behind the image's last token in `generate`, but behind all of it elsewhere."""
        return MODELS[self.model].axes > 1 and any(row and row[-1][0] == "i" for row in self.turns[0].layouts)

    @property
    def is_plain_in_four_dimensions(self) -> bool:
        """Whether masks of four dimensions give the padding, and the tokens that every layer sees."""
        return self.model not in ("aya_vision", "qwen3_5") and not (self.seed % 2 and self.side == "right")

    @property
    def decoder(self):
        return decoder_of(load(self.model, torch.float32, "unrouted"))

    @classmethod
    def sample(cls, seed: int) -> Case:
        return Sampler(seed).case()


class Sampler:
    """Draws a case from a seed."""

    def __init__(self, seed: int):
        self.seed = seed
        self.random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def of(self, weights: dict):
        return self.random.choices(list(weights), list(weights.values()))[0]

    def case(self) -> Case:
        model = self.of({"llava": 30, "qwen2_5_vl": 26, "qwen3_vl": 24, "qwen3_5": 8, "aya_vision": 12})
        mode = self.of({"call": 72, "greedy": 10, "lookup": 4, "chunks": 2, "beams": 4, "static": 4, "no cache": 4})
        reduces = MODELS[model].reducer is not None and self.chance(0.1)
        ranking = self.of({number: 4 if number == 0 else 1 for number in range(len(RANKINGS))})
        case = Case(
            self.seed,
            model,
            self.of({"float32": 84, "bfloat16": 8, "float16": 8}),
            # Not by Qwen's models, and wrong on a static cache.
            self.of(
                {"sdpa": 66, "eager": 30, "flex_attention": 4 * (not model.startswith("qwen") and mode != "static")}
            ),
            self.stages(model, reduces or RANKINGS[ranking].layer == "previous"),
            self.of({"reroute": 1, "remove": 1}),
            ranking,
            self.of({"original": 4, "contiguous": 1}),
            reduces,
            # Without a cache `generate` goes on from the positions of padding.
            self.of({"left": 5, "right": 2 * (mode != "no cache"), "none": 4}),
            "default",
            mode,
        )
        case = replace(case, own=self.rankings(case.stages))
        if mode == "call":
            static = 2 * (case.attention != "flex_attention")
            case = replace(case, cache=self.of({"default": 4, "dynamic": 4, "static": static, "off": 2}))
        batch = 1 if mode == "lookup" or self.chance(0.4) else self.random.randint(2, 3)
        turns = [self.prompt(case, batch)]
        # On a kept cache, assisted decoding of transformers reads the whole conversation again; a static one is full.
        ends = case.cache == "off" or mode in ("no cache", "lookup", "static")
        for _ in range(0 if ends else self.of({0: 4, 1: 3, 2: 3} if mode == "call" else {0: 2, 1: 1})):
            turns.append(self.later(case, batch, turns))
        # By a draw of its own, so that the other parts of a case stay what they were.
        draw = random.Random(1_000_000 + self.seed).random()
        align = ("stage" if draw < 0.15 else "proxy") if case.action == "reroute" and draw < 0.3 else None
        freezes = draw > 0.8 and case.positions == "original" and case.model in ("llava", "qwen2_5_vl", "qwen3_vl")
        action = "freeze" if freezes else case.action
        recycle = (0.3 if draw < 0.3 else 1.0) if action == "remove" and draw < 0.5 else 0.0
        return replace(case, turns=tuple(turns), align=align, action=action, recycle=recycle)

    def stages(self, model: str, after_first: bool) -> tuple[tuple[int, float], ...]:
        kinds = layer_types(decoder_of(load(model, torch.float32, "unrouted")))
        layers = [number for number, kind in enumerate(kinds) if kind == "full_attention" and number >= after_first]
        if not self.chance(0.2):
            layers = [number for number in layers if number > 1] or layers
        layers = sorted(self.random.sample(layers, self.random.randint(1, min(3, len(layers)))))
        keeps_all = self.chance(0.25)
        return tuple((layer, 1.0 if keeps_all else self.random.choice([0.05, 0.2, 0.35, 0.5, 1.0])) for layer in layers)

    def rankings(self, stages: tuple[tuple[int, float], ...]) -> tuple[int | None, ...]:
        """Those of stages; drawn apart, so that all else is as without them."""
        apart = random.Random(f"rankings {self.seed}")
        if apart.random() > 0.25:
            return ()
        first = [None, *(number for number, ranking in enumerate(RANKINGS) if getattr(ranking, "layer", "") == "this")]
        every = [None, *range(len(RANKINGS))]
        return tuple(apart.choice(every if layer else first) for layer, _ in stages)

    def layout(self, images: int, longest: int = 12) -> Layout:
        """Text and images in any order; two texts do not follow on each other."""
        parts = [f"i{self.random.randint(0, 1)}" for _ in range(images)]
        for place in reversed(range(images + 1)):
            if self.chance(0.7) or not images:
                parts.insert(place, f"t{self.random.randint(1, longest)}")
        if parts[-1][0] == "i" and not self.chance(0.3):
            parts.append(f"t{self.random.randint(1, longest)}")
        return tuple(parts)

    def with_holes(self, layout: Layout) -> Layout:
        """With masked tokens behind the first token and before the last segment."""
        if len(layout) < 2:
            return layout
        hidden = f"m{self.random.randint(1, 4)}" if self.chance(0.7) else "x0"
        place = self.random.randint(1, len(layout) - 1)
        return (*layout[:place], hidden, *layout[place:])

    def layouts(self, case: Case, batch: int, images: dict[int, int]) -> tuple[Layout, ...]:
        if case.side == "none":
            layout = list(self.layout(self.of(images)))
            shuffled = [tuple(layout)]
            for _ in range(batch - 1):
                # As long as the first one, whatever the order; a family may begin and end images with tokens of text.
                if not case.model.startswith("qwen"):
                    self.random.shuffle(layout)
                shuffled.append(tuple(layout))
            return tuple(shuffled)
        return tuple(self.layout(self.of(images)) for _ in range(batch))

    def mask(self, case: Case, needed: bool) -> str:
        if case.mode != "call":
            return "2d"
        masks = {"none": 4, "2d": 6, "4d bool": 2, "4d additive": 2}
        masks |= {"packed bool": 0.4, "packed additive": 0.4, "bidirectional": 0.3}
        if case.attention != "sdpa":  # masks are added to scores, so that boolean ones have no effect
            masks["4d bool"] = masks["packed bool"] = masks["bidirectional"] = 0
        if case.model == "aya_vision":  # one mask does not fit the caches of both kinds of layers
            masks = {name: weight / (1 if name in ("none", "2d") else 4) for name, weight in masks.items()}
        if needed:
            masks["none"] = 0
        return self.of(masks)

    def positions(self, case: Case, are_of_images: bool, before: str = "none") -> str:
        if case.mode != "call":
            return "none"
        shifts = {} if case.positions == "contiguous" else {"shifted": 2, "packed": 0.7}
        if MODELS[case.model].axes > 1 and before != "none":  # which the model has not noted
            return self.of({"given": 6} | shifts)
        # Families that take positions from images do so of a prompt, and not under masks of four dimensions.
        needed = MODELS[case.model].axes > 1 and are_of_images
        return self.of({"none": 0.5 if needed else 8, "given": 6} | shifts)

    def prompt(self, case: Case, batch: int) -> Turn:
        layouts = self.layouts(case, batch, {0: 1, 1: 5, 2: 2, 3: 0.5})
        if self.chance(0.12):
            layouts = tuple(map(self.with_holes, layouts))
        if batch > 1 and case.side != "none" and self.chance(0.05) and case.mode == "call":
            layouts = (*layouts[:-1], ())
        turn = Turn(layouts)
        mask = self.mask(case, case.side != "none" or turn.has_holes)
        positions = self.positions(case, mask not in ("none", "2d"))
        embeds = case.mode == "call" and self.chance(0.1)
        if embeds and MODELS[case.model].axes > 1 and positions == "none":
            positions = "given"
        return replace(turn, mask=mask, positions=positions, embeds=embeds)

    def later(self, case: Case, batch: int, turns: list[Turn]) -> Turn:
        kind = self.of({"token": 3, "tokens": 3, "text": 3, "image": 3 if case.mode == "call" else 0})
        if kind == "image":
            layouts = self.layouts(case, batch, {1: 4, 2: 1})
        elif kind == "text" and case.side != "none" and (case.mode == "call" or case.side == "left"):
            layouts = tuple(self.layout(0, 6) for _ in range(batch))
            if batch > 1 and case.mode == "call" and self.chance(0.2):
                layouts = (*layouts[:-1], ())
        else:
            layouts = ((f"t{1 if kind == 'token' else self.random.randint(2, 5)}",),) * batch
        padded = case.side != "none" or any(turn.has_holes for turn in turns)
        mask = self.mask(case, padded)
        if mask.startswith("packed") and layouts[0] == ("t1",):  # hides everything else
            mask = "2d"
        hides = self.random.choice([0.05, 0.3, 1.0]) if mask != "none" and self.chance(0.2) else 0.0
        if mask.startswith("packed"):
            hides = 0.0  # of two tokens that see no others, the first may be padding
        are_of_images = kind == "image" or mask not in ("none", "2d")
        positions = self.positions(case, are_of_images, turns[0].positions)
        return Turn(layouts, mask, positions, hides if case.mode == "call" else 0.0)


# Parts of a case


class Talk:
    """The tensors of a case. Columns count the tokens of the conversation, padding included."""

    def __init__(self, case: Case):
        self.case = case
        self.axes = MODELS[case.model].axes
        self.generator = torch.Generator().manual_seed(case.seed)
        self.few_words = case.mode == "lookup"  # so that the earlier text is guessed again
        rows = [[self._tokens(layout) for layout in turn.layouts] for turn in case.turns]
        self.samples = rows  # [turn][sample] (ids, valid, features of images that are seen, of all)
        self.ids, self.valid = zip(*(self._padded(turn) for turn in rows), strict=True)
        self.ends = torch.tensor([ids.shape[1] for ids in self.ids]).cumsum(0).tolist()
        self.batch = len(rows[0])

    def begin(self, number: int) -> int:
        return self.ends[number - 1] if number else 0

    def _tokens(self, layout: Layout):
        name, generator = self.case.model, self.generator
        ids, valid, features = [], [], []
        for place, segment in enumerate(layout):
            size, seen = int(segment[1:]), segment[0] in "ti"
            if segment[0] in "tm":
                part = torch.randint(3, 6 if self.few_words else 400, (size,), generator=generator)
            else:
                part = torch.full((count(name, size),), IMAGE)
                features.append((seen, picture(name, size, generator)))
                if name.startswith("qwen"):
                    end = [VISION_END] if place + 1 < len(layout) else []
                    part = torch.tensor([VISION_START, *part.tolist(), *end])
            ids.append(part)
            valid.append(torch.full_like(part, seen, dtype=torch.bool))
        empty = torch.empty(0, dtype=torch.int64)
        return torch.cat([empty, *ids]), torch.cat([empty.bool(), *valid]), features

    def _padded(self, rows) -> tuple[Tensor, Tensor]:
        length = max(len(ids) for ids, _, _ in rows)
        ids, valid = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.bool)
        for row, (own, seen, _) in enumerate(rows):
            columns = slice(0, len(own)) if self.case.side == "right" else slice(length - len(own), length)
            ids[row, columns], valid[row, columns] = own, seen
        return ids, valid

    def visual(self, number: int) -> Tensor:
        """(B, L) bool, the visual tokens of a turn that are seen."""
        return (self.ids[number] == IMAGE) & self.valid[number]

    def features(self, number: int, row: int | None = None) -> dict[str, Tensor]:
        """Features of all samples; or of one, without the images that its mask hides."""
        rows = self.samples[number] if row is None else [self.samples[number][row]]
        pictures = [each for _, _, features in rows for seen, each in features if seen or row is None]
        names = sorted({name for each in pictures for name in each})
        joined = {name: torch.cat([each[name] for each in pictures]) for name in names}
        return {name: self._cast(value) for name, value in joined.items()}

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(getattr(torch, self.case.dtype)) if value.is_floating_point() else value

    def columns(self, row: int, end: int) -> Tensor:
        """Columns of a sample's tokens."""
        return torch.cat(self.valid, dim=1)[row, :end].nonzero().flatten()

    def hidden(self, number: int) -> Tensor:
        """(B, T) bool, earlier tokens that the mask of a turn hides."""
        begin, turn = self.begin(number), self.case.turns[number]
        draw = torch.rand(self.batch, begin, generator=torch.Generator().manual_seed(self.case.seed + number))
        hidden = (draw < turn.hides) & torch.cat(self.valid, dim=1)[:, :begin]
        if self.case.side == "right" or self.case.positions == "contiguous":
            hidden[:, self.ends[0] :] = False  # later tokens are counted here, without hidden ones
        return torch.nn.functional.pad(hidden, (0, self.ids[number].shape[1]))

    def padding_mask(self, number: int) -> Tensor:
        """(B, T) bool."""
        return torch.cat(self.valid, dim=1)[:, : self.ends[number]] & ~self.hidden(number)

    def causal(self, number: int) -> Tensor:
        """(B, Q, T) bool."""
        queries, total = self.ids[number].shape[1], self.ends[number]
        causal = torch.ones(queries, total, dtype=torch.bool).tril(total - queries)
        return causal & self.padding_mask(number)[:, None]

    def seen(self, number: int) -> Tensor:
        """(B, Q, T) bool, the mask of a turn."""
        turn, seen, queries = self.case.turns[number], self.causal(number), self.ids[number].shape[1]
        begin, total = self.begin(number), self.ends[number]
        if turn.mask.startswith("packed"):
            block = torch.arange(total) >= begin + queries // 2
            return seen & (block[begin:, None] == block)
        if turn.mask == "bidirectional":
            return self.padding_mask(number)[:, None].expand_as(seen)
        return seen

    def is_causal(self, number: int) -> bool:
        """Whether every token sees all tokens before it, except those hidden from all of them."""
        differs = (self.seen(number) ^ self.causal(number)) & self.valid[number][:, :, None]
        return not bool(differs.any())

    def mask(self, number: int) -> Tensor | None:
        turn = self.case.turns[number]
        if turn.mask == "none":
            return None
        if turn.mask == "2d":
            return self.padding_mask(number).long()
        seen = self.seen(number)[:, None]
        if self.case.seed % 2 and not self._ends_in_one_padding(number):  # rows of padding see themselves
            own = torch.eye(seen.shape[2], dtype=torch.bool)
            seen = seen | torch.nn.functional.pad(own, (seen.shape[3] - seen.shape[2], 0))
        if self.case.cache == "static":
            seen = torch.nn.functional.pad(seen, (0, self.room - seen.shape[3]))
        if turn.mask.endswith("additive"):
            dtype = getattr(torch, self.case.dtype)
            return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return seen

    def _ends_in_one_padding(self, number: int) -> bool:
        """Whether a row ends in a single padding, which cannot be told from a token if it sees itself."""
        valid = self.valid[number]
        before = valid[:, -2] if valid.shape[1] > 1 else torch.ones(len(valid), dtype=torch.bool)
        return bool((~valid[:, -1] & before).any())

    @property
    def room(self) -> int:
        """Slots of a static cache."""
        return self.ends[-1] + 3

    @cached_property
    def _counted(self) -> Tensor:
        """(axes, B, T), positions of the conversation as its processor and `generate` would give them."""
        valid, core = torch.cat(self.valid, dim=1), load(self.case.model, torch.float32, "slow way").model
        places = (valid.long().cumsum(dim=1) - 1).clamp(min=0).expand(self.axes, -1, -1).clone()
        if self.axes == 1:
            return places
        for row in range(self.batch):
            ids = torch.cat(self.ids, dim=1)[row, valid[row]][None]
            grids = [self.features(number, row).get("image_grid_thw") for number in range(len(self.ids))]
            grids = [grid for grid in grids if grid is not None]
            if grids:
                arguments = {"image_grid_thw": torch.cat(grids), "mm_token_type_ids": (ids == IMAGE).long()}
                places[:, row, valid[row]] = core.get_rope_index(ids, **arguments)[0][:, 0]
        return places

    def position_ids(self, number: int) -> Tensor | None:
        """(B, L) or (3, B, L)."""
        kind, begin, end = self.case.turns[number].positions, self.begin(number), self.ends[number]
        if kind == "none":
            return None
        places = self._counted[..., begin:end]
        if kind == "shifted":
            places = places + 5
        if kind == "packed":
            places = torch.arange(end - begin)
            places = torch.where(places < len(places) // 2, places, places - len(places) // 2)
            places = places.expand(self.axes, self.batch, -1)
        return places if self.axes > 1 else places[0]

    def arguments(self, number: int, model) -> dict[str, object]:
        """Arguments of the model for a turn."""
        turn, ids = self.case.turns[number], self.ids[number]
        arguments = {"attention_mask": self.mask(number), "position_ids": self.position_ids(number)}
        arguments = {name: value for name, value in arguments.items() if value is not None} | self.features(number)
        if turn.embeds:
            return arguments | {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
        if self.axes > 1 and "position_ids" not in arguments and not number:
            arguments["mm_token_type_ids"] = (ids == IMAGE).long()
        return arguments | {"input_ids": ids}


# Runs


class Watch:
    """Records the inputs of the decoder: lengths in its layers, and positions.

    Args:
        model: to look at; its hooks are there already.
    """

    def __init__(self, model, routing=None):
        self.model, self.routing = model, routing
        self.decoder = decoder_of(model)
        self.lengths: list[int] = []  # in the layers of the latest call
        self.positions: Tensor | None = None  # (axes, B, L)

    def __enter__(self) -> Watch:
        def begin(*_):
            self.lengths = []
            self.trace = self.routing and self.routing.trace

        def enter(layer, args, kwargs):
            self.lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

        def rotate(module, args, kwargs):
            if self.positions is None:
                places = args[1] if len(args) > 1 else kwargs["position_ids"]
                self.positions = places if places.ndim == 3 else places[None]

        def end(*_):
            if self.routing and self.routing.trace is not self.trace:
                self.check_lengths()

        self.handles = [
            self.model.model.register_forward_pre_hook(begin, prepend=True),
            self.model.model.register_forward_hook(end),
            *(layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self.decoder.layers),
            self.decoder.rotary_emb.register_forward_pre_hook(rotate, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()

    def check_lengths(self) -> None:
        trace, expected = self.routing.trace, [None] * len(self.decoder.layers)
        stages = ([trace.reduction] if trace.reduction else []) + trace.stages
        for stage in stages:
            expected[stage.layer :] = [stage.tokens] * (len(expected) - stage.layer)
        expected = [trace.length if length is None else length for length in expected]
        assert self.lengths == expected, "the layers have not seen what the trace says"


@dataclass
class Answer:
    """Result of a turn."""

    logits: Tensor
    """(B, L, vocabulary) of a call, (B, steps, vocabulary) of `generate`."""
    cache: object
    positions: Tensor | None = None
    sequences: Tensor | None = None
    trace: object = None


class Failed(Exception):
    """A call that raised, after how many layers."""

    def __init__(self, error: Exception, layers: int):
        super().__init__(f"{type(error).__name__}: {error}")
        self.error, self.layers = error, layers


GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": [IMAGE, VIDEO, VISION_START, VISION_END],
}
GENERATE = {
    "lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": 511},
    "chunks": {"prefill_chunk_size": 8},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@torch.no_grad()
def talk_to(model, talk: Talk, turns: int, routing=None) -> tuple[list[Answer], Failed | None]:
    """The answers of a model to the turns of a case, until one raises."""
    case, answers = talk.case, []
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    # The oldest transformers asks the static cache of a refused call for a value that its first layer would have set.
    vars(model).pop("_cache", None)
    past = None
    if case.cache in ("dynamic", "static"):
        config = model.config.get_text_config()
        static = {"max_cache_len": talk.room}
        kinds = set(layer_types(case.decoder))
        past = transformers.DynamicCache(config=None if kinds == {"full_attention"} else config)
        if case.cache == "static":
            past = transformers.StaticCache(config, **static)
    for number in range(turns):
        if routing:
            routing.trace = None
        with Watch(model, routing) as watch:
            try:
                answer = (take_turn if case.mode == "call" else generate_turn)(model, talk, number, past, answers)
            except AssertionError:
                raise
            except Exception as error:
                return answers, Failed(error, len(watch.lengths))
        answer.positions, answer.trace, past = watch.positions, routing and routing.trace, answer.cache
        answers.append(answer)
    return answers, None


def take_turn(model, talk: Talk, number: int, past, answers: list[Answer]) -> Answer:
    arguments = talk.arguments(number, model)
    if past is not None:
        arguments["past_key_values"] = past
    if talk.case.cache == "off":
        arguments["use_cache"] = False
    output = model(**arguments)
    return Answer(output.logits, cache_of(output))


def generate_turn(model, talk: Talk, number: int, past, answers: list[Answer]) -> Answer:
    """The whole conversation, with the text generated in between, on the cache of the turn before."""
    valid, ids = talk.valid[number], talk.ids[number]
    arguments = talk.features(number)
    if answers:
        ids = torch.cat([answers[-1].sequences, ids], dim=1)
        before = answers[-1].valid
        valid = torch.cat([before, torch.ones_like(ids[:, before.shape[1] : -valid.shape[1]]).bool(), valid], dim=1)
        arguments["past_key_values"] = past
    if talk.axes > 1:
        arguments["mm_token_type_ids"] = (ids == IMAGE).long()
    settings = {**GREEDY, **GENERATE.get(talk.case.mode, {})}
    if answers:
        settings.pop("cache_implementation", None)  # of the cache that is given
    output = model.generate(input_ids=ids, attention_mask=valid.long(), **arguments, **settings)
    answer = Answer(torch.stack(output.logits, dim=1), cache_of(output), sequences=output.sequences)
    answer.valid = valid
    return answer


def empty_cache(name: str, model):
    """A dynamic cache; None for recurrent states before transformers 5.6, whose own is made by the first call."""
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    return None if name == "qwen3_5" and not hasattr(cache, "has_previous_state") else cache


class Alone:
    """A conversation's sample by itself, done the slow way on a dynamic cache."""

    def __init__(self, talk: Talk, row: int):
        self.talk, self.row, self.case = talk, row, talk.case
        self.model = load(self.case.model, torch.float32, "slow way")
        self.slow = SlowWay(self.model, replace(self.case.policy, reducer=None))
        self.slow.beside_images = bool(talk.visual(0).any())
        self.rows: list[Tensor | None] = []  # of each turn, the tokens of `logits`: columns of the conversation
        self.logits: list[Tensor | None] = []
        self.selected: list[list[list[int]]] = []  # columns, [turn][stage]
        self.scores: list[list[dict[int, float]]] = []
        self.sequences: list[Tensor] = []
        self.columns = torch.empty(0, dtype=torch.int64)  # of the tokens that ran
        self.survivors: list[tuple[list[int], dict]] = []  # columns that a reducer left, of those that it was given

    def note(self, columns: Tensor, routes: bool) -> None:
        self.selected.append([columns[stage].tolist() for stage in self.slow.selected] if routes else [])
        self.scores.append(self.slow.scores if routes else [])

    @torch.no_grad()
    def calls(self, positions: list[Tensor]) -> None:
        """Turns as plain calls; positions (axes, L) of each."""
        talk, row = self.talk, self.row
        past = empty_cache(self.case.model, self.model)
        with self.slow:
            for number, places in enumerate(positions):
                begin = talk.begin(number)
                valid = talk.valid[number][row]
                if not valid.any():
                    for each in (self.rows, self.logits):
                        each.append(None)
                    self.note(self.columns, False)
                    continue
                ids = talk.ids[number][row, valid][None]
                here, visual = begin + valid.nonzero().flatten(), ids[0] == IMAGE
                places = places[:, valid][:, None]
                arguments = {"input_ids": ids, **talk.features(number, row)}
                if self.case.reduces and visual.any():
                    here, arguments, places = self.reduced(arguments, here, places)
                if self.case.reduces and self.case.positions == "contiguous" and any(self.selected):
                    places = past.get_seq_length() + torch.arange(places.shape[2]).expand_as(places)
                arguments["position_ids"] = places if talk.axes > 1 else places[0]
                self.columns = torch.cat([self.columns, here])
                self.slow.hidden = talk.hidden(number)[row, self.columns].nonzero().flatten()
                output = self.model(**arguments, past_key_values=past, use_cache=True)
                past = cache_of(output)
                self.rows.append(here)
                self.logits.append(output.logits[0])
                self.note(self.columns, bool(visual.any()))

    def reduced(self, arguments, columns, places):
        reducer, ids = self.case.policy.reducer, arguments["input_ids"]
        inputs = {**arguments, "mm_token_type_ids": (ids == IMAGE).long()}

        def distance(grid):
            return reducer.distance * sum((size + size % 2 - 1) ** 2 for size in grid) ** 0.5

        by_hand, visual, kept, _ = reduced_prompt(
            self.model,
            inputs,
            lambda tokens: rounded_up(tokens, reducer.keep),
            reducer.per_cell,
            distance,
            reducer.quantile,
            reducer.keeps_own,
        )
        self.slow.visual, self.slow.total_before = visual, int((ids == IMAGE).sum())
        self.survivors.append((columns[kept][visual].tolist(), inputs))
        places = places[:, :, kept]
        if self.case.positions == "contiguous":  # from the first layer on
            places = torch.arange(len(kept)).expand_as(places)
        return columns[kept], {"inputs_embeds": by_hand["inputs_embeds"]}, places

    @torch.no_grad()
    def generates(self, turns: int) -> None:
        """Turns through `generate`, as many beams as the case has."""
        talk, row, past = self.talk, self.row, None
        kept = ("num_beams", "use_cache", "eos_token_id")  # all other parts of a mode are done the plain way
        settings = {name: value for name, value in GENERATE.get(self.case.mode, {}).items() if name in kept}
        with self.slow:
            for number in range(turns):
                ids = talk.ids[number][row, talk.valid[number][row]][None]
                if number:
                    ids = torch.cat([self.sequences[-1], ids], dim=1)
                arguments = {"past_key_values": past} if past is not None else {}
                if talk.axes > 1:
                    arguments["mm_token_type_ids"] = (ids == IMAGE).long()
                mask = torch.ones_like(ids)
                features = talk.features(number, row)
                output = self.model.generate(
                    input_ids=ids, attention_mask=mask, **features, **arguments, **{**GREEDY, **settings}
                )
                past = cache_of(output)
                self.sequences.append(output.sequences)
                self.logits.append(torch.stack(output.logits, dim=1))
                self.note(talk.columns(row, talk.ends[number]), not number and bool(self.slow.selected))


# Judgement


class TooClose(Exception):
    """Two scores that are nearly equal: any rounding decides between them."""


def check_selection(case: Case, alone: Alone, number: int, trace, row: int, last: int | None) -> None:
    """The same tokens as by the slow way, which leaves out a visual token that is the prompt's last."""
    assert len(trace.stages) == len(case.stages)
    stages = alone.selected[number] or [[]] * len(trace.stages)
    for place, (stage, expected) in enumerate(zip(trace.stages, stages, strict=True)):
        actual = [column for column in stage.selected[row].tolist() if column != last]
        if actual == expected:
            continue
        scores = sorted(alone.scores[number][place].values(), reverse=True) if alone.scores[number] else []
        assert len(actual) == len(expected) < len(scores), f"sample {row} selects {actual}, not {expected}"
        largest = max(map(abs, scores))
        assert scores[0] - scores[-1] > 1e-3 * largest, "the ranking does not tell tokens from each other"
        assert scores[len(expected) - 1] - scores[len(expected)] < 2e-5 * largest, (
            f"sample {row} selects {actual} at layer {stage.layer}, not {expected}"
        )
        raise TooClose


def check_survivors(alone: Alone, actual: list[int]) -> None:
    """The same tokens as by hand are left by a reducer."""
    expected, inputs = alone.survivors[0]
    if actual != expected:
        assert has_equal_saliencies(alone.model, inputs), f"a reducer leaves {actual}, not {expected}"
        raise TooClose


def expected_positions(talk: Talk, unrouted: list[Answer]) -> list[Tensor]:
    """(axes, B, L) of each turn: the unrouted model's, or counted behind a prompt that is padded on the right."""
    found = [answer.positions.expand(-1, talk.batch, -1) for answer in unrouted]
    routed = [number for number in range(len(found)) if talk.visual(number).any()]
    for number in range(1, len(found)):
        first = next((each for each in reversed(routed) if each < number), None)
        if first is None or number in routed or not is_right_padded(talk, first):
            continue
        for row in range(talk.batch):
            before = torch.cat([each[:, row, talk.valid[turn][row]] for turn, each in enumerate(found[: first + 1])], 1)
            later = torch.cat(talk.valid[first + 1 : number + 1], dim=1)[row]
            places = int(before.max()) + later.cumsum(0) if before.numel() else later.cumsum(0) - 1
            found[number] = found[number].clone()
            found[number][:, row] = places[-found[number].shape[2] :]
    return found


def is_right_padded(talk: Talk, number: int) -> bool:
    valid = talk.valid[number]
    return bool((~valid[:, -1] & valid.any(dim=1)).any())


def check_counts(talk: Talk, number: int, trace) -> None:
    """A stage runs all text and as many visual tokens as the policy says."""
    visual, valid, policy = talk.visual(number), talk.valid[number], talk.case.policy
    if talk.case.mode == "no cache":  # every step is a prompt of its own
        return
    beams = len(trace.visual_counts) // talk.batch
    assert trace.visual_counts == visual.sum(dim=1).repeat_interleave(beams).tolist()
    rows = []
    for row in range(talk.batch):
        places = valid[row].nonzero().flatten()
        ends_in_image = len(places) > 0 and bool(visual[row, places[-1]])
        total = int(visual[row].sum())
        pool = total - ends_in_image
        if policy.reducer is not None:
            images = [segment for segment in talk.case.turns[number].layouts[row] if segment[0] == "i"]
            pool = sum(policy.reducer.survivors(count(talk.case.model, int(image[1:]))) for image in images)
            pool -= ends_in_image
        counts = policy.selected_counts(total, pool)
        selected = [len(stage.selected[row * beams]) for stage in trace.stages]
        assert selected == [each + ends_in_image for each in counts]
        rows.append([len(places) - total + ends_in_image + each for each in counts])
    guessed = trace.length - valid.shape[1]
    assert guessed == 0 or talk.case.mode == "lookup"
    assert [stage.tokens - guessed for stage in trace.stages] == [max(stage) for stage in zip(*rows, strict=True)]


def near(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=0)


def check_generated(answer: Answer, row: int, alone: Alone, number: int, rows: int) -> None:
    """Logits and tokens, up to the first step at which two tokens are nearly equal."""
    expected, steps = alone.logits[number], alone.logits[number].shape[1]
    tokens = alone.sequences[number][0, -steps:].tolist()
    actual_tokens = answer.sequences[row, -steps:].tolist()
    if alone.case.mode == "beams":
        near(answer.logits[rows * row, 0], expected[0, 0])
        best = expected[0, 0].topk(3).values
        assert actual_tokens == tokens or bool((best.diff().abs() < 2e-4).any()), (actual_tokens, tokens)
        return
    assert answer.logits.shape[1] == steps
    for step in range(steps):
        near(answer.logits[row, step], expected[0, step])
        if actual_tokens[step] != tokens[step]:
            best = expected[0, step].topk(2).values
            assert best[0] - best[1] < 2e-4, f"step {step}: {actual_tokens} instead of {tokens}"
            raise TooClose


def check_refusal(case: Case, failed: Failed) -> None:
    error, message = failed.error, str(failed.error)
    assert isinstance(error, (NotImplementedError, ValueError, TypeError)), f"another error: {failed}"
    assert " must " in message, f"does not name what is accepted: {failed}"
    assert "got " in message, f"does not name what came: {failed}"
    assert not failed.layers, f"refused after {failed.layers} layers: {failed}"
    assert not case.is_plain, f"refused without need: {failed}"


def is_weak(talk: Talk) -> bool:
    """Whether only counts can be compared: in half precision, and if layers count masked tokens between others."""
    case = talk.case
    if case.dtype != "float32":
        return True
    if set(layer_types(case.decoder)) == {"full_attention"}:
        return False
    if any(turn.mask not in ("none", "2d") for turn in case.turns):  # the model's in all layers, without windows
        return True
    valid = torch.cat(talk.valid, dim=1)
    columns = [talk.columns(row, talk.ends[-1]) for row in range(talk.batch)]
    return any(len(own) and bool((~valid[row, own[0] :]).any()) for row, own in enumerate(columns))


def run(case: Case) -> str:
    """Judge a case: "equal", "refused", "not offered", "text only" or "too close"."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if case.attention == "flex_attention":
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            return judge(Talk(case))
        except TooClose:
            return "too close"


def judge(talk: Talk) -> str:
    case, dtype = talk.case, getattr(torch, talk.case.dtype)
    unrouted_model, model = (load(case.model, dtype, role) for role in ("unrouted", "routed"))
    for each in (unrouted_model, model):
        decoder_of(each).config._attn_implementation = case.attention
    unrouted, not_offered = talk_to(unrouted_model, talk, len(case.turns))
    try:
        routing = rk.apply(model, case.policy)
    except (NotImplementedError, ValueError, TypeError) as error:
        check_refusal(case, Failed(error, 0))
        return "refused"
    with routing:
        routed, failed = talk_to(model, talk, len(unrouted), routing)
    if failed is not None:
        check_refusal(case, failed)
    unrouted = unrouted[: len(routed)]
    routes = check_traces(talk, unrouted, routed)
    if routes:
        check_all_kept(talk, unrouted, routed)
        check_alone(talk, unrouted, routed)
    if failed is not None:
        return "refused"
    if not_offered is not None:
        return "not offered"
    return "equal" if routes else "text only"


def check_traces(talk: Talk, unrouted: list[Answer], routed: list[Answer]) -> bool:
    """Turns with images are routed, and text before them is left alone; whether any was routed."""
    routes = False
    for number, answer in enumerate(routed):
        if routes or talk.visual(number).any():
            assert talk.is_causal(number), "a mask that is not causal is routed"
        if not talk.visual(number).any():
            assert answer.trace is None
            if not routes:
                assert torch.equal(answer.logits, unrouted[number].logits), "text without images is not left alone"
            continue
        routes = True
        assert answer.trace is not None, "unrouted in silence"
        check_counts(talk, number, answer.trace)
    return routes


def check_all_kept(talk: Talk, unrouted: list[Answer], routed: list[Answer]) -> None:
    """A policy that keeps everything equals the unrouted model."""
    case = talk.case
    right_padded = False
    for number, (answer, expected) in enumerate(zip(routed, unrouted, strict=True)):
        if case.dtype != "float32":
            seen = answer.logits[talk.valid[number]] if case.mode == "call" else answer.logits
            assert seen.isfinite().all()
        generated_behind_padding = case.mode != "call" and is_right_padded(talk, number)
        if case.keeps_all and not right_padded and not generated_behind_padding:
            if case.mode == "call":
                valid = talk.valid[number]
                check_rounding(talk, answer.logits[valid], expected.logits[valid], number)
            elif case.dtype == "float32":
                near(answer.logits[:, 0], expected.logits[:, 0])
        # Later positions are counted from the last token there.
        right_padded = right_padded or is_right_padded(talk, number)


def check_rounding(talk: Talk, actual: Tensor, expected: Tensor, number: int) -> None:
    if talk.case.dtype == "float32":
        return near(actual, expected)
    precise = Talk(replace(talk.case, dtype="float32"))
    model = load(talk.case.model, torch.float32, "unrouted")
    decoder_of(model).config._attn_implementation = talk.case.attention
    answers, _ = talk_to(model, precise, number + 1)
    rounding = (answers[number].logits[talk.valid[number]] - expected.float()).abs().max()
    return near(actual, expected, atol=2 * float(rounding))


def check_alone(talk: Talk, unrouted: list[Answer], routed: list[Answer]) -> None:
    """Every sample equals itself alone, done the slow way."""
    case = talk.case
    if is_weak(talk) or (case.reduces and case.mode != "call"):
        return
    positions = expected_positions(talk, unrouted) if case.mode == "call" else None
    for row in range(talk.batch):
        alone = Alone(talk, row)
        if case.mode == "call":
            alone.calls([each[:, row] for each in positions])
        else:
            alone.generates(len(routed))
        for number, answer in enumerate(routed):
            begin = talk.begin(number)
            if answer.trace is not None:
                check_trace(talk, alone, number, row, answer.trace)
            if case.mode != "call":
                check_generated(answer, row, alone, number, len(answer.logits) // talk.batch)
            elif alone.logits[number] is not None:
                actual, expected = answer.logits[row, alone.rows[number] - begin], alone.logits[number]
                if case.reduces:
                    near(actual, expected)
                elif (actual - expected).abs().max() > 1e-4:  # states that are carried along amplify rounding
                    near(actual, expected, 2 * rounding_of_batch(talk, unrouted, positions, row, number))


def check_trace(talk: Talk, alone: Alone, number: int, row: int, trace: rk.Trace) -> None:
    """A sample selects the same tokens as alone."""
    case, visual = talk.case, talk.visual(number)[row]
    last = talk.valid[number][row].nonzero().flatten()[-1:]
    ends_in_image = case.mode != "no cache" and len(last) and bool(visual[last])
    sample = row * (len(trace.visual_counts) // talk.batch)
    if case.reduces and visual.any():
        check_survivors(alone, trace.reduction.selected[sample].tolist())
    check_selection(case, alone, number, trace, sample, talk.begin(number) + int(last) if ends_in_image else None)


@torch.no_grad()
def rounding_of_batch(talk: Talk, unrouted: list[Answer], positions: list[Tensor], row: int, number: int) -> float:
    """How far the unrouted model's logits of a sample are from those of the sample alone."""
    model = load(talk.case.model, torch.float32, "unrouted")
    past, distances = empty_cache(talk.case.model, model), []
    for turn in range(number + 1):
        valid = talk.valid[turn][row]
        if valid.any():
            places = positions[turn][:, row, valid][:, None]
            output = model(
                input_ids=talk.ids[turn][row, valid][None],
                position_ids=places if talk.axes > 1 else places[0],
                past_key_values=past,
                use_cache=True,
                **talk.features(turn, row),
            )
            past = cache_of(output)
            distances.append((unrouted[turn].logits[row, valid] - output.logits[0]).abs().max())
    return float(max(distances))


# Tests

OUTCOMES: dict[int, str] = {}  # by seed, of the cases that ran in this process


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        first, cases = metafunc.config.getoption("fuzz_seed"), 2 * metafunc.config.getoption("fuzz_cases")
        metafunc.parametrize("seed", range(first, first + cases))


def test_case(seed):
    case = Case.sample(seed)
    try:
        OUTCOMES[seed] = run(case)
    except Exception as error:
        error.add_note(f"run({case!r})")
        raise


def test_cases_do_not_degenerate():
    """Of the first 300 every value of every axis occurs; of those that ran here, every outcome, and most are equal."""
    cases = [Case.sample(seed) for seed in range(300)]
    turns = [turn for case in cases for turn in case.turns]
    later = [turn for case in cases for turn in case.turns[1:]]
    layouts = [layout for turn in turns for layout in turn.layouts]
    for name, values in (("model", MODELS), ("cache", CACHES), ("mode", ("call", *MODES)), ("side", SIDES)):
        assert {getattr(case, name) for case in cases} == set(values)
    for name, values in (("mask", MASKS), ("positions", POSITIONS)):
        assert {getattr(turn, name) for turn in turns} == set(values)
        assert {getattr(turn, name) for turn in later} == set(values)
    for name in ("dtype", "attention", "action", "align", "recycle"):
        assert len({getattr(case, name) for case in cases}) == 3
    for name in ("positions", "reduces", "keeps_all", "is_plain"):
        assert len({getattr(case, name) for case in cases}) == 2
    assert {case.ranking for case in cases} == set(range(len(RANKINGS)))
    assert {number for case in cases for number in case.own} == {None, *range(len(RANKINGS))}
    assert any(len(set(case.own)) > 1 for case in cases)
    assert {len(case.turns) for case in cases} == {len(case.stages) for case in cases} == {1, 2, 3}
    assert {case.stages[0][0] for case in cases} == set(range(6))
    assert {len(turn.layouts) for turn in turns} == {1, 2, 3}
    assert {layout[end][0] for layout in layouts if layout for end in (0, -1)} == {"t", "i"}
    assert {segment[0] for layout in layouts for segment in layout} == set("timx")
    assert {sum(segment[0] == "i" for segment in layout) for layout in layouts} == {0, 1, 2, 3}
    assert () in layouts
    assert {turn.hides for turn in later} == {0.0, 0.05, 0.3, 1.0}
    assert any(turn.embeds for turn in turns)
    assert any(turn.has_images for turn in later)

    found = Counter(OUTCOMES.values())
    if found.total() < 200:
        pytest.skip("the cases ran elsewhere")
    assert set(found) <= {"equal", "refused", "not offered", "text only", "too close"}
    assert {"equal", "refused", "not offered", "text only"} <= set(found)
    assert found["equal"] > found.total() / 2, found
    assert found["refused"] < found.total() / 3, found
    assert found["not offered"] < found.total() / 10, found
    assert found["too close"] < found.total() / 100, found
