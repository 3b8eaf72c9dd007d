"""Reducers: rules that leave only some of an image's visual tokens before the language model runs.

A reducer is any object with a method `reduce(image)`, which gives the tokens that stay, and their features. Dropped
tokens never enter the language model; the others are the pool of all decisions. `survivors` is needed to cost it.

Methods for images take tiles, and frames of a video, one by one. DivPrune compares those of an image or a video with
each other, FlashVid those of a video; VidCom2 leaves images whole.

Equally many tokens of each of T images are given as (T, K); frames of a video that keep different numbers of tokens as
one flat index over all T x N.
"""

from .base import Reducer, ReducerLike, VisionFeatures
from .cdpruner import CDPruner, cdpruner_relevance, cdpruner_tokens
from .divprune import DivPrune
from .flashvid import FlashVid, flashvid_diverse, flashvid_segments, flashvid_tokens
from .holov import HoloV, holov_tokens
from .nuwa import Nuwa, nuwa_anchors
from .vidcom2 import VidCom2, vidcom2_tokens
from .visionzip import VisionZip, visionzip_tokens
from .vispruner import VisPruner, vispruner_tokens

__all__ = [
    "CDPruner",
    "DivPrune",
    "FlashVid",
    "HoloV",
    "Nuwa",
    "Reducer",
    "ReducerLike",
    "VidCom2",
    "VisPruner",
    "VisionFeatures",
    "VisionZip",
    "cdpruner_relevance",
    "cdpruner_tokens",
    "flashvid_diverse",
    "flashvid_segments",
    "flashvid_tokens",
    "holov_tokens",
    "nuwa_anchors",
    "vidcom2_tokens",
    "visionzip_tokens",
    "vispruner_tokens",
]
