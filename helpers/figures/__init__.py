"""How it looks as a picture: the figures of notebooks and reports, by subject."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "drawings": ["decoder_layer", "lora_and_qlora", "loss_tokens", "quantization_grids", "shared_heads"],
        "memory": ["cache_growth", "memory_by_precision", "parameter_breakdown", "placement", "training_compute"],
        "precision": ["layer_errors", "logit_differences", "nf4_code", "precision_comparison", "quality_against_bytes"],
        "replies": [
            "loss_curve",
            "next_token_probabilities",
            "reply_classes",
            "score_intervals",
            "token_times",
            "visible",
        ],
        "speed": ["cache_speed", "engine_speeds", "speed_against_bytes"],
        "style": ["BLUE", "PALETTE", "png"],
    },
)
