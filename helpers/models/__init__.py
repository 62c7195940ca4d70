"""How a checkpoint gets into memory, proven: profiles, the hub, loading, quantization, chat formats."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "checkpoint": ["LoadError", "record"],
        "devices": ["device_map_for"],
        "finding": ["config", "prepare", "resolve"],
        "finite": ["NotFiniteError"],
        "formats": [
            "ChatFormat",
            "FORMATS",
            "MessageError",
            "PromptTooLong",
            "format_for",
            "published_format_prompt",
        ],
        "layers": ["quantizable_layers", "stored_bytes"],
        "loaded": ["LoadReport", "Loaded", "context_tokens", "report_table"],
        "loading": ["LoadOptions", "load", "save", "tidy_output", "unload"],
        "profiles": ["ProfileError", "available", "downloaded_bytes", "load_profile", "missing", "table", "times"],
        "quantization": [
            "LayerError",
            "NF4_TAIL",
            "QuantizationError",
            "bnb_config",
            "layer_errors",
            "nf4_code",
            "verify_quantized",
        ],
        "quantization_by_hand": [
            "absmax_int8",
            "double_quantized",
            "equal_to_bitsandbytes",
            "int8_equals_bitsandbytes",
            "int8_product",
            "layer_inputs",
            "nf4",
            "nf4_equals_bitsandbytes",
            "relative_error",
            "scaled_blocks",
        ],
        "references": ["Budget", "ModelRef", "Profile", "Requirement"],
        "tokens": ["encode"],
        "workarounds.grouped_cache": ["grouped_cache"],
        "workarounds.nf4_repacking": ["may_repack"],
    },
)
