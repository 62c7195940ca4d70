"""transformers reads the tokenizer and the progress of GGUF files its own way.

What is wrong: the file names how its text was split before byte-level BPE (``tokenizer.ggml.pre``), which transformers
ignores: blank lines and spaces before a digit become other tokens than in training. And the bar of the conversion is
tqdm's own, not the library's, so ``transformers.utils.logging`` cannot replace it.
Versions: transformers 5.23.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.models.workarounds.rebinding import rebound

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Split digits before byte-level BPE if the GGUF file asks for it ("smollm"), as in training."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field and field.contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _no_conversion_bar() -> AbstractContextManager[None]:
    """Inside the block, the conversion of a GGUF file draws no bar."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils.logging import EmptyTqdm

    return rebound(modeling_gguf_pytorch_utils, "tqdm", EmptyTqdm)
