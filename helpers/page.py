"""What the pages about runs have in common: how a template is filled, and the words for times and machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from helpers.schema import Hardware, UnknownHardware
from helpers.types import gib

ROLES = {"falcon": "Falcon, base", "falcon_chat": "Falcon, chat", "llama_chat": "Llama, chat"}
_TEMPLATES = Path(__file__).parent


def page(template: str, content: Mapping[str, object]) -> str:
    """Fill a template of this folder with ``content``, which is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(content)


def duration(seconds: float | None) -> str:
    """Format seconds for people: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        large, small, units = whole // 60, whole % 60, ("min", "s")
    else:
        large, small, units = whole // 3600, whole % 3600 // 60, ("h", "min")
    return f"{large} {units[0]} {small} {units[1]}" if small else f"{large} {units[0]}"


def machine(hardware: Hardware | UnknownHardware) -> str:
    """Describe the machine of a run in half a sentence."""
    if isinstance(hardware, UnknownHardware):
        return "an unknown machine"
    return gpus(hardware) or f"{hardware.cpu_count} processor cores without a GPU"


def gpus(hardware: Hardware) -> str:
    """List the GPUs of a machine, equal ones together; empty if there is none."""
    counts = Counter(f"{gpu.name} ({gib(gpu.total_bytes)})" for gpu in hardware.gpus)
    return ", ".join(f"{count} × {name}" for name, count in counts.items())
