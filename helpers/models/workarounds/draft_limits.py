"""transformers gives a draft its limits in a way that it warns about itself.

What is wrong: assisted generation calls the draft's ``generate`` with a generation configuration and, beside it, the
limits of this call. ``generate`` calls that deprecated and logs a warning for the reader.
Versions: transformers 5.23.0.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import GenerationConfig, PreTrainedModel

_LIMITS = ("min_new_tokens", "max_new_tokens", "use_cache")


def merge_limits(draft: PreTrainedModel, on_proposed: Callable[[int], None]) -> None:
    """Let a draft's ``generate`` take its limits into the configuration, and count the tokens it proposes.

    ``draft`` is changed: give a copy. ``on_proposed`` is called with the number of tokens of each proposal.
    """
    propose: Callable[..., Any] = draft.generate  # type: ignore[assignment]  # of a class that transformers mixes in

    def generate(input_ids: torch.Tensor, generation_config: GenerationConfig, **options: Any) -> Any:
        limits = {name: options.pop(name) for name in _LIMITS}
        config = copy.copy(generation_config)
        config.update(**limits)
        output = propose(input_ids=input_ids, generation_config=config, **options)
        on_proposed(output.sequences.shape[1] - input_ids.shape[1])
        return output

    draft.generate = generate  # type: ignore[assignment]
