"""Facts about a `generate` loop that its calls of the model do not carry: draft tokens, chunked prefill."""

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
        generates: whether `generate` makes the call.
        assisted: whether it lets an assistant guess tokens.
        draft_tokens: how many tokens at the end of the call are draft tokens.
        crops_by_count: whether assisted decoding crops as many tokens of each layer as it rejects, as it does since
            `Cache.crop` takes a number of tokens; before, it crops all layers to one length.
        drafts: whether it generates the draft tokens of assisted decoding.
        uncut: whether the tokens of the call are those that the caller of `generate` gave, none cut off as cached.
        conversation: tokens of the whole conversation, if those of the call were cut from it by the length of a cache.
        chunked_ids: (B, L), the whole conversation if it is prefilled in chunks, else None.
        chunk_size: tokens of a chunk, else None.
    """

    generates: bool = False
    assisted: bool = False
    draft_tokens: int = 0
    crops_by_count: bool = False
    drafts: bool = False
    uncut: bool = False
    conversation: int | None = None
    chunked_ids: Tensor | None = None
    chunk_size: int | None = None


def prompt_call(core: nn.Module) -> PromptCall:
    """Read the frame of the generation loop of transformers that makes this call of its model, if there is one.

    Assisted decoding appends draft tokens to the prompt of its first call, and a chunk looks like a prompt of its own:
    both would rank by a token that is not the prompt's last, and no argument tells. No argument tells either which
    tokens were cut off by the length of a cache that may be routed, since a mask of ones is dropped.

    Args:
        core: the model inside the head, which copies of a model share.
    """
    frame: FrameType | None = sys._getframe(1)
    callee, running, nested = frame, set(), False
    # Only frames of calls and loops are asked for their locals: a frame that was asked keeps them alive.
    while frame is not None and not _generates_with(core, frame):
        if frame.f_code is nn.Module._call_impl.__code__:
            module = id(frame.f_locals["self"])
            nested |= module in running
            running.add(module)
        callee, frame = frame, frame.f_back
    if frame is None or callee is None or nested or not _is_model_call(callee, frame.f_locals["self"]):
        return PromptCall()
    values = frame.f_locals
    if frame.f_code.co_name == "_assisted_decoding":
        drafts, counts = values.get("candidate_length", 0), "number_of_tokens_to_crop" in frame.f_code.co_varnames
        return PromptCall(generates=True, assisted=True, draft_tokens=drafts, crops_by_count=counts)
    if frame.f_code.co_name != "_prefill":
        return PromptCall(generates=True)
    config, ids = values.get("generation_config"), values.get("input_ids")
    drafts, chunk = bool(getattr(config, "is_assistant", False)), getattr(config, "prefill_chunk_size", None)
    if chunk is not None and ids is not None and ids.shape[1] > chunk:
        return PromptCall(generates=True, drafts=drafts, chunked_ids=ids, chunk_size=chunk)
    cut = values.get("next_sequence_length", 0)
    conversation = ids.shape[1] if cut and ids is not None else None
    return PromptCall(generates=True, drafts=drafts, uncut=cut is None, conversation=conversation)


def encoding_arguments(core: nn.Module) -> dict | None:
    """Arguments of the `generate` that encodes images for its model before it calls it; None if none does.

    Args:
        core: the model inside the head.
    """
    frame: FrameType | None = sys._getframe(1)
    callee = frame
    while frame is not None and not (frame.f_code.co_name == "generate" and _generates_with(core, frame)):
        callee, frame = frame, frame.f_back
    if frame is None or callee is None or "prepare" not in callee.f_code.co_name:
        return None
    values = frame.f_locals
    arguments = dict(values.get("model_kwargs") or {})
    if values.get("model_input_name") == "input_ids":
        arguments["input_ids"] = values.get("inputs_tensor")
    return arguments


def _generates_with(core: nn.Module, frame: FrameType) -> bool:
    """Whether a frame is one of transformers' generation with a model that is, shares or wraps this one."""
    if frame.f_globals.get("__name__") != _GENERATION:
        return False
    model = frame.f_locals.get("self")
    return isinstance(model, nn.Module) and any(module is core for module in model.modules())


def _is_model_call(callee: FrameType, model: nn.Module) -> bool:
    """Whether a generation loop calls its model here, not a logits processor, a stopping criterion or a streamer."""
    code = callee.f_code
    first = callee.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first is model or callee.f_globals.get("__name__", "").startswith("torch._dynamo")
