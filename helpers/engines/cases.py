"""What is measured: the models, their prompts, the sizes, and the least that a step must read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import bench, loading, memory
from helpers.engines.catalogue import Ids
from helpers.types import ROOT, ModelRef, Profile, WorkbookError, choose

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONTEXTS, BATCHES, NEW_TOKENS, REPEATS = (128, 512, 1900), (1, 4, 16), 32, 5
# Falcon-180B has 232 query heads on 8 key-value heads of size 64 in 80 layers: few key-value heads for many queries.
SHAPE = {
    "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 64, "num_kv_heads": 4,
    "max_position_embeddings": 2048, "new_decoder_architecture": True, "multi_query": True, "parallel_attn": True,
    "num_ln_in_parallel_attn": 2, "alibi": False, "bias": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SHAPE_NAME = "falcon-shape-8x1024"


@dataclass(frozen=True)
class Case:
    """One size of work: ``context`` tokens of each of ``batch_size`` sequences, the last ``new_tokens`` generated."""

    context: int
    batch_size: int
    new_tokens: int = NEW_TOKENS

    @property
    def prompt_tokens(self) -> int:
        """The tokens that are given."""
        return self.context - self.new_tokens

    def exceeds(self, other: Case) -> bool:
        """Whether it is at least as large as another in every way."""
        return self.context >= other.context and self.batch_size >= other.batch_size


@dataclass(frozen=True)
class Subject:
    """A model with its checkpoint's folder."""

    ref: ModelRef
    folder: Path
    config: PreTrainedConfig
    name: str

    @property
    def label(self) -> str:
        """What titles and tables call it; a stand-in, and random weights, are named as such."""
        if self.ref.name == SHAPE_NAME:
            return f"{SHAPE_NAME} (random weights: 8 layers, hidden 1,024, 64 query and 4 key-value heads)"
        return self.ref.label

    def lacks(self, case: Case) -> str:
        """Why a case cannot be run on this model; empty where it can."""
        limit = self.config.max_position_embeddings
        return f"the model's context ends at {limit:,} tokens" if case.context > limit else ""

    def prompts(self, case: Case) -> Ids:
        """Token ids of a plain text, of exactly the case's length; each row begins elsewhere."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return bench.prompt_rows(tokenizer, case.batch_size, case.prompt_tokens).tolist()

    def step_bytes(self, case: Case, precision: str) -> int:
        """What one decoding step reads at least: the weights once, and the key-value heads of half-finished replies.

        Embeddings that are not the head's are not counted: a step reads one row of them for each sequence.
        """
        weights = memory.weight_bytes(self.config, precision)
        if not self.config.tie_word_embeddings:
            weights -= self.config.vocab_size * self.config.hidden_size * memory.element_bytes(precision)
        cached = case.batch_size * (case.context - case.new_tokens // 2)
        return weights + cached * memory.kv_bytes_per_token(self.config, precision, heads="kv")


def subjects(profile: Profile, names: Sequence[str] = ()) -> list[Subject]:
    """The chat models of a profile and the shape, or those of ``names``: falcon, falcon_chat, llama_chat, shape.

    Raises WorkbookError for an unknown name, LoadError where a model cannot be had.
    """
    known = [*profile.models, "shape"]
    for name in names:
        choose(name, known, "model")
    return [_subject(profile, name) for name in known if name in (names or ("falcon_chat", "llama_chat", "shape"))]


def _subject(profile: Profile, name: str) -> Subject:
    ref = shape_ref(ROOT / ".cache" / "bench") if name == "shape" else profile.models[name]
    return Subject(ref, loading.resolve(ref), loading.config(ref), name)


def shape_ref(parent: Path) -> ModelRef:
    """A bfloat16 Falcon of random weights in Falcon-180B's proportions, made once, with falcon-mini's tokenizer."""
    import torch
    from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

    folder = parent / SHAPE_NAME
    if not folder.is_dir():
        partial = folder.with_name(f"{SHAPE_NAME}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            FalconForCausalLM(FalconConfig(**SHAPE, dtype="bfloat16")).to(torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(ROOT / "env" / "models" / "falcon-mini").save_pretrained(partial)
        partial.rename(folder)
    return ModelRef(id=str(folder), family="falcon", format="plain", source="embedded")


def grid(contexts: Sequence[int] = CONTEXTS, batches: Sequence[int] = BATCHES, new: int = NEW_TOKENS) -> list[Case]:
    """Every context with every batch size, the small ones first. Raises WorkbookError for sizes that cannot be run."""
    if not contexts or not batches or min(batches) < 1 or new < 2 or min(contexts) <= new:
        raise WorkbookError(f"A context must be longer than the {new} new tokens (at least 2), a batch at least 1.")
    return [Case(context, size, new) for context in sorted(set(contexts)) for size in sorted(set(batches))]


def quick(subject: Subject) -> list[Case]:
    """A few sizes; the shape, which shows the cache, at a long context, whose prompt takes seconds to read."""
    return grid((1900,), (1,)) if subject.name == "shape" else grid((128,), (1, 4))
