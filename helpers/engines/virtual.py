"""vLLM, under a Python of its own: only its packages and the standard library are there."""

from __future__ import annotations

import os
from typing import Any

from helpers.engines.catalogue import Ids, Job

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# In this process, so that its memory is seen; nothing is sent to anyone. The cache's GiB is the least vLLM takes.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class Vllm:
    """``LLM.generate`` without prefix caching; its pool of cache blocks is made when it loads."""

    _tokens = 0

    def load(self, job: Job) -> dict[str, Any]:
        """Eager: compiling takes vLLM minutes on a CPU."""
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        import torch
        import vllm

        self.vllm = vllm
        self.llm = vllm.LLM(
            job.folder,
            dtype=TYPES[job.precision],
            max_model_len=job.context,
            max_num_seqs=job.batch_size,
            enforce_eager=not torch.cuda.is_available(),
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        note = f"a pool of {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB for the cache, eager"
        return {"note": "" if torch.cuda.is_available() else note, "versions": {"vllm": vllm.__version__}}

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Nothing."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The lengths of the replies."""
        return [len(row) for row in self.tokens(prompts, new_tokens)]

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies."""
        self._tokens = sum(len(row) + new_tokens for row in prompts)
        greedy = self.vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        found = self.llm.generate([{"prompt_token_ids": row} for row in prompts], greedy, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in found]

    def cache_bytes(self) -> int | None:
        """The share of its pool, weighed on the real tensors, that these tokens take."""
        engine = self.llm.llm_engine
        try:
            tensors = engine.model_executor.driver_worker.worker.model_runner.kv_caches
        except AttributeError:  # another version, or workers in processes of their own
            return None
        settings = engine.vllm_config.cache_config
        a_token = sum(tensor.nbytes for tensor in tensors) / (settings.num_gpu_blocks * settings.block_size)
        return round(a_token * self._tokens)
