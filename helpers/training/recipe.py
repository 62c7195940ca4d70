"""What goes into a fine-tune and what comes out of it: the recipe, the losses, the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.base.errors import WorkbookError
from helpers.models.loaded import Loaded

TARGETS = {
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
_MOST_OF_THE_FALL = 0.95


class FinetuneError(WorkbookError):
    """A fine-tune that is not possible, or an adapter that cannot be read."""


class TrainingStoppedError(FinetuneError):
    """A training that cannot go on: a number is not finite, or a checkpoint cannot be written."""

    exit_code = 1


@dataclass(frozen=True)
class Recipe:
    """How to train. LoRA adds B·A·alpha/rank to each linear layer of the decoder (Hu et al., arXiv 2106.09685).

    ``steps`` optimizer steps of ``batch_size`` examples in each process: linear warm-up over ``warmup_steps``, then
    cosine decay. Examples are not packed: Falcon in transformers builds its mask without looking at position ids, so
    packed examples would see each other (``loading.load`` repairs that, but the model may come from elsewhere).
    """

    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    log_every: int = 5
    evaluate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "alpha", "log_every", "evaluate_every"):
            if not getattr(self, name) >= 1:
                raise FinetuneError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        # "not ... <" would let a nan pass
        if not 0 < self.learning_rate <= 1:
            raise FinetuneError(f"learning_rate must be more than 0 and at most 1, but is {self.learning_rate}.")
        if not 0 <= self.dropout < 1:
            raise FinetuneError(f"dropout must be at least 0 and less than 1, but is {self.dropout}.")
        if not self.warmup_steps >= 0:
            raise FinetuneError(f"warmup_steps must be at least 0, but is {self.warmup_steps}.")
        if not 0 <= self.seed < 2**32:
            raise FinetuneError(f"seed must be at least 0 and less than 2**32, but is {self.seed}.")


@dataclass(frozen=True)
class Point:
    """The loss at one step in nats per token: of the batches since the last point, or of the held-out examples."""

    step: int
    loss: float | None = None
    held_out_loss: float | None = None


@dataclass(frozen=True)
class _Finetuned:
    """A trained adapter: on the model in memory, and in a folder.

    ``examples`` counts the replies trained on; ``left_out`` those longer than the context, ``blank_replies`` those in
    which nothing can be seen. ``seconds`` is the time of this call, without that of an interrupted call before.
    ``processes`` is the number that really trained.
    """

    loaded: Loaded
    adapter_dir: Path
    history: tuple[Point, ...]
    trainable_parameters: int
    examples: int
    left_out: int
    blank_replies: int
    seconds: float
    processes: int

    @property
    def settled_step(self) -> int | None:
        """The step by which the held-out loss had made 95% of its fall to the lowest value: more steps gain little.

        None if it never fell, or was measured less than twice.
        """
        measured = [(point.step, point.held_out_loss) for point in self.history if point.held_out_loss is not None]
        if len(measured) < 2:
            return None
        start, lowest = measured[0][1], min(loss for _, loss in measured)
        if lowest >= start:
            return None
        enough = start - _MOST_OF_THE_FALL * (start - lowest)
        return next(step for step, loss in measured if loss <= enough)
