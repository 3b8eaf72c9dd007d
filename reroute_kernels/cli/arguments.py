"""Arguments of commands, read from text."""

from __future__ import annotations

from pathlib import Path

from ..budget import SHAPES
from ..cost import Decoder
from ..notation import parse_policy
from ..policy import Policy
from ..presets import MODELS, layers_of
from ..vllm import ARCHITECTURES, Settings


def parse_model(text: str) -> object:
    """A model that commands take: the name of a published one as it is, or the configuration of a checkpoint.

    Args:
        text: a name in `presets.MODELS`, or a checkpoint folder or hub id.

    Raises:
        ModuleNotFoundError: the text is no known name, and transformers is missing.
        ValueError: there is no such configuration.
    """
    if text in MODELS:
        return text
    path = Path(text)
    is_path = path.is_absolute() or text.startswith(".") or text.count("/") != 1 or path.parent.is_dir()
    if is_path and not path.is_dir():  # mistyped: nothing to ask the hub for
        raise _no_model(text, FileNotFoundError("no such folder") if "/" in text else None)
    from transformers import AutoConfig

    try:
        # Without the second argument, transformers asks whether to run code that comes with a checkpoint.
        return AutoConfig.from_pretrained(text, trust_remote_code=False)
    except Exception as error:
        raise _no_model(text, error) from None


def decoder_of(model: object, text: str) -> Decoder:
    """Shape of the decoder of a model, given as `parse_model` returns it.

    Raises:
        ValueError: it cannot be costed.
    """
    try:
        return Decoder.of(model)
    except NotImplementedError as error:
        reason = first_line(error).partition("got ")[2]
        raise ValueError(
            f"model must have full attention in all layers, and none latent, to be costed, got {text!r} with {reason}"
        ) from None
    except Exception as error:
        raise _no_model(text, error) from None


def check_layers(policy: Policy, model: object) -> None:
    """Refuse a policy that decides at layers which the model does not have.

    Raises:
        ValueError: it does.
    """
    layers = layers_of(model)
    if policy.schedule and policy.schedule[-1].layer >= layers:
        raise ValueError(
            f"schedule must stay below layer {layers} of this model, got layer {policy.schedule[-1].layer}"
        )


def architecture_of(model: object, text: str) -> str:
    """Name of the class in transformers and vLLM of a model, given as `parse_model` returns it.

    Raises:
        ValueError: its configuration names no class.
    """
    if isinstance(model, str):
        return MODELS[model].architecture
    if not model.architectures:
        raise ValueError(f"model must have a configuration that names its architecture, got {text!r}")
    return model.architectures[0]


def vllm_settings(model: str, policy: str, own_groups: bool) -> tuple[str, Settings]:
    """Architecture of a model, and the settings with which vLLM routes it by a policy.

    Raises:
        ValueError: the model or the policy is none, or vLLM cannot run such a policy.
        OSError: the file of a policy cannot be read.
    """
    parsed = parse_model(model)
    architecture = architecture_of(parsed, model)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model must be of one of {', '.join(ARCHITECTURES)}, got {model!r} of {architecture}")
    given = parse_policy(policy, parsed)
    check_layers(given, parsed)
    try:
        return architecture, Settings(given, own_groups)
    except NotImplementedError as error:
        raise ValueError(str(error)) from None


def _no_model(text: str, error: Exception | None = None) -> ValueError:
    reason = "" if error is None else f": {first_line(error)}"
    accepted = f"{', '.join(MODELS)}, or the folder or hub id (owner/name) of a checkpoint"
    return ValueError(f"model must be {accepted}, got {text!r}{reason}")


def parse_layers(text: str) -> list[int]:
    """Decision layers such as `3,7,15`.

    Raises:
        ValueError: the text is no list of integers.
    """
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise ValueError(f"layers must be integers such as 3,7,15, got {text!r}") from None


def parse_shape(text: str) -> str | list[float]:
    """A shape as `solve` takes it: its name, or numbers such as `1,.5,.25`.

    Raises:
        ValueError: the text is neither.
    """
    try:
        return text if text in SHAPES else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"shape must be {', '.join(SHAPES)} or numbers such as 1,.5,.25, got {text!r}") from None


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
