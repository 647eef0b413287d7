"""Names of Gemma 4's weights in checkpoints of other classes and ages, and those that no class here has a use for."""

from __future__ import annotations

#: Layers that read another layer's keys and values have none of their own; early files hold some all the same.
UNUSED = (
    r"(model\.)?(language_model\.)?(model\.)?layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.",
    r"(.*\.)?rotary_emb\.",
)

#: Parts of the whole model that a text model leaves aside.
NOT_TEXT = (r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder)\.",)

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

#: Names of the 12B's picture embedder in the hub's file.
UNIFIED_NAMES = (
    *WHOLE_NAMES,
    (r"^model\.embed_vision\.embedding_projection\.", "model.embed_vision.multimodal_embedder.embedding_projection."),
    (r"^model\.vision_embedder\.", "model.embed_vision."),
)
