"""bitsandbytes logs two warnings that a reader can do nothing about.

What is wrong: every call of every int8 layer says that its input is cast to float16, which is how LLM.int8() works;
and on CPUs without AVX512_BF16 kernels the import says that a faster kernel is missing.
Versions: bitsandbytes 0.50.2.
"""

from __future__ import annotations

import logging

KNOWN_NOISE = {
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def quiet_bitsandbytes() -> None:
    """Drop the two messages by the beginning of their text; all others are still logged. Repeat it as you like."""
    for name in KNOWN_NOISE:
        logging.getLogger(name).addFilter(_is_news)  # The same filter is added only once.


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(KNOWN_NOISE[record.name])
