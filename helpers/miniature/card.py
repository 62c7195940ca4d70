"""The full evaluation of falcon-mini and the model card written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import plots
from helpers.evaluation import perplexity
from helpers.loading import load, unload
from helpers.miniature import quality
from helpers.miniature.texts import read_text, read_texts
from helpers.miniature.training import HELD_OUT, LOG
from helpers.types import ROOT, Interval, Loaded, ModelRef

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITY = "quality.json"
CURVE = "training_curve.png"
TEMPLATE = ROOT / "env" / "models" / "falcon-mini" / "card.md.jinja"
SAMPLES = 4  # of the continuations
EVERY = 10  # so many held-out messages from one sample to the next


class CurvePoint(NamedTuple):
    """A point of the log on the axis of all phases' steps; losses in nats a token, None where not taken."""

    step: int
    loss: float | None
    held_out_loss: float | None


def measure(models: Path, judge: ModelRef) -> dict[str, Any]:
    """Every figure of the card, in fp32, from the two checkpoints in ``models``; the judge reads the continuations.

    Raises DataError for missing held-out texts or a missing log, LoadError for a missing checkpoint.
    """
    read_text(models / "falcon-mini" / LOG)
    stories, messages = (read_texts(models / name / HELD_OUT) for name in ("falcon-mini", "falcon-mini-chat"))
    base, judging = _load(models / "falcon-mini", "plain"), load(judge, "fp32")
    found = _base_figures(base, judging, stories)
    unload(base)
    unload(judging)
    chat = _load(models / "falcon-mini-chat", "falcon-chat")
    found |= _chat_figures(chat, messages)
    unload(chat)
    return found


def curve(log: Path, subject: str) -> Figure:
    """The training log as a figure. Raises DataError where there is none."""
    rows = [json.loads(line) for line in read_text(log).splitlines()]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    lengths = {phase: max(row["step"] for row in rows if row["phase"] == phase) for phase in phases}
    before = {phase: sum(lengths[earlier] for earlier in phases[:place]) for place, phase in enumerate(phases)}
    points = [CurvePoint(before[row["phase"]] + row["step"], row.get("loss"), row.get("held_out_loss")) for row in rows]
    return plots.loss_curve(points, sum(lengths.values()), subject, title="Loss while training")


def write(models: Path, figures: Mapping[str, Any]) -> None:
    """quality.json, the curves and the model card, from the figures that ``measure`` gave."""
    folder = models / "falcon-mini"
    (folder / QUALITY).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("falcon-mini", "falcon-mini-chat"):
        (models / name / CURVE).write_bytes(plots.png(curve(models / name / LOG, name)))
    (folder / "README.md").write_text(text(folder), encoding="utf-8")


def text(folder: Path) -> str:
    """The model card of falcon-mini's folder, from the project's template and the folder's quality.json."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    figures = json.loads((folder / QUALITY).read_text(encoding="utf-8"))
    stories = {"task_type": "text-generation", "dataset_type": "roneneldan/TinyStories", "dataset_name": "TinyStories"}
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["falcon", "miniature", "stand-in"],
        datasets=["roneneldan/TinyStories", "google/Synthetic-Persona-Chat", "databricks/databricks-dolly-15k"],
        model_name="falcon-mini",
        eval_results=[
            EvalResult(**stories, metric_type="bits_per_byte", metric_value=figures["bits_per_byte"]),
            EvalResult(**stories, metric_type="perplexity_ratio", metric_value=figures["perplexity_ratio"]),
        ],
    )
    template = TEMPLATE.read_text(encoding="utf-8")
    return str(ModelCard.from_template(data, template_str=template, interval=_interval, **figures)).rstrip() + "\n"


def _load(folder: Path, chat_format: str) -> Loaded:
    return load(ModelRef(str(folder.resolve()), family="falcon", format=chat_format, source="embedded"), "fp32")


def _base_figures(base: Loaded, judge: Loaded, stories: Sequence[str]) -> dict[str, Any]:
    fluent = quality.fluency(base, judge, stories)
    config = base.model.config
    embedding = base.model.get_input_embeddings().weight.numel()
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
        "thread": _rounded(quality.follows_the_thread(base, stories)),
        "story_samples": [list(sample) for sample in fluent.samples[:SAMPLES]],
    }


def _chat_figures(chat: Loaded, messages: Sequence[str]) -> dict[str, Any]:
    talk, choices = quality.chat_replies(chat, messages), quality.two_choices(chat)
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
        "chat_samples_every": EVERY,
        "chat_samples": pairs[::EVERY],
    }


def _interval(values: Sequence[float]) -> str:
    """``0.95 (0.89 to 0.98)``."""
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def _rounded(interval: Interval) -> list[float]:
    """Estimate, low, high."""
    return [round(value, 4) for value in (interval.estimate, interval.low, interval.high)]
