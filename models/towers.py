"""Vision towers of further families that reducers work on, as differences from those of CLIP.

Where patches are merged or pooled before the language model, tokens are the merged ones; their saliency is the mean
over their patches, or pooled as the features are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from reroute_kernels import ops
from reroute_kernels.reducers import ReducerLike, VisionFeatures
from reroute_kernels.ref.rank import rotate_half

from . import refusals
from .modules import Module
from .vision import ClipVision, _once, _repeated, _share_memory


class InternVision(ClipVision):
    """InternViT with a class token; 2 x 2 patches are put beside each other before the projector (InternVL)."""

    kind = "internvl_vision"
    needed = "the type 'internvl_vision'"
    parts = ("layernorm_before", "attention")

    def _layers_of_tower(self) -> nn.ModuleList:
        return self.tower.encoder.layer

    def _merge(self, states: Tensor) -> Tensor:
        side = math.isqrt(states.shape[1])
        grid = states.unflatten(1, (side, side))
        core = self._adapter.core
        return core.pixel_shuffle(grid, scale_factor=core.config.downsample_ratio).flatten(1, 2)


class Idefics3Vision(ClipVision):
    """SigLIP without a pooling head, whose connector puts patches beside each other (Idefics 3, SmolVLM)."""

    model_types = ("idefics3", "smolvlm")
    class_tokens = 0

    def __init__(self, adapter, reducer: ReducerLike):
        self.kind = adapter.model.config.vision_config.model_type  # the family has this tower alone
        super().__init__(adapter, reducer)

    def _feature_layer(self) -> int:
        return -1

    @property
    def tower(self) -> Module:
        return self._adapter.core.vision_model

    @property
    def projector(self) -> Module:
        return self._adapter.core.connector.modality_projection

    def _merge(self, states: Tensor) -> Tensor:
        connector = self._adapter.core.connector
        return connector.pixel_shuffle(states, connector.scale_factor)


class SiglipVision(ClipVision):
    """SigLIP before a projector, without a class token; frames of videos are pooled behind it (LLaVA-OneVision).

    The pooling is no module: until `remove()` the instance has methods of its own in its place.
    """

    kind = "siglip_vision_model"
    needed = "the type 'siglip_vision_model'"
    strategy = "full"
    class_tokens = 0

    def _install(self, add) -> None:
        super()._install(add)
        core = self._adapter.core
        for name, method in (
            ("get_video_features", self._get_video_features),
            ("apply_pooling", self._apply_pooling),
            ("pack_image_features", self._pack_image_features),
        ):
            add(_OwnMethod(core, name, method))

    def _get_video_features(self, features: Callable, pixel_values_videos: Tensor, *args, **kwargs):
        self._state.frames = pixel_values_videos.shape[1]
        try:
            return features(pixel_values_videos, *args, **kwargs)
        finally:
            self._state.frames = None

    def _reduce(self, projector: Module, args: tuple) -> tuple:
        return args if self._frames else super()._reduce(projector, args)

    def _mark_dropped(self, projector: Module, args: tuple, output: Tensor) -> Tensor:
        return output if self._frames else super()._mark_dropped(projector, args, output)

    @property
    def _frames(self) -> int | None:
        """Frames of each video that is encoded, or None if images are."""
        return getattr(self._state, "frames", None)

    def _apply_pooling(self, pool: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        state, frames = self._state, self._frames
        pooled = pool(features)
        if not frames:
            return pooled
        side = math.isqrt(pooled.shape[1])
        # A newline ends each video.
        texts = _once(partial(self._texts, [frames * pooled.shape[1] + 1] * (len(pooled) // frames), True))
        reduced = []
        for number, start in enumerate(range(0, len(pooled), frames)):
            video = slice(start, start + frames)
            image = VisionFeatures(
                pooled[video],
                (side, side),
                partial(self._pooled_saliency, pool, state.input[video]),
                partial(self._pooled_similarity, pool, [output[video] for output in state.outputs]),
                is_video=True,
                _keys=partial(self._pooled_keys, pool, state.input[video]),
                _text=partial(_repeated, texts, number, frames),
            )
            reduced.append(self._marked(*self._reduced(image)))
        state.input = state.outputs = state.others = None
        return torch.cat(reduced)

    def _pooled_saliency(self, pool: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return pool(self._saliency(hidden)[:, :, None])[:, :, 0]

    def _pooled_keys(self, pool: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return pool(self._keys(hidden))

    def _pooled_similarity(self, pool: Callable[[Tensor], Tensor], outputs: list[Tensor]) -> Tensor:
        return pool(self._similarity_features(outputs))

    def _pack_image_features(self, pack: Callable, image_features, *args, **kwargs):
        """Pack tiles; refuse those that the model would resample, and the marks of dropped tokens with them."""
        places = [torch.arange(each[..., 0].numel(), dtype=torch.float64, device="cpu") for each in image_features]
        places = [each.view(*of[..., :1].shape) for each, of in zip(places, image_features, strict=True)]
        packed, _ = pack(places, *args, **{**kwargs, "image_newline": None})
        if any(bool(each.frac().any()) for each in packed):
            most = max(map(len, packed))
            raise self._refuse("images of so few tiles that the model does not resample them", f"{most} tokens")
        return pack(image_features, *args, **kwargs)


class _OwnMethod:
    """A method of one instance in place of its class's, which is handed to it first; removed like a hook."""

    def __init__(self, module: nn.Module, name: str, method: Callable):
        self.id = id(self)
        self._module, self._name = module, name
        vars(module)[name] = partial(method, getattr(module, name))

    def remove(self) -> None:
        vars(self._module).pop(self._name, None)


class PixtralVision(ClipVision):
    """Pixtral, whose images of any size lie in one sequence; its projector merges patches (Mistral 3)."""

    kind = "pixtral"
    needed = "the type 'pixtral'"
    class_tokens = 0
    parts = ("attention_norm", "attention")

    def _layers_of_tower(self) -> nn.ModuleList:
        return self.tower.transformer.layers

    def _feature_layer(self) -> int:
        output = self._adapter.model.config.vision_feature_layer
        if not isinstance(output, int):
            raise self._refuse("one vision_feature_layer", output)
        self.fixed_arguments = {"vision_feature_layer": output}
        return output

    def _note_input(self, layer: Module, args: tuple, kwargs: dict) -> None:
        self._state.input = args[0] if args else kwargs["hidden_states"]
        self._state.embeddings = kwargs["position_embeddings"]

    def _reduce(self, projector: Module, args: tuple) -> tuple:
        features, sizes = args
        state = self._state
        unlike, state.others = state.others, None
        if any(_share_memory(features, output) for output in unlike):
            expected = self.fixed_arguments["vision_feature_layer"]
            raise refusals.FIXED_ARGUMENT.because(name="vision_feature_layer", expected=expected, got="another")
        state.sizes = sizes
        return args

    def _mark_dropped(self, projector: Module, args: tuple, output: Tensor) -> Tensor:
        state, config = self._state, self._adapter.model.config
        patch, merged = config.vision_config.patch_size, config.spatial_merge_size
        patches = [(int(height) // patch, int(width) // patch) for height, width in state.sizes]
        saliency = _once(partial(self._saliency_of_all, state.input, state.embeddings, patches, merged))
        similar = _once(partial(self._similarity_of_all, state.outputs, state.sizes))
        keys = _once(partial(self._keys_of_all, state.input, patches, merged))
        grids = [(height // merged, width // merged) for height, width in patches]
        texts = _once(partial(self._texts, [math.prod(grid) for grid in grids]))
        reduced, start = [], 0
        for number, grid in enumerate(grids):
            rows = slice(start, start + grid[0] * grid[1])
            start = rows.stop

            def of_image(values: Callable[[], Tensor], rows=rows) -> Tensor:
                return values()[None, rows]

            image = VisionFeatures(
                output[None, rows],
                grid,
                partial(of_image, saliency),
                partial(of_image, similar),
                _keys=partial(of_image, keys),
                _text=partial(_repeated, texts, number, 1),
            )
            reduced.append(self._marked(*self._reduced(image))[0])
        state.input = state.embeddings = state.outputs = state.sizes = None
        return torch.cat(reduced)

    @torch.no_grad()
    def _saliency_of_all(self, hidden: Tensor, embeddings, patches: list[tuple[int, int]], merged: int) -> Tensor:
        attention = getattr(self._salient_layer, self.parts[1])
        cos, sin = (table.view(-1, 1, attention.head_dim).float() for table in embeddings)
        query, key = (rotate_half(states.float(), cos, sin) for states in self._queries_and_keys(hidden))
        counts = torch.tensor([height * width for height, width in patches], device=hidden.device)
        bounds = torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0))
        received = ops.column_saliency(query, key, bounds, scale=attention.scaling, query_reduction="sum")[0]
        return _pooled(received[:, None], patches, merged)[:, 0]

    @torch.no_grad()
    def _keys_of_all(self, hidden: Tensor, patches: list[tuple[int, int]], merged: int) -> Tensor:
        _, key = self._queries_and_keys(hidden)
        return _pooled(key[0].mean(dim=1), patches, merged)

    @torch.no_grad()
    def _similarity_of_all(self, outputs: list[Tensor], sizes) -> Tensor:
        return self.projector.patch_merger(self.projector.norm(torch.stack(outputs).mean(dim=0)[0]), sizes)


def _pooled(values: Tensor, patches: list[tuple[int, int]], merged: int) -> Tensor:
    """(N, c): the means of (P, c) over merged patches; those of images with these rows and columns of patches."""
    images = values.split([height * width for height, width in patches])
    pooled = [
        avg_pool2d(each.T.reshape(1, -1, *grid), merged).flatten(2)[0].T
        for each, grid in zip(images, patches, strict=True)
    ]
    return torch.cat(pooled)
