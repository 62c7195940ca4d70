"""transformers leaves Falcon's linear layers unquantized, without an error.

What is wrong: transformers converts layers whose type is exactly ``torch.nn.Linear``. Falcon's are a subclass
(``FalconLinear``), so nothing is quantized, while ``model.is_quantized`` says True.
Versions: transformers 5.5.0 to 5.23.0 at least; 5.4.0 and earlier ask ``isinstance`` and are right.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from helpers.models.layers import _is_4bit, quantizable_layers
from helpers.models.workarounds.bitsandbytes_messages import quiet_bitsandbytes
from helpers.models.workarounds.rebinding import rebound

if TYPE_CHECKING:
    from collections.abc import Iterator

# The patch changes a module of the library, which all threads share. Re-entrant: a repair may contain another.
_ONE_THREAD = threading.RLock()


@contextmanager
def falcon_repair() -> Iterator[bool]:
    """Inside the block, Falcon models are built from plain linear layers, which transformers quantizes.

    Yields whether this was necessary; if not, it does nothing. Outputs stay the same: Falcon's own layer differs from
    ``torch.nn.Linear`` only in how it would add a bias, and these models have none. One thread at a time.
    """
    with _ONE_THREAD:
        if not needs_repair():
            yield False
            return
        from torch import nn
        from transformers.models.falcon import modeling_falcon

        with rebound(modeling_falcon, "FalconLinear", nn.Linear):
            yield True


def needs_repair() -> bool:
    """Whether transformers leaves Falcon's linear layers unquantized. Detected by trying it, not from the version."""
    quiet_bitsandbytes()
    import torch
    from transformers import BitsAndBytesConfig, FalconConfig, FalconForCausalLM
    from transformers.integrations import bitsandbytes as integration

    size = FalconConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, bos_token_id=0, eos_token_id=0
    )
    nf4 = BitsAndBytesConfig(load_in_4bit=True)
    # On the meta device no memory is used; the logger would warn that nothing was quantized, which is what we ask.
    with _ONE_THREAD, torch.device("meta"), rebound(integration.logger, "disabled", True):
        model = FalconForCausalLM(size)
        names = quantizable_layers(model)
        integration.replace_with_bnb_linear(model, ["lm_head"], nf4)
    return not all(_is_4bit(model.get_submodule(name)) for name in names)
