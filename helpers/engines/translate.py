"""CTranslate2: the same checkpoint in its own format."""

from __future__ import annotations

from typing import Any

from helpers.engines import convert
from helpers.engines.catalogue import Ids, Job
from helpers.engines.library import versions

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class CTranslate2:
    """``Generator.generate_batch``; where the processor's backend has no 16-bit type it computes in float32."""

    def load(self, job: Job) -> dict[str, Any]:
        """Convert the checkpoint, once, into the type that is computed in."""
        import ctranslate2
        from transformers import AutoTokenizer

        wanted = TYPES[job.precision]
        can = wanted in ctranslate2.get_supported_compute_types("cpu")
        dtype = wanted if can else "float32"
        folder = convert.kept(job, "ctranslate2", dtype)
        options = {"compute_type": dtype, "inter_threads": 1, "intra_threads": job.threads}
        self.generator = ctranslate2.Generator(str(folder), device="cpu", **options)
        self.tokenizer = AutoTokenizer.from_pretrained(job.folder)
        note = "" if can else f"in float32: its CPU backend has no {wanted} here"
        return {"note": note, "versions": versions("ctranslate2")}

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Nothing."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The lengths of the replies."""
        return [len(row) for row in self.tokens(prompts, new_tokens)]

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies; it takes tokens by their names."""
        names = [self.tokenizer.convert_ids_to_tokens(row) for row in prompts]
        length = {"max_length": new_tokens, "min_length": new_tokens, "end_token": []}
        found = self.generator.generate_batch(
            names, beam_size=1, sampling_topk=1, include_prompt_in_result=False, max_batch_size=0, **length
        )
        return [list(result.sequences_ids[0]) for result in found]

    def cache_bytes(self) -> int | None:
        """It does not tell."""
        return None
