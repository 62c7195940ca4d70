"""The engines that are transformers: as the announcement uses it, and as the workbook does."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from helpers import bench
from helpers.engines.catalogue import EngineError, Ids, Job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from helpers.types import Loaded


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages."""
    return {name: importlib.metadata.version(name) for name in packages}


class Plain:
    """transformers alone: ``from_pretrained(dtype=..., device_map="auto")`` and ``generate``."""

    model: PreTrainedModel
    _cache: int | None = None

    def load(self, job: Job) -> dict[str, Any]:
        """As in the announcement's example, in the job's precision."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        from helpers.loading import DTYPES

        dtype = getattr(torch, DTYPES[job.precision])
        self.model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype, device_map="auto")
        self.model.generation_config = GenerationConfig()  # the model's own would end a reply early, or draw tokens
        return {"note": "", "versions": versions("torch", "transformers")}

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Nothing: the cache grows."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The lengths of the replies."""
        found = self._generate(prompts, new_tokens)
        return [len(row) - len(prompts[0]) for row in found.tolist()]

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies; the cache is weighed."""
        found = self._generate(prompts, new_tokens, return_dict_in_generate=True)
        self._cache = bench.cache_bytes(found.past_key_values)
        return found.sequences[:, len(prompts[0]) :].tolist()

    def cache_bytes(self) -> int | None:
        """Of the real tensors."""
        return self._cache

    def _generate(self, prompts: Ids, new_tokens: int, **options: Any) -> Any:
        return self.model.generate(**self._inputs(prompts), **self._config(new_tokens, options))

    def _inputs(self, prompts: Ids) -> dict[str, torch.Tensor]:
        import torch

        from helpers.generation import input_device

        ids = torch.tensor(prompts, device=input_device(self.model))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _config(self, new_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
        from transformers import GenerationConfig

        fixed = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        return {"generation_config": GenerationConfig(**fixed, **options)}


class Default(Plain):
    """The workbook: ``loading.load``, and the decoding of ``helpers.generation`` when nothing is chosen."""

    path = "plain"
    loaded: Loaded
    _tokens = 0  # prompt and reply of the case, for which a static cache is made

    def load(self, job: Job) -> dict[str, Any]:
        """Through ``loading.load``."""
        from helpers import decoding, loading
        from helpers.types import ModelRef

        self.loaded = loading.load(ModelRef(**job.ref), job.precision)
        if self.path == "compiled" and (why := decoding.cannot_compile(self.loaded)):
            raise EngineError(f"cannot be compiled: {why}")
        self.model = decoding.without_settings(self.loaded)
        note = "a cache of the key-value heads" if self.loaded.report.grouped_cache else ""
        return {"note": note, "versions": versions("torch", "transformers")}

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Compile what is compiled."""
        from helpers import decoding

        self._tokens = prompt_tokens + new_tokens
        decoding.warm_up(self.loaded, self.path, batch_size, self._tokens)

    def _generate(self, prompts: Ids, new_tokens: int, **options: Any) -> Any:
        from helpers import decoding
        from helpers.generation import inference

        way = decoding.Decoding(self.path)
        sizes = {"prompt_tokens": len(prompts[0]), "tokens": self._tokens}
        chosen = decoding.settings(self.loaded, way, self.path, len(prompts), **sizes)
        with inference(self.model), decoding.compiling(self.loaded, self.path):
            return self.model.generate(
                **self._inputs(prompts), **self._config(new_tokens, chosen.config | options), **chosen.call
            )


class Fastest(Default):
    """The workbook's fastest way for any text: a static cache and compiled passes."""

    path = "compiled"
