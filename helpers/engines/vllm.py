"""vLLM, under a Python of its own: only its packages and the standard library are there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from helpers.engines.catalogue import _Started

if TYPE_CHECKING:
    from helpers.engines.catalogue import Ids, Job

_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose memory is measured
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: the smallest pool that vLLM takes
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent to anyone
    "DO_NOT_TRACK": "1",
}


class _Vllm:
    """``LLM.generate`` without prefix caching. Its pool of cache blocks is made when it loads."""

    _tokens = 0

    def load(self, job: Job) -> _Started:
        """Load the model. On a CPU it is not compiled, because that takes vLLM minutes."""
        # vLLM reads these when it is imported
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import torch
        import vllm

        self.vllm = vllm
        self.llm = vllm.LLM(
            job.folder,
            dtype=_TYPES[job.precision],
            max_model_len=job.context,
            max_num_seqs=job.batch_size,
            enforce_eager=not torch.cuda.is_available(),
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        note = ""
        if not torch.cuda.is_available():
            note = f"a pool of {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB for the cache, eager"
        return _Started(note, {"vllm": vllm.__version__})

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Nothing."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The lengths of the replies."""
        return [len(row) for row in self.tokens(prompts, new_tokens)]

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies."""
        self._tokens = sum(map(len, prompts)) + new_tokens * len(prompts)
        greedy = self.vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": row} for row in prompts]
        results = self.llm.generate(requests, greedy, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    def cache_bytes(self) -> int | None:
        """Bytes that these tokens take of its pool, whose tensors are measured."""
        engine = self.llm.llm_engine
        try:
            tensors = engine.model_executor.driver_worker.worker.model_runner.kv_caches
        except AttributeError:  # another version, or workers in processes of their own
            return None
        settings = engine.vllm_config.cache_config
        pool_bytes = 0
        for tensor in tensors:
            pool_bytes += tensor.nbytes
        bytes_per_token: float = pool_bytes / (settings.num_gpu_blocks * settings.block_size)
        return round(bytes_per_token * self._tokens)
