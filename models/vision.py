"""Reducers at work on a vision tower.

A dropped token is marked in its features, which become infinite; their signs spell the number of the routing. The mark
travels with them through `generate`, which may encode images before the prompt's call, through tiles that are cut, and
into the batch. It is not mistaken for the mark of another routing (numbers repeat after 65,536), nor for the infinities
of an overflow. Marked features never reach a decoder layer.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, repeat
from typing import TypeVar

import torch
from torch import Tensor, nn

from reroute_kernels import ops
from reroute_kernels.reducers import ReducerLike, VisionFeatures
from reroute_kernels.ref.rank import rotate_half

from . import refusals
from .checkpointing import checkpointed
from .modules import Module
from .offload import onloaded
from .prompt_text import PromptText
from .stack import calls_of, running

Value = TypeVar("Value")

# Routings with a reducer are numbered, in this many bits.
_BITS = 16
_numbers = cycle(range(2**_BITS))

# The reducer that is at work on a tower.
_reduced_towers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ReducedVision]] = weakref.WeakKeyDictionary()


class ReducedVision(ABC):
    """A reducer on the vision tower of one model.

    Args:
        adapter: of the model.
        reducer: the reducer.

    Attributes:
        fixed_arguments: arguments of the model, by name, with the values that they must have if they are given.

    Raises:
        NotImplementedError: this vision tower cannot be reduced.
    """

    model_types: tuple[str, ...] = ()
    """Types of models that it works on; none if any whose adapter names it."""

    def __init__(self, adapter, reducer: ReducerLike):
        self.fixed_arguments: dict[str, object] = {}
        self._adapter = adapter
        self._reducer = reducer
        self._number = next(_numbers)
        self._state = threading.local()  # of the images that are encoded; one call per thread
        self._kept_all: bool | Tensor = False  # not read from the device until a call asks
        # The text of the prompt whose images are encoded, if it is known; given by the routing.
        self.prompt_text: Callable[[], PromptText | None] = lambda: None
        # torch.compile must not trace it: it reads frames.
        self._running = torch.compiler.disable(partial(running, adapter.core))

    @property
    @abstractmethod
    def tower(self) -> Module:
        """The module that encodes images."""

    @property
    def kept_all(self) -> bool:
        """Whether the reducer ever left all tokens of some image."""
        return bool(self._kept_all)

    @abstractmethod
    def _install(self, add: Callable[[object], None]) -> None:
        """Register hooks, whose handles are given to `add`."""

    def install(self, add: Callable[[object], None]) -> None:
        """Register hooks, whose handles are given to `add`."""
        self._install(add)
        _reduced_towers[self.tower] = weakref.ref(self)

    def remove(self) -> None:
        """Let another routing reduce the tower."""
        _reduced_towers.pop(self.tower, None)

    def check_tower(self, present: ReducedVision | None) -> None:
        """Whether this reducer can work on the tower.

        Args:
            present: the reducer that it will replace, or None.

        Raises:
            ValueError: another model that shares the tower is routed with a reducer.
        """
        owner = _reduced_towers.get(self.tower, lambda: None)()
        if owner is not None and owner is not present:
            raise refusals.REDUCER_SHARED_TOWER.because(reducer=self._reducer)

    def check_arguments(self, arguments: dict) -> None:
        """Whether a call asks for the features that are reduced.

        Raises:
            NotImplementedError: it does not.
        """
        for name, expected in self.fixed_arguments.items():
            if arguments.get(name) not in (None, expected):
                raise refusals.FIXED_ARGUMENT.because(name=name, expected=expected, got=repr(arguments[name]))

    def _check_nesting(self) -> None:
        """Refuse to encode images while this tower encodes others, which a hook in it may ask for."""
        if getattr(self._state, "outputs", None) is not None and calls_of(self.tower) > 1:
            raise RuntimeError("images must not be encoded by a hook inside a vision tower whose features are reduced")

    def marks(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens are dropped.

        Args:
            embeds: (B, L, d), the decoder's input.

        Returns:
            (B, L) bool, marked by this routing; and (B, L) bool, marked by any.
        """
        marked = embeds.isinf().all(dim=-1)
        return marked & (embeds == self._mark(embeds)).all(dim=-1), marked

    def _mark(self, like: Tensor) -> Tensor:
        """(d,), infinities with the signs of the bits of the routing's number."""
        bits = torch.arange(like.shape[-1], device=like.device).clamp(max=_BITS)
        return (((self._number >> bits) & 1) * 2 - 1).to(like.dtype) * math.inf

    def _marked(self, features: Tensor, dropped: Tensor) -> Tensor:
        """The features (..., d), with the mark in place of dropped tokens (...)."""
        return torch.where(dropped[..., None], self._mark(features), features)

    def _reduced(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        """(T, N, d), the features with those of the survivors replaced; and (T, N) bool, the dropped tokens."""
        features = image.features
        shape = features.shape
        index, made = self._chosen(image)
        if index.ndim == 1:  # over all tokens, as if they were of one image
            index, made, features = index[None], made[None], features.flatten(0, 1)[None]
        rows = index[:, :, None].expand(-1, -1, shape[2])
        dropped = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device).scatter(1, index, False)
        dropped = dropped.view(shape[:2])
        self._kept_all = self._kept_all | (~dropped).all(dim=1).any()
        return features.scatter(1, rows, made).view(shape), dropped

    def _chosen(self, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        """The reducer's choice: (T, K) int64 and (T, K, d), or (M,) and (M, d).

        Raises:
            TypeError: it gives something else.
        """
        features = image.features
        count, tokens, channels = features.shape
        index, made = self._reducer.reduce(image)
        accepted = (
            isinstance(index, Tensor)
            and isinstance(made, Tensor)
            and index.dtype == torch.int64
            and made.dtype == features.dtype
            and made.shape == (*index.shape, channels)
            and (
                (index.ndim == 2 and index.shape[0] == count and 1 <= index.shape[1] <= tokens)
                or (index.ndim == 1 and 1 <= index.shape[0] <= count * tokens)
            )
        )
        if not accepted:
            raise TypeError(
                f"reducer must give ({count}, K) int64 tokens, K from 1 to {tokens}, and ({count}, K, {channels}) "
                f"{features.dtype} features, or (M,) int64 tokens over all {count} x {tokens}, M from 1, and "
                f"(M, {channels}) features; got {_described(index)} and {_described(made)} from {self._reducer!r}"
            )
        return index, made

    def _texts(self, images: Sequence[int], video: bool = False) -> tuple[Tensor, ...]:
        """The text of the row in which each image stands, (M, d).

        Args:
            images: how many placeholders each image or video of the encoder's call fills.
            video: whether they are videos.

        Raises:
            NotImplementedError: the text is not known.
        """
        prompt, config = self.prompt_text(), self._adapter.model.config
        if prompt is None:
            raise refusals.REDUCER_TEXT.because(got=f"{len(images)} without a prompt")
        rows = prompt.rows_of(images, config.video_token_id if video else config.image_token_id)
        if rows is None:
            raise refusals.REDUCER_TEXT.because(got=f"images of {list(images)} tokens for other placeholders")
        return prompt.embedded(rows, self._adapter.core.get_input_embeddings())

    def _note_output(self, layer: Module, args: tuple, output: Tensor | tuple) -> None:
        outputs = getattr(self._state, "outputs", None)
        if outputs is not None:  # else the layer runs again, for gradients
            outputs.append(_hidden(output))

    def _refuse(self, needed: str, got: object) -> Exception:
        return refusals.REDUCER_TOWER.because(needed=needed, got=got)


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _share_memory(tensor: Tensor, other: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _described(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


class ClipVision(ReducedVision):
    """CLIP towers before a projector (LLaVA-1.5, LLaVA-NeXT); the attention of the class token is the saliency.

    Base of the other towers of layers before a projector, which state what is different.
    """

    kind: str = "clip_vision_model"
    """Model type of the tower."""
    needed: str = "a class token, 'clip_vision_model'"
    """Of a refusal: the thing that a tower of another type lacks."""
    strategy: str = "default"
    """How the model selects features: `"default"` leaves the class token out."""
    class_tokens: int = 1
    """Tokens of a layer before the patches."""
    parts: tuple[str, str] = ("layer_norm1", "self_attn")
    """The norm and the attention of a layer."""

    def __init__(self, adapter, reducer: ReducerLike):
        super().__init__(adapter, reducer)
        kind = adapter.model.config.vision_config.model_type
        if kind != self.kind:
            raise self._refuse(self.needed, kind)
        self._layers = self._layers_of_tower()
        depth = len(self._layers)
        output = self._feature_layer()
        layer_idx = output if output >= 0 else output + depth + 1
        if not 1 <= layer_idx <= depth:
            raise self._refuse(f"a vision_feature_layer of 1 to {depth}", output)
        self._salient_layer = self._layers[layer_idx - 1]
        # Outputs 16 to 24 of 24 layers in Nüwa.
        self._compared_layers = self._layers[max(0, depth * 2 // 3 - 1) :]
        self._other_layers = [layer for layer in self._layers if layer is not self._salient_layer]

    def _feature_layer(self) -> int:
        """The output of the tower that becomes the features, counted as in the configuration."""
        config = self._adapter.model.config
        if config.vision_feature_select_strategy != self.strategy:
            which = "out of" if self.class_tokens else "in"
            raise self._refuse(
                f"vision_feature_select_strategy {self.strategy!r}, which leaves the first token {which} the features",
                config.vision_feature_select_strategy,
            )
        output = config.vision_feature_layer
        if not isinstance(output, int):
            raise self._refuse("one vision_feature_layer", output)
        self.fixed_arguments = {
            "vision_feature_layer": output,
            "vision_feature_select_strategy": self.strategy,
        }
        return output

    def _layers_of_tower(self) -> nn.ModuleList:
        wrapped: Module = getattr(self.tower, "vision_model", self.tower)  # transformers before 5.17 wraps it
        return wrapped.encoder.layers

    @property
    def tower(self) -> Module:
        return self._adapter.core.vision_tower

    @property
    def projector(self) -> Module:
        """The module that is handed the features."""
        return self._adapter.core.multi_modal_projector

    def _merge(self, states: Tensor) -> Tensor:
        """(T, N, d) of the patches (T, P, c) as the projector is handed them: merged patches beside each other."""
        return states

    def _install(self, add) -> None:
        add(self._layers[0].register_forward_pre_hook(self._begin))
        add(self._salient_layer.register_forward_pre_hook(self._note_input, with_kwargs=True))
        for layer in self._compared_layers:
            add(layer.register_forward_hook(self._note_output))
        for layer in self._other_layers:
            add(layer.register_forward_hook(self._note_other_output))
        add(self.projector.register_forward_pre_hook(self._reduce))
        add(self.projector.register_forward_hook(self._mark_dropped))

    def _begin(self, layer: Module, args: tuple) -> None:
        self._check_nesting()
        self._state.outputs, self._state.others = [], []

    def _note_input(self, layer: Module, args: tuple, kwargs: dict) -> None:
        self._state.input = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None and bool((~mask if mask.dtype == torch.bool else mask < 0).any()):
            raise self._refuse("images whose patches all show something", "a mask that hides patches")

    def _note_other_output(self, layer: Module, args: tuple, output: Tensor | tuple) -> None:
        if getattr(self._state, "outputs", None) is not None:
            self._state.others.append(_hidden(output))

    def _reduce(self, projector: Module, args: tuple) -> tuple:
        features, *others = args
        state = self._state
        # Held until here: else the features could reuse the memory of a freed output.
        unlike, state.others = state.others, None
        if any(_share_memory(features, output) for output in unlike):
            expected = self.fixed_arguments["vision_feature_layer"]
            raise refusals.FIXED_ARGUMENT.because(name="vision_feature_layer", expected=expected, got="another")
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1]:
            raise self._refuse("square images", f"{features.shape[1]} tokens")
        features, state.dropped = self._reduced(self._image(features, (side, side), state.input, state.outputs))
        state.input = state.outputs = None
        return features, *others

    def _image(self, features: Tensor, grid: tuple[int, int], hidden: Tensor, outputs: list[Tensor]) -> VisionFeatures:
        return VisionFeatures(
            features,
            grid,
            partial(self._saliency, hidden),
            partial(self._similarity_features, outputs),
            _keys=partial(self._keys, hidden),
            _projected=partial(self._projected, features),
            _text=partial(self._texts_of_tiles, *features.shape[:2]),
            _tiles=partial(self._tiles, len(features)),
        )

    def _packing(self) -> Mapping:
        """Arguments of a model that is about to put the tiles of each image together; none if it does not."""
        if not hasattr(self._adapter.core, "pack_image_features"):
            return {}
        values = self._running("get_image_features")
        if values is None or "image_sizes" not in values:
            raise self._refuse("tiles whose images are known where they are encoded (get_image_features)", "others")
        return values

    def _tiles(self, tiles: int) -> list[int]:
        """How many tiles each image has; 1 where the model does not tell."""
        packing = self._packing()
        if not packing:
            return [1] * tiles
        core = self._adapter.core
        given = packing.get("batch_num_images")  # a sample of several images has no tiles
        cut = [count == 1 for count in given for _ in range(count)] if given is not None else repeat(True)
        count_tiles = sys.modules[type(core).__module__].image_size_to_num_patches
        options = core.config.image_grid_pinpoints, core.config.vision_config.image_size
        sizes = packing["image_sizes"]
        counts = [count_tiles(size, *options) if is_cut else 1 for size, is_cut in zip(sizes, cut, strict=False)]
        if sum(counts) != tiles:
            raise self._refuse(f"{sum(counts)} tiles for images of these sizes", tiles)
        return counts

    def _texts_of_tiles(self, tiles: int, tokens: int) -> tuple[Tensor, ...]:
        """The text of the row in which each tile of `tokens` stands, (M, d)."""
        packing = self._packing()
        if not packing:
            return self._texts([tokens] * tiles)
        counts = self._tiles(tiles)
        texts = self._texts(self._packed_lengths(counts, tokens, packing))
        return tuple(text for text, count in zip(texts, counts, strict=True) for _ in range(count))

    def _packed_lengths(self, counts: Sequence[int], tokens: int, arguments: Mapping) -> list[int]:
        """How many placeholders images of so many tiles fill."""
        core = self._adapter.core
        pack = type(core).pack_image_features
        names = inspect.signature(pack).parameters
        given = {name: arguments[name] for name in names if name in arguments and name.startswith("vision_")}
        tiles = [torch.zeros(count, tokens, 1, dtype=torch.float32, device="cpu") for count in counts]
        newline = torch.zeros(1, dtype=torch.float32, device="cpu")
        packed, _ = pack(core, tiles, arguments["image_sizes"], image_newline=newline, **given)
        return [len(each) for each in packed]

    def _mark_dropped(self, projector: Module, args: tuple, output: Tensor) -> Tensor:
        dropped, self._state.dropped = self._state.dropped, None
        return self._marked(output, dropped)

    def _queries_and_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 1 or P, H, D) of the class token, or of all patches, and (T, P, H, D), in the layer of the saliency."""
        norm, attention = (getattr(self._salient_layer, name) for name in self.parts)
        with onloaded(self._salient_layer, attention):
            states = norm(hidden)
            query = attention.q_proj(states[:, : self.class_tokens or None])
            key = attention.k_proj(states)
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
        return query.unflatten(-1, (-1, attention.head_dim)), key.unflatten(-1, (-1, attention.head_dim))

    @torch.no_grad()
    def _saliency(self, hidden: Tensor) -> Tensor:
        """Attention of the class token, or of all patches, summed over queries and heads or averaged over heads."""
        query, key = self._queries_and_keys(hidden)
        scale = getattr(self._salient_layer, self.parts[1]).scale
        received = ops.column_saliency(query, key, scale=scale, query_reduction="sum")
        received = received[:, self.class_tokens :] * (query.shape[2] if self.class_tokens else 1)
        return self._merge(received[:, :, None]).mean(dim=-1)

    @torch.no_grad()
    def _keys(self, hidden: Tensor) -> Tensor:
        """(T, N, D), averaged over heads and merged patches."""
        _, key = self._queries_and_keys(hidden)
        keys = key[:, self.class_tokens :].mean(dim=2)
        channels = keys.transpose(1, 2).flatten(0, 1)[:, :, None]  # each as an image of its own: `_merge` mixes none
        return self._merge(channels).mean(dim=-1).unflatten(0, (len(keys), -1)).transpose(1, 2)

    @torch.no_grad()
    def _projected(self, features: Tensor) -> Tensor:
        # Past its hooks, which are those of this reducer, too.
        return self.projector.forward(features)

    @torch.no_grad()
    def _similarity_features(self, outputs: list[Tensor]) -> Tensor:
        return self._merge(torch.stack(outputs).mean(dim=0)[:, self.class_tokens :])


class QwenVision(ReducedVision):
    """The towers of Qwen2-VL to Qwen3.5, which merge 2 x 2 patches at their end; that of Qwen2.5-VL sorts by windows.

    DeepStack's features come from other layers, token by token: those of survivors stay as they are.
    """

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")

    def __init__(self, adapter, reducer: ReducerLike):
        super().__init__(adapter, reducer)
        tower = self.tower
        self._signature = inspect.signature(tower.forward)
        self._merged = tower.spatial_merge_size
        window = getattr(tower, "window_size", None)
        self._window = None if window is None else window // tower.spatial_merge_size // tower.patch_size  # merged
        depth = len(tower.blocks)
        # Blocks 7 to 23 of 32 in Nüwa.
        self._compared_blocks = tower.blocks[depth * 7 // 32 : depth * 23 // 32 + 1]

    @property
    def tower(self) -> Module:
        return self._adapter.core.visual

    def _install(self, add) -> None:
        tower = self.tower
        add(tower.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(tower.blocks[-1].register_forward_pre_hook(self._note_input, with_kwargs=True))
        for block in self._compared_blocks:
            add(block.register_forward_hook(self._note_output))
        add(tower.register_forward_hook(self._reduce))

    def _begin(self, tower: Module, args: tuple, kwargs: dict) -> None:
        self._check_nesting()
        self._state.grids = self._signature.bind(*args, **kwargs).arguments["grid_thw"]
        self._state.outputs = []

    def _note_input(self, block: Module, args: tuple, kwargs: dict) -> None:
        arguments = inspect.signature(checkpointed(block).forward).bind(*args, **kwargs).arguments
        self._state.input = [arguments[name] for name in ("hidden_states", "cu_seqlens", "position_embeddings")]

    def _reduce(self, tower: Module, args: tuple, output):
        state = self._state
        features = output.pooler_output
        grids = [
            (frames, height // self._merged, width // self._merged) for frames, height, width in state.grids.tolist()
        ]
        back = None if self._window is None else self._window_order(grids, self._window).argsort().to(features.device)
        hidden, cu_seqlens, embeddings = state.input
        # Computed once for all images, if at all.
        saliency = _once(partial(self._saliency, hidden, cu_seqlens, embeddings, back))
        similarity_features = _once(partial(self._similarity_features, state.outputs, back))
        keys = _once(partial(self._keys, hidden, back))
        texts = _once(partial(self._texts_of_grids, grids))
        reduced, start = [], 0
        for number, (frames, height, width) in enumerate(grids):
            rows = slice(start, start + frames * height * width)
            start = rows.stop

            def of_frames(tensor: Tensor, rows=rows, frames=frames) -> Tensor:
                return tensor[rows].unflatten(0, (frames, -1))

            image = VisionFeatures(
                of_frames(features),
                (height, width),
                partial(_applied, of_frames, saliency),
                partial(_applied, of_frames, similarity_features),
                is_video=frames > 1,
                _keys=partial(_applied, of_frames, keys),
                _text=partial(_repeated, texts, number, frames),
            )
            reduced.append(self._marked(*self._reduced(image)).flatten(0, 1))
        state.input = state.outputs = None
        output.pooler_output = torch.cat(reduced)
        return output

    def _texts_of_grids(self, grids: list[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        return self._texts(list(map(math.prod, grids)), video=self._running("get_video_features") is not None)

    @staticmethod
    def _window_order(grids: list[tuple[int, int, int]], side: int) -> Tensor:
        """(N,) int64: the merged patches in the order of the tower's windows."""
        order, start = [], 0
        for frames, height, width in grids:
            sides = [torch.arange(size, device="cpu") for size in (frames, height, width)]
            frame, row, column = torch.meshgrid(*sides, indexing="ij")
            across, down = -(-width // side), -(-height // side)
            window = (frame * down + row // side) * across + column // side
            order.append(start + window.flatten().argsort(stable=True))
            start += window.numel()
        return torch.cat(order)

    @torch.no_grad()
    def _saliency(self, hidden: Tensor, cu_seqlens: Tensor, position_embeddings, back: Tensor | None) -> Tensor:
        """Attention that patches receive from all in the last block, by merged patches in the order of the image."""
        query, key = self._queries_and_keys(hidden)
        cos, sin = (table[:, None].float() for table in position_embeddings)
        query, key = (rotate_half(states.float(), cos, sin)[None] for states in (query, key))
        scale = self.tower.blocks[-1].attn.scaling
        received = ops.column_saliency(query, key, cu_seqlens, scale=scale, query_reduction="sum")
        merged = received.view(-1, self._merged**2).mean(dim=1)
        return merged if back is None else merged[back]

    def _queries_and_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(P, H, D) of the patches in the last block, not rotated."""
        block = self.tower.blocks[-1]
        with onloaded(block, block.attn):
            states = block.attn.qkv(block.norm1(hidden))
        query, key, _ = states.unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        return query, key

    @torch.no_grad()
    def _keys(self, hidden: Tensor, back: Tensor | None) -> Tensor:
        """(N, D), averaged over heads and merged patches, in the order of the image."""
        _, key = self._queries_and_keys(hidden)
        merged = key.mean(dim=1).unflatten(0, (-1, self._merged**2)).mean(dim=1)
        return merged if back is None else merged[back]

    @torch.no_grad()
    def _similarity_features(self, outputs: list[Tensor], back: Tensor | None) -> Tensor:
        merged = self.tower.merger(torch.stack(outputs).mean(dim=0))
        return merged if back is None else merged[back]


def _repeated(texts: Callable[[], tuple[Tensor, ...]], number: int, times: int) -> tuple[Tensor, ...]:
    """The text of one image or video, for each of its frames."""
    return (texts()[number],) * times


def _applied(function: Callable[[Tensor], Tensor], value: Callable[[], Tensor]) -> Tensor:
    return function(value())


def _once(function: Callable[[], Value]) -> Callable[[], Value]:
    made: list[Value] = []

    def value() -> Value:
        if not made:
            made.append(function())
        return made[0]

    return value
