"""What to measure: the models, their prompts, the sizes, and the bytes that one decoding step must read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError, choose
from helpers.base.files import ROOT
from helpers.machine import memory
from helpers.models import finding
from helpers.models.references import ModelRef
from helpers.speed.benchmark import _prompt_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    # Heavy, and never needed at run time: no file is read back into these dataclasses.
    from transformers import PreTrainedConfig  # noqa: TC004

    from helpers.engines.catalogue import Ids
    from helpers.models.references import Profile

CONTEXTS, BATCHES, NEW_TOKENS, REPEATS = (128, 512, 1900), (1, 4, 16), 32, 5
# Falcon-180B has 232 query heads and 8 key-value heads of size 64 in 80 layers: few key-value heads for many queries.
SHAPE: dict[str, object] = {
    "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 64, "num_kv_heads": 4,
    "max_position_embeddings": 2048, "new_decoder_architecture": True, "multi_query": True, "parallel_attn": True,
    "num_ln_in_parallel_attn": 2, "alibi": False, "bias": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_SHAPE_NAME = "falcon-shape-8x1024"


@dataclass(frozen=True)
class _Case:
    """One size: ``batch_size`` sequences of ``context`` tokens each, of which the last ``new_tokens`` are generated."""

    context: int
    batch_size: int
    new_tokens: int = NEW_TOKENS

    @property
    def prompt_tokens(self) -> int:
        """Length of each prompt."""
        return self.context - self.new_tokens

    def exceeds(self, other: _Case) -> bool:
        """Whether this case is at least as large as another in every way."""
        return self.context >= other.context and self.batch_size >= other.batch_size


@dataclass(frozen=True)
class _Subject:
    """A model to measure, with the folder of its checkpoint."""

    ref: ModelRef
    folder: Path
    config: PreTrainedConfig
    name: str

    @property
    def label(self) -> str:
        """The name for titles and tables; a stand-in, and random weights, are named as such."""
        if self.ref.name == _SHAPE_NAME:
            return f"{_SHAPE_NAME} (random weights: 8 layers, hidden 1,024, 64 query and 4 key-value heads)"
        return self.ref.label

    def missing(self, case: _Case) -> str:
        """Why a case cannot run on this model; empty if it can."""
        limit = self.config.max_position_embeddings
        if case.context > limit:
            return f"the model's context ends at {limit:,} tokens"
        return ""

    def prompts(self, case: _Case) -> Ids:
        """Token ids of a plain text, of exactly the case's length; each row begins at another place of the text."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows: Ids = _prompt_rows(tokenizer, case.batch_size, case.prompt_tokens).tolist()
        return rows

    def step_bytes(self, case: _Case, precision: str) -> int:
        """Bytes that one decoding step reads at least: the weights once, and the key-value heads of half-done replies.

        Embeddings that do not share the head's matrix are not counted: a step reads one row of them for each sequence.
        """
        weights = memory.weight_bytes(self.config, precision)
        if not self.config.tie_word_embeddings:
            # bitsandbytes leaves embeddings in 16 bits
            weights -= self.config.vocab_size * self.config.hidden_size * memory.element_bytes(precision)
        # on average, half of the new tokens are in the cache
        cached = case.batch_size * (case.context - case.new_tokens // 2)
        return weights + cached * memory.kv_bytes_per_token(self.config, precision, heads="kv")


def _subjects(profile: Profile, names: Sequence[str] = ()) -> list[_Subject]:
    """The models of these names: falcon, falcon_chat, llama_chat, shape. Without names: the chat models and the shape.

    Raises WorkbookError for an unknown name, LoadError if a model could not be downloaded.
    """
    known = [*profile.models, "shape"]
    for name in names:
        choose(name, known, "model")
    wanted = names or ("falcon_chat", "llama_chat", "shape")
    return [_subject(profile, name) for name in known if name in wanted]


def _subject(profile: Profile, name: str) -> _Subject:
    ref = _shape_ref(ROOT / ".cache" / "bench") if name == "shape" else profile.models[name]
    return _Subject(ref, finding.resolve(ref), finding.config(ref), name)


def _shape_ref(parent: Path) -> ModelRef:
    """A bfloat16 Falcon with random weights, Falcon-180B's proportions and falcon-mini's tokenizer. It is made once."""
    import torch
    from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

    folder = parent / _SHAPE_NAME
    if not folder.is_dir():
        partial = folder.with_name(f"{_SHAPE_NAME}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config = FalconConfig.from_dict({**SHAPE, "dtype": "bfloat16"})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = FalconForCausalLM(config)
        model.bfloat16().save_pretrained(partial)
        AutoTokenizer.from_pretrained(ROOT / "env" / "models" / "falcon-mini").save_pretrained(partial)
        partial.rename(folder)  # last: an interrupted call leaves no folder that looks complete
    return ModelRef(id=str(folder), family="falcon", format="plain", source="embedded")


def _grid(contexts: Sequence[int] = CONTEXTS, batches: Sequence[int] = BATCHES, new: int = NEW_TOKENS) -> list[_Case]:
    """Every context with every batch size, small ones first. Raises WorkbookError for sizes that cannot run."""
    if not contexts or not batches or min(batches) < 1 or new < 2 or min(contexts) <= new:
        raise WorkbookError(f"A context must be longer than the {new} new tokens (at least 2), a batch at least 1.")
    cases = []
    for context in sorted(set(contexts)):
        for size in sorted(set(batches)):
            cases.append(_Case(context, size, new))
    return cases


def _quick(subject: _Subject) -> list[_Case]:
    """A few sizes that show much in little time."""
    if subject.name == "shape":
        # only a long context shows the cache; its prompt takes seconds to read, so there is no second size
        return _grid((1900,), (1,))
    return _grid((128,), (1, 4))
