"""What `generate` does with a prompt and its calls of the model do not say."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

from torch import Tensor, nn

_GENERATION = "transformers.generation.utils"


@dataclass(frozen=True)
class PromptCall:
    """How `generate` calls its model.

    Attributes:
        assisted: whether it lets an assistant guess tokens.
        guessed: tokens at the end of the call that were guessed.
        uncut: whether the tokens of the call are those that the caller of `generate` gave, none cut off as cached.
        chunked_ids: (B, L), the whole conversation where it is prefilled in chunks, else None.
        chunk_size: of these, else None.
    """

    assisted: bool = False
    guessed: int = 0
    uncut: bool = False
    chunked_ids: Tensor | None = None
    chunk_size: int | None = None


def prompt_call(model: nn.Module) -> PromptCall:
    """Read the frame of transformers' generation loop that called this model, if one did.

    Assisted decoding appends guesses to the prompt of its first call, and a chunk looks like a prompt of its own: both
    would rank by a token that is not the prompt's last, and no argument tells. Nor does one tell what was cut off by
    the length of a cache that may be routed; a mask of ones is dropped.
    """
    frame: FrameType | None = sys._getframe(1)
    # Only frames of that loop are asked for their locals: a frame that was asked keeps them alive.
    while frame is not None and not (
        frame.f_globals.get("__name__") == _GENERATION and frame.f_locals.get("self") is model
    ):
        frame = frame.f_back
    if frame is None:
        return PromptCall()
    values = frame.f_locals
    if frame.f_code.co_name == "_assisted_decoding":
        return PromptCall(assisted=True, guessed=values.get("candidate_length", 0))
    config, ids = values.get("generation_config"), values.get("input_ids")
    chunk = getattr(config, "prefill_chunk_size", None)
    if frame.f_code.co_name != "_prefill":
        return PromptCall()
    if chunk is not None and ids.shape[1] > chunk:
        return PromptCall(chunked_ids=ids, chunk_size=chunk)
    return PromptCall(uncut=values.get("next_sequence_length", 0) is None)
