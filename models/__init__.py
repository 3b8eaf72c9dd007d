"""Drop-in adapters that route transformers models: `apply(model, policy)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from reroute_kernels import flops  # noqa: F401 (registers the FLOPs of the operations)
from reroute_kernels.policy import Policy
from reroute_kernels.versions import check_transformers

from .adapter import Adapter
from .families import (
    Apertus1p5Adapter,
    AyaVisionAdapter,
    CohereCompassAdapter,
    Ernie4_5VLMoeAdapter,
    Exaone4_5Adapter,
    Glm4vAdapter,
    Glm4vMoeAdapter,
    Granite4VisionAdapter,
    GraniteDoclingAdapter,
    Idefics3Adapter,
    InternVLAdapter,
    KimiAdapter,
    Lfm2VLAdapter,
    Lfm3VLAdapter,
    LlavaAdapter,
    LlavaOnevisionAdapter,
    Mistral3Adapter,
    MuseAdapter,
    Qwen2_5VLAdapter,
    Qwen2VLAdapter,
    Qwen3_5Adapter,
    Qwen3VLAdapter,
)
from .gemma import Gemma3Adapter, Gemma4Adapter, PaliGemmaAdapter, ShieldGemma2Adapter
from .graphs import CudaGraphs, Graphs, UnroutedPrefills
from .hooks import Routing, routings_on
from .refusals import MODEL_TYPE, OTHER_KIND
from .refused import REFUSED
from .warming import make_decisions

__all__ = [
    "ADAPTERS",
    "Adapter",
    "CudaGraphs",
    "Routing",
    "apply",
    "register",
    "remove",
    "routing_of",
    "unrouted",
    "warm_up",
]

ADAPTERS: dict[str, type[Adapter]] = {
    "apertus1p5": Apertus1p5Adapter,
    "aria": Adapter,
    "aya_vision": AyaVisionAdapter,
    "cohere2_vision": AyaVisionAdapter,
    "cohere_compass": CohereCompassAdapter,
    "cosmos3_edge": Qwen2VLAdapter,
    "cosmos3_omni": Qwen3VLAdapter,
    "deepseek_ocr2": Adapter,
    "deepseek_vl": Adapter,
    "deepseek_vl_hybrid": Adapter,
    "emu3": Idefics3Adapter,
    "ernie4_5_vl_moe": Ernie4_5VLMoeAdapter,
    "exaone4_5": Exaone4_5Adapter,
    "fast_vlm": Adapter,
    "gemma3": Gemma3Adapter,
    "gemma4": Gemma4Adapter,
    "gemma4_unified": Gemma4Adapter,
    "glm46v": Glm4vAdapter,
    "glm4v": Glm4vAdapter,
    "glm4v_moe": Glm4vMoeAdapter,
    "glm_ocr": Glm4vAdapter,
    "glmga": Glm4vAdapter,
    "got_ocr2": Adapter,
    "granite4_vision": Granite4VisionAdapter,
    "granite_docling": GraniteDoclingAdapter,
    "hyperclovax_vision_v2": Adapter,
    "idefics2": Idefics3Adapter,
    "idefics3": Idefics3Adapter,
    "internvl": InternVLAdapter,
    "janus": Adapter,
    "kimi_k25": KimiAdapter,
    "lfm2_vl": Lfm2VLAdapter,
    "lfm3_vl": Lfm3VLAdapter,
    "lighton_ocr": Adapter,
    "llava": LlavaAdapter,
    "llava_next": LlavaAdapter,
    "llava_next_video": Adapter,
    "llava_onevision": LlavaOnevisionAdapter,
    "minicpm_ocr": Qwen3_5Adapter,
    "minicpmv4_6": Qwen3_5Adapter,
    "minicpmv4_7": Qwen3_5Adapter,
    "mistral3": Mistral3Adapter,
    "muse_glimmer": MuseAdapter,
    "muse_spark": MuseAdapter,
    "ovis2": Adapter,
    "paddleocr_vl": Qwen2VLAdapter,
    "paligemma": PaliGemmaAdapter,
    "perception_lm": Adapter,
    "pp_chart2table": Adapter,
    "qianfan_ocr": Adapter,
    "qwen2_5_omni_thinker": Qwen2VLAdapter,
    "qwen2_5_vl": Qwen2_5VLAdapter,
    "qwen2_vl": Qwen2VLAdapter,
    "qwen3_5": Qwen3_5Adapter,
    "qwen3_5_moe": Qwen3_5Adapter,
    "qwen3_omni_moe_thinker": Qwen3VLAdapter,
    "qwen3_vl": Qwen3VLAdapter,
    "qwen3_vl_moe": Qwen3VLAdapter,
    "shieldgemma2": ShieldGemma2Adapter,
    "smolvlm": Idefics3Adapter,
    "video_llama_3": Adapter,
    "video_llava": Adapter,
    "vipllava": Adapter,
}
"""Adapter of each supported `config.model_type`."""


def register(model_type: str, adapter: type[Adapter]) -> None:
    """Let `apply` route a model that is not listed.

    Args:
        model_type: its `config.model_type`.
        adapter: `Adapter` if the model is built like the default, or a subclass that overrides the parts that differ.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: this model type has another adapter already.
    """
    if not isinstance(model_type, str):
        raise TypeError(f"model_type must be a string, got {model_type!r}")
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"adapter must be Adapter or a subclass of it, got {adapter!r}")
    if ADAPTERS.setdefault(model_type, adapter) is not adapter:
        raise ValueError(f"model_type must have no adapter yet, got {model_type!r}, which has {ADAPTERS[model_type]!r}")


def apply(
    model: nn.Module, policy: Policy | str, *, replace: bool = False, cuda_graph: bool | str | CudaGraphs = False
) -> Routing:
    """Route this model's prompts by a policy, until the handle is removed.

    Only this instance changes, through PyTorch's forward hooks; `generate` and plain calls work as before. A call
    without visual tokens runs untouched. A transformers newer than those that were tested is warned of, once.

    Args:
        model: a transformers model of a type in `ADAPTERS`, also wrapped by PEFT, `torch.compile` or
            `DistributedDataParallel`.
        policy: the policy, or its text as `Policy.parse` takes it for this model: `"reroute-fastv/192"`,
            `"3:0.25,7:0.25"`, `"policy.json"`.
        replace: whether a routing that is on the model already is removed for this one; it stays as it is if this one
            is refused. The handle of the replaced routing is then a removed one.
        cuda_graph: whether prefills of routed prompts are captured in CUDA graphs and replayed. What cannot be captured
            runs without a graph, after one warning a reason; with `"require"` it is refused. `CudaGraphs` has the
            settings.

    Returns:
        The handle: a context manager with `remove()`, `trace` and `graphs`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model type is not supported, the model is routed already and `replace` is False, the policy
            does not fit it, or `cuda_graph` is none of what is named.
        NotImplementedError: the model or the policy asks for something that is not supported, which is named, or
            transformers is older than all supported versions.
        AttributeError: this version of transformers builds the model differently, which is named.
        OSError: the file that the policy names cannot be read.

    >>> with apply(model, "3:0.25,7:0.1") as routing:  # a LLaVA, and its processor's output for a prompt with a photo
    ...     output = model.generate(**inputs, max_new_tokens=2)
    >>> [len(stage.selected[0]) for stage in routing.trace.stages]
    [36, 14]
    """
    if not isinstance(replace, bool):
        raise TypeError(f"replace must be a bool, got {replace!r}")
    check_transformers()
    return Routing(*_adapted(model, policy), replace, CudaGraphs.of(cuda_graph))


def warm_up(model: nn.Module, policy: Policy | str, lengths: Iterable[int], *, batch_size: int = 1) -> None:
    """Compile the kernels of a policy's decisions ahead, so that no prompt of these lengths waits for a compiler.

    The decisions of made-up prompts are made, with and without padding. Lengths between two powers of two share their
    kernels, so that all of `range(300, 4001)` takes a few seconds, and less in later processes, which find the kernels
    on the disk. The reference backend, which runs on a CPU, has no kernels: then there is nothing to gain.

    Args:
        model: as for `apply`; whether it is routed is no matter.
        policy: as for `apply`.
        lengths: of whole prompts, the tokens of text and of images together, 2 or more.
        batch_size: samples of a call. Kernels of 2 or more samples are nearly the same; those of 1 are others.

    Raises:
        TypeError, ValueError, NotImplementedError: as `apply`, or a length or a batch size is not accepted.

    >>> warm_up(model, "3:0.25,7:0.1", range(300, 4001))
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    check_transformers()
    adapter, policy = _adapted(model, policy)
    make_decisions(adapter, policy, lengths, batch_size)


def unrouted(model: nn.Module, cuda_graph: bool | str | CudaGraphs = True) -> UnroutedPrefills:
    """Capture the prompts of a model in CUDA graphs without routing them, for a fair comparison with a routed one.

    Whether a prompt is padded is read from the device. Outputs at padding are any.

    Args:
        model: as `apply` takes it, without a routing.
        cuda_graph: as `apply` takes it.

    Returns:
        The handle: a context manager with `remove()` and `graphs`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model type is not supported, the model is routed, or `cuda_graph` is False.
        NotImplementedError: with `"require"`, something cannot be captured, which is named.

    >>> with unrouted(model):
    ...     output = model.generate(**inputs, max_new_tokens=2)
    """
    settings = CudaGraphs.of(cuda_graph)
    if settings is None:
        raise ValueError('cuda_graph must be True, "require" or CudaGraphs where nothing is routed, got False')
    check_transformers()
    adapter = _adapter_of(model)
    if routings_on(adapter.core):
        raise ValueError("model must not be routed, got one that is: remove() the routing first")
    return UnroutedPrefills(adapter, Graphs(adapter, None, settings))


def _adapted(model: nn.Module, policy: Policy | str) -> tuple[Adapter, Policy]:
    """The adapter of a model and the policy that is meant, or an error that tells what is accepted."""
    if not isinstance(policy, Policy | str):
        raise TypeError(f"policy must be a Policy or its text, got {type(policy).__name__}")
    adapter = _adapter_of(model)
    return adapter, Policy.parse(policy, adapter.model) if isinstance(policy, str) else policy


def _adapter_of(model: nn.Module) -> Adapter:
    inside = _unwrapped(model)
    model_type = getattr(getattr(inside, "config", None), "model_type", None)
    if not isinstance(inside, nn.Module) or model_type is None:
        raise TypeError(f"model must be a transformers model, got {type(inside).__name__}")
    if model_type in REFUSED and model_type not in ADAPTERS:
        raise OTHER_KIND.because(model_type=model_type, reason=REFUSED[model_type])
    if model_type not in ADAPTERS:
        raise MODEL_TYPE.because(supported=", ".join(ADAPTERS), model_type=model_type)
    return ADAPTERS[model_type](inside)


def routing_of(model: nn.Module) -> Routing | None:
    """The routing that is on a model, for handles that were lost.

    Args:
        model: the model that `apply` was given, or a wrapper around it.

    Returns:
        The handle that `apply` returned, or None if the model is not routed.

    Raises:
        TypeError: the argument is no module.
        ValueError: several models in this module are routed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    found = routings_on(model)
    if len(found) > 1:
        raise ValueError(f"model must hold one routed model, got {len(found)} in a {type(model).__name__}")
    return found[0] if found else None


def remove(model: nn.Module) -> None:
    """Remove the routing that is on a model, if any, as `remove()` of its handle does.

    Args:
        model: the model that `apply` was given, or a wrapper around it.

    Raises:
        TypeError: the argument is no module.
        ValueError: several models in this module are routed.
    """
    routing = routing_of(model)
    if routing is not None:
        routing.remove()


def _unwrapped(model: Any) -> Any:
    """The transformers model inside the wrappers of PEFT, `torch.compile` and `DistributedDataParallel`."""
    while isinstance(model, nn.Module):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    return model
