"""How tokens come out: sampling, streaming, stop strings, decoding strategies, conversations."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "chat": ["Chat", "play"],
        "decoding": ["Decoding", "PLAIN", "cannot_compile", "for_profile"],
        "generating": [
            "Candidate",
            "generate",
            "generate_batch",
            "next_token_probabilities",
            "stream",
        ],
        "sampling": ["Reply", "Sampling"],
    },
)
