"""CTranslate2: the same checkpoint in its own format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.engines.catalogue import _Started, _versions
from helpers.engines.convert import _converted

if TYPE_CHECKING:
    from helpers.engines.catalogue import Ids, Job

_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _CTranslate2:
    """``Generator.generate_batch``. It computes in float32 if its CPU backend has no such 16-bit type."""

    def load(self, job: Job) -> _Started:
        """Convert the checkpoint, once, into the type that it computes in."""
        # absolute: this is the installed package, not this module
        import ctranslate2
        from transformers import AutoTokenizer

        dtype, note = _TYPES[job.precision], ""
        if dtype not in ctranslate2.get_supported_compute_types("cpu"):
            dtype, note = "float32", f"in float32: its CPU backend has no {dtype} here"
        folder = _converted(job, "ctranslate2", dtype)
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=job.threads
        )
        self.tokenizer = AutoTokenizer.from_pretrained(job.folder)
        return _Started(note, _versions("ctranslate2"))

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Nothing."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The lengths of the replies."""
        return [len(row) for row in self.tokens(prompts, new_tokens)]

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies."""
        # it takes tokens by name, and returns them by name and id
        names = [self.tokenizer.convert_ids_to_tokens(row) for row in prompts]
        results = self.generator.generate_batch(
            names,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=0,
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[],
        )
        return [list(result.sequences_ids[0]) for result in results]

    def cache_bytes(self) -> int | None:
        """None: CTranslate2 does not tell."""
        return None
