"""Reducers: rules that leave only some of an image's visual tokens before the language model runs.

A reducer is any object with a method `reduce(image)`, which gives the tokens that stay, and their features. Dropped
tokens never enter the language model; the others are the pool of all decisions. `survivors` is needed to cost it.

Equally many tokens of each of T images are given as (T, K); frames of a video that keep different numbers of tokens as
one flat index over all T x N.
"""

from .base import Reducer, ReducerLike, VisionFeatures
from .flashvid import FlashVid, flashvid_diverse, flashvid_segments, flashvid_tokens
from .nuwa import Nuwa, nuwa_anchors

__all__ = [
    "FlashVid",
    "Nuwa",
    "Reducer",
    "ReducerLike",
    "VisionFeatures",
    "flashvid_diverse",
    "flashvid_segments",
    "flashvid_tokens",
    "nuwa_anchors",
]
