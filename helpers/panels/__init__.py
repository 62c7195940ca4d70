"""What a person plays with: the chat panel, the comparison panel, the memory planner; and HTML of texts and tokens.

If nobody is there to play (``settings.unattended``) the same call gives a static view.
"""

from helpers.panels.chat import ChatPanel, chat_panel
from helpers.panels.comparison import ComparisonPanel, comparison_panel
from helpers.panels.curve import LiveCurve
from helpers.panels.html import (
    MARKS,
    TRAINED,
    Html,
    prompt_html,
    replies_html,
    reply_summary,
    scrolled,
    show,
    tokens_html,
    trained_tokens_html,
    transcript_html,
)
from helpers.panels.memory import (
    MemoryPlanner,
    Plan,
    Setup,
    memory_planner,
    plan,
    plan_figures,
    plan_html,
    verdict_text,
)

__all__ = [
    "MARKS",
    "TRAINED",
    "ChatPanel",
    "ComparisonPanel",
    "Html",
    "LiveCurve",
    "MemoryPlanner",
    "Plan",
    "Setup",
    "chat_panel",
    "comparison_panel",
    "memory_planner",
    "plan",
    "plan_figures",
    "plan_html",
    "prompt_html",
    "replies_html",
    "reply_summary",
    "scrolled",
    "show",
    "tokens_html",
    "trained_tokens_html",
    "transcript_html",
    "verdict_text",
]
