"""Refusals: the reasons for which a model, a policy or a call is not routed; docs/refusals.md is written from them.

Rules are checked in order. The first that applies is raised, with the name of the argument, the value that came and the
values that are accepted. The facts `c` that rules read are a `PromptFacts` or a `ContinuationFacts` of calls.py, or the
`RoutedLayers` of a policy. Refusals without a condition are raised by the code that notices them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """One reason: its line in docs/refusals.md, the message of its error, and the condition if it is a rule."""

    summary: str
    message: str
    """Format string; a rule reads facts `c`, other refusals the values handed to `because`."""
    applies: Callable[[Any], object] | None = None
    error: type[Exception] = NotImplementedError

    def because(self, **values: object) -> Exception:
        """The error, to be raised."""
        return self.error(self.message.format(**values))


def refuse(facts: object, rules: Iterable[Refusal]) -> None:
    """Check rules in order.

    Raises:
        NotImplementedError, ValueError: the first rule that applies.
    """
    for rule in rules:
        if rule.applies is not None and rule.applies(facts):
            raise rule.because(c=facts)


# By `apply`

OTHER_KIND = Refusal(
    "types of models that read images otherwise: models.md has each with its reason",
    "model must be one whose decoder reads image tokens among those of text as its adapter expects, got "
    "{model_type!r}, {reason}",
)
MODEL_TYPE = Refusal(
    "other model types without an adapter",
    "model must be of a supported type ({supported}), got {model_type!r}",
    error=ValueError,
)
TEXT_MODEL = Refusal(
    "text models that an adapter does not know",
    "model must have a text model of type {accepted}, got {text_model_type!r}",
)
DTYPE = Refusal("float64", "model must be of dtype {accepted}, got {dtype}")
HEADS_SPLIT_OTHERWISE = Refusal(
    "at the first decision, attention heads split over processes by other means than transformers' `tp_plan`",
    "model must have all {expected[0]} query and {expected[1]} key heads on each process, or be split by transformers "
    "(from_pretrained with a tp_plan), got {got[0]} query and {got[1]} key heads",
)
HEADS_SPLIT_UNEVENLY = Refusal(
    "at the first decision, attention heads split over processes unevenly",
    "model must have its {expected[0]} query and {expected[1]} key heads split evenly over {ranks} tensor-parallel "
    "ranks, got {got[0]} query and {got[1]} key heads on this one",
)
SHARDED = Refusal(
    "FSDP",
    "model must not be sharded by FSDP, whose weights are not there when a decision is made, got {module}",
)
REDUCER_FAMILY = Refusal(
    "reducers on other families than LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, "
    "InternVL, Mistral 3, Idefics 3 and SmolVLM",
    "reducer must be None on a model of type {model_type!r}, got {reducer!r}; reducers work on llava, llava_next, "
    "llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, internvl, mistral3, idefics3 "
    "and smolvlm",
)
REDUCER_SPLIT_HEADS = Refusal(
    "reducers on a vision tower that a `tp_plan` of one's own splits",
    "reducer must be None on a model whose vision tower is split over processes, got {reducer!r}",
)
REDUCER_SHARED_TOWER = Refusal(
    "reducers on a vision tower that another model with a reducer has, too",
    "reducer must be None on a model whose vision tower belongs to another one, too, that is routed with a reducer, "
    "got {reducer!r}",
    error=ValueError,
)
REDUCER_TOWER = Refusal(
    "reducers on vision towers of other kinds than the family's, or of several feature layers; at the call, images "
    "that are not square before a projector, patches that a mask hides, and tiles that the model resamples",
    "reducer needs a vision tower with {needed}, got {got!r}",
)

LAYER_RULES = (
    Refusal(
        "decision layers beyond the last layer",
        "schedule must stay below layer {c.num_layers} of this {c.model_class}, got layer {c.last_decision}",
        lambda c: c.last_decision >= c.num_layers,
        ValueError,
    ),
    Refusal(
        "decoders in which all tokens see each other (`use_bidirectional_attention` of their configuration)",
        "model must have a decoder that generates, in which text sees what is before it alone, got "
        "use_bidirectional_attention={c.bidirectional!r} of this {c.model_class}",
        lambda c: c.bidirectional not in (None, False, "vision"),
    ),
    # A token that does not run in the layer that caches has no keys in those that read them.
    Refusal(
        "decisions behind the first layer whose keys and values later layers reuse",
        "schedule must decide no later than the first layer whose keys and values later layers reuse, of this "
        "{c.model_class} at {c.deciding_layers}; got layer {c.unable_layer}",
        lambda c: c.unable_kind == "full_attention",
    ),
    Refusal(
        "decisions at layers without full attention",
        "schedule must decide at layers with full attention, of this {c.model_class} {c.deciding_layers}; got layer "
        "{c.unable_layer} of {c.unable_kind!r}",
        lambda c: c.unable_layer is not None,
    ),
    Refusal(
        "decisions right after a layer without full attention, if their ranking uses the previous layer",
        "schedule must decide after layers with full attention where the previous layer ranks, got layer "
        "{c.unranked_layer} after one of {c.unranked_kind!r}",
        lambda c: c.unranked_layer is not None,
    ),
    Refusal(
        "stages with layers that have neither full, sliding-window nor linear attention",
        "layers from the first decision on must be of type {c.accepted_kinds}, got {c.unknown_kind!r} at layer "
        "{c.unknown_layer} of this {c.model_class}",
        lambda c: c.unknown_layer is not None,
    ),
    Refusal(
        "the action `freeze` where a layer from the first decision on has no full attention",
        "action 'freeze' needs full attention in all layers from the first decision on, got {c.unfrozen_kind!r} at "
        "layer {c.unfrozen_layer} of this {c.model_class}",
        lambda c: c.unfrozen_layer is not None,
    ),
    Refusal(
        "the action `freeze` with an adapter of one's own that overrides `ranking` and not `rotated_keys`, or whose "
        "layers have no `v_proj` and which does not override `values`",
        "action 'freeze' needs an adapter that tells how layers cache keys and values (rotated_keys beside its own "
        "ranking, values where layers have no v_proj), got {c.adapter_class}",
        lambda c: c.caches_otherwise,
    ),
)
ATTENTION_RULES = (
    Refusal(
        "attention implementations whose masks transformers does not make",
        "attn_implementation must be one for which transformers makes masks of the form {c.accepted_formats}, got "
        "{c.implementation!r}",
        lambda c: c.mask_format is None,
    ),
    # A window counts rows there, and rows of a compact sequence are not neighbours.
    Refusal(
        "flash attention with sliding windows",
        "attn_implementation must not be flash attention for a text model with sliding windows, got "
        "{c.implementation!r}",
        lambda c: c.slides and c.uses_flash_attention,
    ),
    # It is causal by itself: the tokens of an image would not see those that follow.
    Refusal(
        "flash attention where the tokens of an image see each other",
        "attn_implementation must not be flash attention for a model in which the tokens of an image see each other, "
        "got {c.implementation!r}",
        lambda c: c.cuts_masks and c.uses_flash_attention,
    ),
    # It takes the last key for the last query's own, and the others in order.
    Refusal(
        "flash attention under the action `freeze`",
        "attn_implementation must not be flash attention under the action 'freeze', whose queries stand apart among "
        "the keys, got {c.implementation!r}",
        lambda c: c.freezes and c.uses_flash_attention,
    ),
)

# By a call with an image

MASK_SHAPE = Refusal(
    "an `attention_mask` of another shape than the conversation's",
    "attention_mask must be None or of shape {c.expected} for a routed prompt, got {c.mask_shape}",
    lambda c: c.mask is not None and c.valid is None,
)
CAUSAL = Refusal(
    "attention masks of four dimensions that are not causal with padding (packed sequences among them), or in which "
    "several tokens of padding on the right see themselves",
    "attention_mask of four dimensions must be causal with padding on a routed model, got one that differs from that "
    "in {c.unlike_causal} places",
    lambda c: c.unlike_causal,
)
IMAGE_MASK = Refusal(
    "attention masks of four dimensions, which `generate` makes for static caches, where the tokens of an image see "
    "each other",
    "attention_mask must have two dimensions for a model in which the tokens of an image see each other (generate "
    "makes one of four for a static cache), got {c.given_mask_shape}",
    lambda c: c.layers.cuts_masks and c.unlike_causal,
)
WINDOWS = Refusal(
    "one mask of four dimensions for layers with and without sliding windows",
    "attention_mask must have two dimensions, or be a dict of masks by the kind of layer, on a routed model with "
    "sliding windows, got {c.given_mask_shape} for {c.total} tokens",
    lambda c: c.has_one_mask_for_windows,
)
MASK_RULES = (MASK_SHAPE, IMAGE_MASK, CAUSAL)

PROMPT_RULES = (
    WINDOWS,
    # These layers do not read a mask of four dimensions: padding would go into their states.
    Refusal(
        "a mask of four dimensions of a padded prompt where layers have recurrent states",
        "attention_mask must be of shape {c.expected} for a padded prompt on a text model with recurrent states, got "
        "{c.given_mask_shape}",
        lambda c: c.mask is not None and not c.tells_padding and c.prompt.padded and c.layers.has_states,
    ),
    Refusal(
        "a routed `assistant_model`",
        "assistant_model must not be routed for a prompt with images, because transformers hands no image to a model "
        "that drafts; got a routed {c.layers.model_class}: route the model that it assists alone",
        lambda c: c.generation.drafts,
    ),
    Refusal(
        "several sequences packed into one row by `cu_seq_lens_*` or `seq_idx`",
        "{c.packing} must be None for a routed prompt, got {c.packing_shape}",
        lambda c: c.packing,
    ),
    Refusal(
        "several sequences packed into one row by `position_ids`",
        "position_ids of a routed prompt must count by one where transformers takes others for several packed "
        "sequences (without cache and mask, and under flash attention in a batch of one), got {c.counts[jumps]} that "
        "do not",
        lambda c: c.counts["jumps"] and not c.prompt.padded,
    ),
    # With a reducer, features that it has not marked are refused instead.
    Refusal(
        "placeholders without features",
        "input_ids must hold placeholders of images only beside their features ({c.features}), got {c.visual_tokens} "
        "and no features",
        lambda c: c.lacks_features and not c.is_reduced,
        ValueError,
    ),
    Refusal(
        "answers that begin at or before a visual token (`labels`, `answers_from`)",
        "answers_from must be positions behind the last visual token of each sample, got ones with "
        "{c.counts[early_answers]} visual tokens at or behind them",
        lambda c: c.counts["early_answers"],
        ValueError,
    ),
    Refusal(
        "activation tokens of PEFT's activated LoRA that stand before an image",
        "alora_invocation_tokens must stand behind the last visual token of each sample of a routed prompt, got "
        "{c.counts[activated]} visual tokens behind them",
        lambda c: c.is_activated and c.counts["activated"],
    ),
    Refusal(
        "PEFT's activated LoRA with padding on the right",
        "attention_mask must put padding on the left under activated LoRA (alora_invocation_tokens), which counts "
        "tokens from the end of a row, got padding on the right",
        lambda c: c.is_activated and c.prompt.right_padded,
    ),
    Refusal(
        "PEFT's activated LoRA under the action `freeze`",
        "action must not be 'freeze' under activated LoRA (alora_invocation_tokens), which counts tokens from the end "
        "of a row, got {c.policy}",
        lambda c: c.is_activated and c.layers.freezes,
    ),
    # Recomputed layers are kept from their cache, in whose place the frozen tokens' keys and values are.
    Refusal(
        "transformers' gradient checkpointing under the action `freeze`",
        "gradient checkpointing must be off under the action 'freeze', got it on: torch's checkpoint_wrapper may be "
        "put around the layers before apply",
        lambda c: c.layers.freezes and c.recomputes_without_cache,
    ),
    Refusal(
        "quantized caches, and static ones where layers have sliding windows or recurrent states, under flash "
        "attention, and where a decision is made at the first attention layer",
        "{c.cache_name} must be a {c.accepted_caches}, got {c.cache_class}{c.static_hint}",
        lambda c: not c.cache_is_accepted,
    ),
    Refusal(
        "a new image on a filled cache where the previous layer ranks or positions are contiguous",
        "{c.cache_name} must be empty where a prompt brings images and the previous layer ranks or positions are "
        "contiguous, got one with tokens and {c.policy}",
        lambda c: c.past and (c.policy.ranks_by_previous_layer or c.policy.positions == "contiguous"),
    ),
    Refusal(
        "a new image on a filled cache with a decision at the first attention layer, or a reducer",
        "{c.cache_name} must be empty where a prompt brings images and the first decision is at layer {c.first_layer}, "
        "by whose cache transformers counts tokens; got one with tokens",
        lambda c: c.past and c.layers.length_is_routed,
    ),
    # transformers finds the image by its place in the cache, which layers of stages hold in part.
    Refusal(
        "a new image on a filled cache where the tokens of an image see each other",
        "{c.cache_name} must be empty where a prompt brings images to a model in which the tokens of an image see each "
        "other, got one with tokens",
        lambda c: c.past and c.layers.cuts_masks,
    ),
    Refusal(
        "a new image on a filled cache that is offloaded",
        "{c.cache_name} must not be offloaded where a prompt brings images to a filled cache, got offloading",
        lambda c: c.past and getattr(c.cache, "offloading", False),
    ),
    Refusal(
        "a new image on a filled cache that holds prompts padded on the right",
        "{c.cache_name} must hold prompts padded on the left where a prompt brings images to a filled cache, got one "
        "padded on the right",
        lambda c: c.past and c.before is not None and c.before.right_padded,
    ),
    Refusal(
        "with a reducer, a prompt that ends with an image",
        "input_ids must end with text where there is a reducer, and so must what stands before an answer, got a "
        "dropped visual token at the end",
        lambda c: c.counts["last_dropped"],
        ValueError,
    ),
    Refusal(
        "assisted decoding with a decision at the first attention layer, or a reducer, where transformers crops the "
        "cache to a length, as older versions do",
        "schedule must begin after the first attention layer for assisted decoding, which cuts the cache by that "
        "layer's length; got a decision at layer {c.first_layer}",
        lambda c: c.generation.assisted and c.layers.length_is_routed and not c.generation.crops_by_count,
    ),
    Refusal(
        "assisted decoding on caches of hybrid models before transformers 5.6, which keep states of rejected tokens",
        "{c.cache_name} must be a DynamicCache for assisted decoding, got a model that makes a {c.adapter.own_cache}",
        lambda c: c.generation.assisted and c.adapter.own_cache,
    ),
    Refusal(
        "padding on the right beside a sample without a token",
        "attention_mask must put padding on the left where a sample sits a prompt out, got padding on the right "
        "beside a sample without a token",
        lambda c: c.prompt.right_padded and c.prompt.has_empty_rows,
    ),
    Refusal(
        "padding on the right where layers have sliding windows or recurrent states",
        "attention_mask must put padding on the left for a text model with layers of {c.layers.kinds_in_words}, got "
        "padding on the right",
        lambda c: c.prompt.right_padded and c.layers.pad_left,
    ),
    Refusal(
        "in `generate`, padding on the right where position ids have several axes and a prompt ends with an image",
        "attention_mask must put padding on the left in generate where position_ids have several axes and a prompt "
        "ends with an image, behind which generate and the model count on in two ways; got padding on the right and "
        "such a prompt",
        lambda c: (
            c.generation.generates
            and c.cache is not None
            and c.prompt.right_padded
            and c.prompt.ends_in_image
            and c.adapter.position_axes > 1
        ),
    ),
    Refusal(
        "tokens hidden between others where layers have recurrent states",
        "attention_mask must hide no tokens between others on a text model with recurrent states, which count them, "
        "got {c.counts[gaps]} that it hides",
        lambda c: c.counts["gaps"],
    ),
    Refusal(
        "`output_hidden_states` and `output_attentions`",
        "{c.asked_output} must be off for a routed prompt, got {c.asked_output_value}",
        lambda c: c.asked_output,
    ),
    Refusal(
        "transformers' gradient checkpointing before transformers 5.23, and layers wrapped for checkpointing after "
        "`apply`",
        "gradient checkpointing must be off for a routed prompt before transformers 5.23, got it on: torch's "
        "checkpoint_wrapper may be put around the layers before apply",
        lambda c: c.recomputes_hooks,
    ),
    Refusal(
        "a new image on a cache with recurrent states, of samples that keep different numbers of tokens",
        "input_ids that follow on a cache with recurrent states must keep equally many tokens of each sample, got "
        "{c.uneven_rows} at layer {c.uneven_layer}",
        lambda c: c.past and c.layers.has_states and c.uneven_stage is not None,
    ),
)

CHUNKED = Refusal(
    "a prompt prefilled in chunks by `generate` (`prefill_chunk_size`)",
    "prefill_chunk_size must be None for a routed prompt, or not below its length, because a chunk without the "
    "prompt's last token cannot rank by it; got {size} for {tokens} tokens",
)
PAGED_GRAPH = Refusal(
    "CUDA graphs in continuous batching",
    "use_cuda_graph must be False for continuous batching on a routed model, because a graph hides whether later "
    "requests bring images; got it on",
)
PAGED = Refusal(
    "images in continuous batching (`generate_batch`)",
    "inputs must be text in continuous batching (generate_batch, init_continuous_batching, transformers serve) on a "
    "routed model, because transformers takes no images there; got {count} visual tokens and a {cache}",
)
EXPORTED = Refusal(
    "an export of a prompt with images (`torch.export`, `torch.onnx.export`, `torch.jit.trace`)",
    "a routed model can be exported (torch.export, torch.onnx.export, torch.jit.trace) with input_ids of text alone, "
    "because how many tokens of a prompt with images run depends on input_ids; got one with images, embeddings or a "
    "routed cache: remove() the routing first",
)
REDUCER_TEXT = Refusal(
    "with a reducer that reads the prompt's text (CDPruner), images that are encoded outside of a call of the model or "
    "of `generate` with `input_ids`, or that do not fill their placeholders row by row",
    "reducer needs the text of the prompt in which images stand, which is known where they are encoded by a call of "
    "the model, or of generate, with input_ids; got {got}",
)
EMBEDS_ALONE = Refusal(
    "`inputs_embeds` without `input_ids` or features",
    "input_ids must be given to a routed model, or image features beside inputs_embeds, as visual tokens cannot be "
    "told from text in them; got inputs_embeds of shape {shape} alone",
    error=ValueError,
)
FOREIGN_FEATURES = Refusal(
    "with a reducer, image features that were computed without it",
    "image features must be computed by this model under this routing, where there is a reducer, got a prompt of "
    "{visual} visual tokens of which {dropped} were dropped by it and {foreign} by another",
    error=ValueError,
)
FIXED_ARGUMENT = Refusal(
    "with a reducer, features of another layer of the vision tower than the configuration's",
    "{name} must be {expected!r}, as in the configuration, where there is a reducer, got {got}",
)
REPLACED_DECODER = Refusal(
    "a decoder that was replaced after `apply`",
    "{name} must be the module that was routed, got another in its place: remove() the routing and apply the policy "
    "anew",
    error=ValueError,
)
REPLACED_LAYER = Refusal(
    "layers that were replaced after `apply`",
    "layers must be the modules that were routed, got another in the place of layer {layer_idx}: remove() the routing "
    "and apply the policy anew",
    error=ValueError,
)
DECODER_ALONE = Refusal(
    "calls of the decoder without the model around it",
    "{decoder} was called on its own: call the whole model, which knows where the visual tokens are, or remove() the "
    "routing first",
    error=RuntimeError,
)

# By a call that follows on a cache

EMBEDS_ON_CACHE = Refusal(
    "several `inputs_embeds` without `input_ids` or features",
    "input_ids must be given to a routed model, because visual tokens cannot be told from text in inputs_embeds; got "
    "{count} of these on a cache",
    error=ValueError,
)
UNFINISHED = Refusal(
    "a cache that a failed call filled",
    "{cache} must come from a finished call, got one that a call which failed filled",
    error=ValueError,
)
UNFINISHED_UNROUTED = Refusal(
    "a cache whose layers hold different numbers of tokens without a record of the routed prompt",
    "{cache} must come from a finished call, got layers of {lengths} cached tokens and no record of the routed prompt "
    "that filled them",
    error=ValueError,
)
HALF_RESET = Refusal(
    "a cache of which some layers were reset",
    "{cache} must hold the whole routed prompt or nothing, got layers of {lengths} cached tokens",
    error=ValueError,
)
CROPPED = Refusal(
    "a cache that was cropped into its routed prompt",
    "{cache} must hold the whole routed prompt, got {count} of its tokens cropped",
    error=ValueError,
)
UNEVEN = Refusal(
    "a cache whose layers hold different numbers of tokens behind the routed prompt",
    "{cache} must hold the same tokens in all layers after the routed prompt, got {counts} of them: a call on it "
    "failed",
    error=ValueError,
)
CONTINUATION_RULES = (
    Refusal(
        "a cache that another policy filled",
        "{c.cache_name} must have been filled under this policy, {c.policy}, got a cache filled under "
        "{c.record.policy}",
        lambda c: c.record.policy is not c.policy and c.record.policy != c.policy,
        ValueError,
    ),
    Refusal(
        "a number of samples that is no multiple of the prompt's, as when single samples of a cache were taken "
        "(`batch_select_indices`)",
        "input_ids must hold {c.record.batch} samples or a multiple of it, as the cached prompt, got {c.batch}",
        lambda c: c.batch % c.record.batch,
        ValueError,
    ),
)
CONTINUATION_MASK_RULES = (
    CAUSAL,
    WINDOWS,
    Refusal(
        "an `attention_mask` of another shape than the prompt with all tokens after it",
        "attention_mask must be None or of shape {c.expected}, the {c.length} tokens of the prompt and {c.new_tokens} "
        "after it, got {c.mask_shape}",
        lambda c: c.mask is not None and not c.is_padding_mask,
        ValueError,
    ),
    # `generate` cuts off the tokens that are cached, by the length of the first attention layer, which is not the
    # prompt's. `CallReader.new_tokens_alone` mends that where the loop tells how long the conversation is.
    Refusal(
        "a later turn without an `attention_mask` of the whole conversation, after a decision at the first attention "
        "layer or a reducer",
        "attention_mask of the whole conversation must be given, and input_ids of the new tokens alone, on a cache in "
        "which layer {c.first_layer} lacks tokens; got {c.queries} tokens and no mask",
        lambda c: c.mask is None and c.layers.length_is_routed and c.queries > 1 and not c.brings_new_tokens_alone,
    ),
)

# Of a prefill in a CUDA graph. Facts `c` are a `DecoderFacts`, of a call a `PrefillFacts`, of graphs.py

GRAPH_MODEL_RULES = (
    Refusal(
        "layers without full attention (sliding windows, recurrent states), before the first decision, too",
        "cuda_graph needs full attention in all layers, got layer {c.unable_layer} of {c.unable_kind!r}",
        lambda c: c.unable_layer is not None,
    ),
    Refusal(
        "models in which the tokens of an image see each other",
        "cuda_graph needs a model whose tokens see those before them alone, got one in which the tokens of an image "
        "see each other",
        lambda c: c.adapter.cuts_masks,
    ),
    Refusal(
        "decoders whose kinds of layers rotate in ways of their own",
        "cuda_graph needs a decoder with one rotary embedding for all layers, got a "
        "{c.adapter.model.__class__.__name__}, which has one for each kind",
        lambda c: c.adapter.rotates_by_kind,
    ),
    Refusal(
        "`TextRaters`, which reads a prompt's embeddings, and rankings outside of `reroute_kernels.rankings`, whose "
        "shapes may depend on data",
        "cuda_graph needs a ranking of reroute_kernels.rankings other than TextRaters, got {c.own_ranking!r}",
        lambda c: c.own_ranking is not None,
    ),
    Refusal(
        "the action `freeze`",
        "cuda_graph needs the action 'reroute' or 'remove', got {c.policy.action!r}",
        lambda c: c.freezes,
    ),
    Refusal(
        "heads split over processes",
        "cuda_graph needs all attention heads on each process, got a model under tensor parallelism",
        lambda c: c.head_group is not None,
    ),
    Refusal(
        "decoders with other parts than embeddings, layers, a norm and a rotary embedding",
        "cuda_graph needs a decoder of {c.known_parts} alone, got one with {c.unknown_part!r}",
        lambda c: c.unknown_part is not None,
    ),
    Refusal(
        "decoders that scale the embeddings (HyperCLOVA X, Granite)",
        "cuda_graph needs a decoder that takes embeddings as they are, got one that multiplies them by "
        "{c.embedding_scale}",
        lambda c: c.embedding_scale != 1.0,
    ),
    Refusal(
        "decoders that take more of each token than its embedding (ERNIE 4.5 VL, Granite Vision)",
        "cuda_graph needs a decoder that takes embeddings alone, got one with {c.token_argument!r}",
        lambda c: c.token_argument is not None,
    ),
    Refusal(
        "layers inside what `torch.compile` or activation checkpointing put around them",
        "cuda_graph needs decoder layers that nothing is put around, got {c.wrapped_layer}",
        lambda c: c.wrapped_layer is not None,
    ),
    Refusal(
        "adapters of PEFT that are not merged",
        "cuda_graph needs a decoder without adapters of PEFT (merge_and_unload), got a {c.peft_module}",
        lambda c: c.peft_module is not None,
    ),
    Refusal(
        "mixtures of experts that ask the device which experts are hit (`experts_implementation`)",
        "cuda_graph needs experts_implementation to be {c.accepted_experts}, got {c.experts!r}",
        lambda c: c.experts not in c.static_experts,
    ),
    Refusal(
        "attention implementations without masks of fixed shape (flex attention)",
        "cuda_graph needs an attn_implementation with masks of the form {c.accepted_forms}, got {c.implementation!r}",
        lambda c: c.form not in c.static_forms,
    ),
    Refusal(
        "contiguous positions where the rotary embedding depends on the length",
        "cuda_graph needs a rotary embedding of fixed frequencies where positions are contiguous, got {c.rope_type!r}",
        lambda c: c.rotates_by_length,
    ),
    Refusal(
        "devices without CUDA graphs",
        "cuda_graph needs a model on a CUDA device, got {c.device}",
        lambda c: not c.device_captures,
    ),
)
GRAPH_CALL_RULES = (
    Refusal(
        "calls that `torch.compile` compiles",
        "cuda_graph needs a call that torch.compile does not compile, got one that it does",
        lambda c: c.is_compiled,
    ),
    Refusal(
        "gradients",
        "cuda_graph needs torch.no_grad or torch.inference_mode around a call, got gradients enabled",
        lambda c: c.has_gradients,
    ),
    Refusal(
        "a model in training mode",
        "cuda_graph needs a model in evaluation mode (model.eval), got training mode",
        lambda c: c.is_training,
    ),
    Refusal(
        "modes of PyTorch that are told of every operation (FLOP counters)",
        "cuda_graph needs a call outside of modes that are told of every operation, got one inside",
        lambda c: c.is_watched,
    ),
    Refusal("autocast", "cuda_graph needs autocast to be off, got it on", lambda c: c.is_autocast),
    Refusal(
        "accelerate's offloading and placement, and any other `forward` of an instance in the decoder",
        "cuda_graph needs modules of the decoder with the forward of their class, got a {c.replaced_module} with "
        "another (accelerate puts one there)",
        lambda c: c.replaced_module is not None,
    ),
    Refusal(
        "forward hooks of others in the decoder",
        "cuda_graph needs a decoder without forward hooks of others, got one on a {c.hooked_module}",
        lambda c: c.hooked_module is not None,
    ),
    Refusal(
        "a cache that holds tokens already",
        "cuda_graph needs an empty {c.cache_name}, got one with tokens",
        lambda c: c.has_past,
    ),
    Refusal(
        "caches other than `DynamicCache`, and offloaded ones",
        "cuda_graph needs {c.cache_name} to be a DynamicCache on the device, got {c.cache_class}",
        lambda c: not c.cache_is_plain,
    ),
    Refusal(
        "draft tokens, and answers that are scored with their prompt",
        "cuda_graph needs a prompt whose last token ranks, got tokens behind that one",
        lambda c: c.ranks_within,
    ),
    Refusal(
        "flash attention in a padded batch",
        "cuda_graph needs prompts of one length under flash attention, got a padded batch",
        lambda c: c.is_padded and c.form == "flash_attention",
    ),
    Refusal(
        "other arguments that reach the decoder (`output_router_logits`, `return_dict=False` among them)",
        "cuda_graph needs a call without {c.unknown_argument}, which changes the decoder's work; got it given",
        lambda c: c.unknown_argument is not None,
    ),
)
UNROUTED_MASK = Refusal(
    "without a routing, attention masks of four dimensions",
    "cuda_graph needs an attention_mask of two dimensions where nothing is routed, got a {mask} of others",
)
CAPTURE_FAILED = Refusal(
    "operations that CUDA refuses to capture",
    "cuda_graph needs layers that can be captured, got {failure}",
)

PAGE: dict[str, tuple[Refusal, ...]] = {
    "By `apply`": (
        MODEL_TYPE,
        OTHER_KIND,
        TEXT_MODEL,
        DTYPE,
        *LAYER_RULES,
        *ATTENTION_RULES,
        SHARDED,
        REDUCER_FAMILY,
        REDUCER_TOWER,
        REDUCER_SPLIT_HEADS,
        REDUCER_SHARED_TOWER,
    ),
    "By a call with an image": (
        *MASK_RULES,
        *PROMPT_RULES,
        EMBEDS_ALONE,
        CHUNKED,
        PAGED,
        PAGED_GRAPH,
        EXPORTED,
        REDUCER_TEXT,
        FOREIGN_FEATURES,
        FIXED_ARGUMENT,
        REPLACED_DECODER,
        REPLACED_LAYER,
        DECODER_ALONE,
        HEADS_SPLIT_OTHERWISE,
        HEADS_SPLIT_UNEVENLY,
    ),
    "By a call on a cache that a routed prompt filled": (
        *CONTINUATION_RULES,
        *(rule for rule in CONTINUATION_MASK_RULES if rule not in (CAUSAL, WINDOWS)),
        EMBEDS_ON_CACHE,
        UNFINISHED,
        UNFINISHED_UNROUTED,
        HALF_RESET,
        CROPPED,
        UNEVEN,
    ),
    'By `cuda_graph="require"`; with `cuda_graph=True` it runs without a graph, after one warning': (
        *GRAPH_MODEL_RULES,
        *GRAPH_CALL_RULES,
        UNROUTED_MASK,
        CAPTURE_FAILED,
    ),
}
"""The refusals as docs/refusals.md lists them."""

SILENT = (
    "a prompt that a caller other than `generate` prefills in chunks, or ends with draft tokens",
    "a cache whose rows are put in another order across prompts with different numbers of kept tokens "
    "(`cache.reorder_cache`, `batch_select_indices`; beam search stays within each), or which is rebuilt from its "
    "tensors",
    "a mask of four dimensions in which one token of padding on the right sees itself, as the last token of a prompt "
    "does",
    "a later mask that shows tokens which the prompt's own mask hid: they were not cached in the stages",
    "image features of which a reducer saw some images only, or none after it once left an image whole",
    "another model that shares the vision tower of one with a reducer: its features are reduced too",
    "under tensor parallelism, a reducer that does not choose the same tokens on every process",
    "decoding outside the `with` block: the masks of a routed cache come from the hooks",
)
"""Limits that cannot be noticed, because nothing in the call tells them."""
