"""Names of Gemma 3n's weights in checkpoints of other classes and ages, and those that no class here has a use for."""

from __future__ import annotations

#: Keys and values of layers that read another layer's are in the hub's files and were never used.
UNUSED = (
    r"(model\.)?(language_model\.)?(model\.)?layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm)\.",
    r"(.*\.)?rotary_emb\.",
)

#: The towers of the whole model with their embedders, which a text model leaves aside.
VISION = r"(model\.)?(vision_tower|embed_vision)\."
AUDIO = r"(model\.)?(audio_tower|embed_audio)\."
NOT_TEXT = (VISION, AUDIO)

#: What a text model calls the weights of the whole model.
TEXT_NAMES = (
    (r"^(model\.)?language_model\.(model\.)?", "model."),
    (r"^model\.lm_head\.", "lm_head."),
)

#: Names of the whole model before its parts were gathered under "model.", and of the model without its head.
WHOLE_NAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(language_model|vision_tower|audio_tower|embed_vision|embed_audio)\.", r"model.\1."),
)
