"""How weights change: fine-tuning with adapters, and the miniature Falcon."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "adapters": ["merge", "reload"],
        "conversations": ["Conversations", "examples", "read_conversations", "token_counts"],
        "finetuning": ["finetune"],
        "recipe": ["FinetuneError", "Point", "Recipe", "TARGETS", "TrainingStoppedError"],
        "stages": ["stored_stage"],
    },
)
