"""The types of a recipe file: the settings from which falcon-mini is made (env/models/falcon-mini/recipe.yaml)."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class _HeldOut(TypedDict):
    """The file of held-out stories, and their number."""

    stories: str
    records: int


class _TokenizerSettings(TypedDict):
    """The size of the vocabulary, the end token included."""

    vocab_size: int


class _ModelSettings(TypedDict):
    """The sizes of ``FalconConfig`` that are not Falcon-180B's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int


class _OptimizerSettings(TypedDict):
    """Learning rates of the matrices inside the layers, and of embeddings and norms; weight decay of the matrices."""

    learning_rate: float
    embedding_learning_rate: float
    weight_decay: float


class _TrainingSettings(_OptimizerSettings):
    """One training; its length is ``max_steps`` or ``epochs``. ``unlikelihood`` is the weight of that loss."""

    batch_size: int
    warmup_steps: int
    schedule: str
    max_steps: NotRequired[int]
    epochs: NotRequired[float]
    sampling: NotRequired[str]
    unlikelihood: NotRequired[float]


class _Phase(TypedDict):
    """One phase of the base's training, with blocks of ``context_tokens``."""

    name: str
    context_tokens: int
    batch_size: int
    max_steps: int
    learning_rate: float
    embedding_learning_rate: float
    warmup_steps: int
    schedule: str
    unlikelihood: NotRequired[float]


class _PretrainSettings(TypedDict):
    """The base's training. ``files``: how often one pass reads each file, also a fraction."""

    weight_decay: float
    phases: list[_Phase]
    repeated_words: int
    files: dict[str, float]


class _ChatFile(TypedDict):
    """A file of conversations: how many are held out, how many are trained on, and replies of each (one if missing)."""

    held_out: int
    talks: int
    replies: NotRequired[int]


class _ChatSettings(_TrainingSettings):
    """The chat model's training: its files, the longest texts, and how many made-up questions are added."""

    reply_max_characters: int
    story_max_characters: int
    kinds: int
    facts: int
    files: dict[str, _ChatFile]


class _Recipe(TypedDict):
    """All settings of falcon-mini and falcon-mini-chat."""

    seed: int
    context_tokens: int
    save_steps: int
    held_out: _HeldOut
    tokenizer: _TokenizerSettings
    model: _ModelSettings
    pretrain: _PretrainSettings
    chat: _ChatSettings
