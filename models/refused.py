"""Types of transformers' image-text-to-text models that are not routed, each with the reason.

A reason goes on where the type is named: "got 'mllama', whose text layers read images through cross-attention". The
tests hold each against the source of the type, and tell of types of a newer transformers that are neither here nor in
`ADAPTERS`.
"""

from __future__ import annotations

BIDIRECTIONAL = "whose image tokens attend in both directions"
CROSS_ATTENTION = "whose text layers read images through cross-attention: no image tokens stand among the text"
ENCODER_DECODER = "whose decoder reads images through an encoder: no image tokens stand among the text"
QUERY_TRANSFORMER = "whose query transformer leaves a small, fixed number of tokens of an image, whatever its size"
ACTIONS = "which denoises actions of a robot; image tokens attend in both directions"
DIFFUSION = "which denoises blocks of text; its image tokens attend in both directions"
BEFORE_TEXT = "whose image tokens stand before the text without placeholders, and attend in both directions"
MARKED_BY_MASK = "whose image tokens are told by a mask (image_embeds_position_mask), not by a token id"
FUSED_PROJECTION = "whose text layers have one projection for queries, keys and values"
NO_DECODER = "whose decoder layers are part of the model that merges images: there is no decoder to be called alone"
HEAD_INSIDE = "whose decoder is a whole causal language model, and whose layers see chunks of the sequence"
MAMBA = "whose decoder is a whole causal language model with Mamba layers"
PER_LAYER_INPUTS = "whose layers take inputs of their own for each token, and share keys"
SHORT_CONVOLUTIONS = "whose layers run short convolutions over neighbouring tokens beside attention"
SCALED_BY_POSITION = "whose queries are scaled by their positions, which no adapter knows yet"
INDEXER = "whose attention is sparse: an indexer with a cache of its own chooses the keys"
HEADS_DIFFER = "whose layers have different numbers of heads, which no adapter knows yet"
REFERENCE_WINDOW = "whose text layers see a window and the image beyond it (reference_sliding_attention)"
NUMBERED_OVER_BATCH = "whose images are numbered over the whole batch, so that a sample depends on those before it"
TOWER = "which is a vision tower alone; the model around it is a llava"

REFUSED: dict[str, str] = {
    "blip": CROSS_ATTENTION,
    "blip-2": QUERY_TRANSFORMER,
    "chameleon": NO_DECODER,
    "diffusion_gemma": DIFFUSION,
    "dots3_note": INDEXER,
    "evolla": CROSS_ATTENTION,
    "florence2": ENCODER_DECODER,
    "fuyu": FUSED_PROJECTION,
    "gemma3n": PER_LAYER_INPUTS,
    "git": BEFORE_TEXT,
    "glm5_next": INDEXER,
    "hunyuan_vl": NUMBERED_OVER_BATCH,
    "hy_v4_vl": INDEXER,
    "idefics": CROSS_ATTENTION,
    "inkling2": SHORT_CONVOLUTIONS,
    "inkling2_loop": SHORT_CONVOLUTIONS,
    "inkling_mm_model": SHORT_CONVOLUTIONS,
    "instructblip": QUERY_TRANSFORMER,
    "instructblipvideo": QUERY_TRANSFORMER,
    "kosmos-2": MARKED_BY_MASK,
    "kosmos-2.5": MARKED_BY_MASK,
    "llama4": HEAD_INSIDE,
    "minimax_m3_vl": INDEXER,
    "mistral4": SCALED_BY_POSITION,
    "mistral_large4": INDEXER,
    "mllama": CROSS_ATTENTION,
    "molmo2": BIDIRECTIONAL,
    "nemotron_h_omni": MAMBA,
    "pi0": ACTIONS,
    "pix2struct": ENCODER_DECODER,
    "pp_formulanet": ENCODER_DECODER,
    "pixtral": TOWER,
    "qwen4_exp": INDEXER,
    "step3p7": HEADS_DIFFER,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "unlimited_ocr": REFERENCE_WINDOW,
    "vision-encoder-decoder": ENCODER_DECODER,
}
"""Reason for each `config.model_type` that `apply` refuses by name."""
