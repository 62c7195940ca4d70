"""What a reader clicks in a notebook: chat, comparison, memory planner."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "chat": ["chat_panel"],
        "comparison": ["comparison_panel"],
        "html": ["TRAINED", "replies_html", "tokens_html", "trained_tokens_html"],
        "memory": ["memory_planner"],
        "widgets": ["LiveCurve"],
    },
)
