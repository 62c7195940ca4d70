"""The engines that are transformers: as the announcement uses it, and as the workbook uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from helpers.base import units
from helpers.engines.catalogue import EngineError, _Started, _versions
from helpers.generation import decoding
from helpers.models import loading
from helpers.models.loaded import inference, input_device
from helpers.models.references import ModelRef

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateOutput

    from helpers.engines.catalogue import Ids, Job
    from helpers.generation.sampling import DecodingPath
    from helpers.models.loaded import Loaded


class _Plain:
    """transformers alone: ``from_pretrained(dtype=..., device_map="auto")`` and ``generate``."""

    model: PreTrainedModel
    _cache: int | None = None

    def load(self, job: Job) -> _Started:
        """Load the model as the announcement's example does, in the job's precision."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        dtype = getattr(torch, units.DTYPES[job.precision])
        self.model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype, device_map="auto")
        # the checkpoint's settings would end a reply early, or sample
        self.model.generation_config = GenerationConfig()
        return _Started("", _versions("torch", "transformers"))

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Nothing: the cache grows."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The lengths of the replies."""
        sequences = cast("torch.LongTensor", self._generate(prompts, _greedy(new_tokens)))
        return [len(row) - len(prompts[0]) for row in sequences.tolist()]

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies. It also measures the cache."""
        config = _greedy(new_tokens)
        config.return_dict_in_generate = True  # only so does generate return its cache
        output = cast("GenerateDecoderOnlyOutput", self._generate(prompts, config))
        assert output.past_key_values is not None
        self._cache = decoding.cache_bytes(output.past_key_values)
        replies: Ids = output.sequences[:, len(prompts[0]) :].tolist()
        return replies

    def cache_bytes(self) -> int | None:
        """Bytes of the cache's tensors."""
        return self._cache

    def _generate(self, prompts: Ids, config: GenerationConfig) -> GenerateOutput | torch.LongTensor:
        ids, mask = self._inputs(prompts)
        return decoding.generate_method(self.model)(input_ids=ids, attention_mask=mask, generation_config=config)

    def _inputs(self, prompts: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both (sequences, prompt tokens)."""
        import torch

        ids = torch.tensor(prompts, device=input_device(self.model))
        return ids, torch.ones_like(ids)


class _Default(_Plain):
    """The workbook: ``loading.load``, and the decoding of ``generation.generate`` if no strategy is chosen."""

    path: DecodingPath = "plain"
    loaded: Loaded
    _tokens = 0  # prompt and reply of the case: the size of a static cache

    def load(self, job: Job) -> _Started:
        """Load the model through ``loading.load``."""
        self.loaded = loading.load(ModelRef(**job.ref), job.precision)
        if self.path == "compiled" and (reason := decoding.cannot_compile(self.loaded)):
            raise EngineError(f"cannot be compiled: {reason}")
        self.model = decoding.without_settings(self.loaded)
        note = "a cache of the key-value heads" if self.loaded.report.grouped_cache else ""
        return _Started(note, _versions("torch", "transformers"))

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Compile what the strategy compiles."""
        # a run with one new token must use the cache of the whole case, or it would be compiled again
        self._tokens = prompt_tokens + new_tokens
        size = decoding.Size(batch_size, prompt_tokens, self._tokens)
        decoding.warm_up(self.loaded, decoding.Decoding(self.path), size)

    def _generate(self, prompts: Ids, config: GenerationConfig) -> GenerateOutput | torch.LongTensor:
        strategy = decoding.Decoding(self.path)
        size = decoding.Size(len(prompts), len(prompts[0]), self._tokens)
        options = decoding.configure(self.loaded, strategy, size, config)
        ids, mask = self._inputs(prompts)
        with inference(self.model), decoding.compiling(self.loaded, strategy):
            return decoding.generate_method(self.model)(
                input_ids=ids, attention_mask=mask, generation_config=config, past_key_values=options.cache
            )


class _Fastest(_Default):
    """The workbook's fastest strategy for any text: a static cache and compiled passes."""

    path: DecodingPath = "compiled"


def _greedy(new_tokens: int) -> GenerationConfig:
    """Greedy decoding of exactly ``new_tokens`` tokens: without an end token, nothing ends it earlier."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
