"""The full evaluation of falcon-mini and the model card written from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from helpers.base.files import ROOT
from helpers.base.hashes import write_hashes
from helpers.evaluation.likelihood import perplexity
from helpers.figures.replies import loss_curve
from helpers.figures.style import png
from helpers.models.loading import load, unload
from helpers.models.references import ModelRef
from helpers.training.miniature.quality import _chat_replies, _fluency, _follows_the_thread, _two_choices
from helpers.training.miniature.texts import _read_rows, _read_text, _read_texts
from helpers.training.miniature.training import HELD_OUT, LOG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from torch.nn import Embedding

    from helpers.base.stats import Interval
    from helpers.models.loaded import Loaded

_QUALITY = "quality.json"
_CURVE = "training_curve.png"
_TEMPLATE = ROOT / "env" / "models" / "falcon-mini" / "card.md.jinja"
_SAMPLES = 4  # of the continuations
_EVERY = 10  # one sample for this many held-out messages


def measure(models: Path, judge: ModelRef) -> dict[str, Any]:
    """Every figure of the card, in fp32, from the two checkpoints in ``models``; the judge scores the continuations.

    Raises WorkbookError if the held-out texts or the log are missing, LoadError if a checkpoint is missing.
    """
    _read_text(models / "falcon-mini" / LOG)  # a missing log is reported now, not after minutes
    stories = _read_texts(models / "falcon-mini" / HELD_OUT)
    messages = _read_texts(models / "falcon-mini-chat" / HELD_OUT)
    base, judging = _load(models / "falcon-mini", "plain"), load(judge, "fp32")
    figures = _base_figures(base, judging, stories)
    unload(base)
    unload(judging)
    chat = _load(models / "falcon-mini-chat", "falcon-chat")
    figures |= _chat_figures(chat, messages)
    unload(chat)
    return figures


def write(models: Path, figures: Mapping[str, Any]) -> None:
    """Write quality.json, the curves and the model card from the figures that ``measure`` returned.

    The recorded hashes follow quality.json.
    """
    folder = models / "falcon-mini"
    (folder / _QUALITY).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("falcon-mini", "falcon-mini-chat"):
        (models / name / _CURVE).write_bytes(png(_curve(models / name / LOG, name)))
    (folder / "README.md").write_text(_text(folder), encoding="utf-8")
    write_hashes(folder, folder.name)


def _load(folder: Path, chat_format: Literal["plain", "falcon-chat"]) -> Loaded:
    ref = ModelRef(str(folder.resolve()), family="falcon", format=chat_format, source="embedded")
    return load(ref, "fp32")


def _base_figures(base: Loaded, judge: Loaded, stories: Sequence[str]) -> dict[str, Any]:
    fluent = _fluency(base, judge, stories)
    config = base.model.config
    embedding = cast("Embedding", base.model.get_input_embeddings()).weight.numel()
    return {
        "parameters": base.report.parameters,
        "parameters_outside_embedding": base.report.parameters - embedding,
        "stories": len(stories),
        "bits_per_byte": round(perplexity(base, stories).bits_per_byte, 4),
        "judge_bits_per_byte": round(perplexity(judge, stories).bits_per_byte, 4),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": f"{config.num_attention_heads}, {config.num_kv_heads}, {config.head_dim}",
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "continuations": len(fluent.samples),
        "perplexity_ratio": round(fluent.perplexity_ratio, 3),
        "trigram_ratio": round(fluent.trigram_ratio, 3),
        "pooled_trigram_ratio": round(fluent.pooled_trigram_ratio, 3),
        "thread": _rounded(_follows_the_thread(base, stories)),
        "story_samples": [list(sample) for sample in fluent.samples[:_SAMPLES]],
    }


def _chat_figures(chat: Loaded, messages: Sequence[str]) -> dict[str, Any]:
    talk, choices = _chat_replies(chat, messages), _two_choices(chat)
    pairs = [[message, reply.text] for message, reply in zip(talk.messages, talk.replies, strict=True)]
    return {
        "messages": len(messages),
        "ended": _rounded(talk.ended),
        "speaking_for_the_user": _rounded(talk.speaking_for_the_user),
        "repeating": _rounded(talk.repeating),
        "choices": len(choices.questions),
        "choice_accuracy": _rounded(choices.accuracy),
        "choice_control": _rounded(choices.control),
        "choice_balanced": _rounded(choices.balanced),
        "written_balanced": _rounded(choices.written_balanced),
        "chat_samples_every": _EVERY,
        "chat_samples": pairs[::_EVERY],
    }


def _rounded(interval: Interval) -> list[float]:
    """Estimate, low, high."""
    return [round(value, 4) for value in (interval.estimate, interval.low, interval.high)]


class _CurvePoint(NamedTuple):
    """A point of the log on an axis with the steps of all phases; losses in nats per token, None if not measured."""

    step: int
    loss: float | None
    held_out_loss: float | None


def _curve(log: Path, subject: str) -> Figure:
    """The training log as a figure, one phase after the other. Raises WorkbookError if the log is missing."""
    points: list[_CurvePoint] = []
    phase, before, last = "", 0, 0
    for row in cast("list[dict[str, Any]]", _read_rows(log, "phase", "step")):
        # each phase counts its steps from 0
        if row["phase"] != phase:
            phase, before = row["phase"], last
        step = before + row["step"]
        last = max(last, step)
        points.append(_CurvePoint(step, row.get("loss"), row.get("held_out_loss")))
    return loss_curve(points, last, subject, title="Loss while training")


def _text(folder: Path) -> str:
    """The model card of falcon-mini's folder, from the project's template and the folder's quality.json."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    figures = json.loads((folder / _QUALITY).read_text(encoding="utf-8"))
    results = []
    for name in ("bits_per_byte", "perplexity_ratio"):
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="roneneldan/TinyStories",
                dataset_name="TinyStories",
                metric_type=name,
                metric_value=figures[name],
            )
        )
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["falcon", "miniature", "stand-in"],
        datasets=["roneneldan/TinyStories", "google/Synthetic-Persona-Chat", "databricks/databricks-dolly-15k"],
        model_name="falcon-mini",
        eval_results=results,
    )
    template = _TEMPLATE.read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, interval=_interval, **figures)
    return str(card).rstrip() + "\n"


def _interval(values: Sequence[float]) -> str:
    """``0.95 (0.89 to 0.98)``."""
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"
