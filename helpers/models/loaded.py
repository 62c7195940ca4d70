"""A loaded model: what it holds, the report of its load, and the notes that a run keeps of its loads.

``loading.load`` returns a ``Loaded``; everything that makes, scores or trains on tokens takes one. Sizes are bytes and
times are seconds.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import settings
from helpers.base.errors import WorkbookError
from helpers.base.units import human
from helpers.machine.memory import kv_bytes_per_token
from helpers.models.devices import _device_of
from helpers.models.formats import ChatFormat
from helpers.models.layers import _quantized_layers, _weights_in, quantizable_layers, stored_bytes
from helpers.models.references import ModelRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: TC004 (it takes seconds to import)

    from helpers.models.devices import DeviceMap


@dataclass
class Loaded:
    """A verified model with its tokenizer and the chat format it was trained on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: ChatFormat
    report: LoadReport
    ref: ModelRef
    decoder: Any = field(default=None, init=False, repr=False, compare=False)  # kept by helpers.generation.decoding


def context_tokens(loaded: Loaded) -> int:
    """Length of the model's context in tokens, prompt and reply together."""
    return int(loaded.model.config.max_position_embeddings)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for token ids: the model's, or the CPU if its first weights are offloaded to disk."""
    import torch

    # accelerate moves the inputs of offloaded layers itself, but cannot read them from the meta device.
    return torch.device("cpu") if model.device.type == "meta" else model.device


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Switch on inference mode and switch off dropout; a model in training mode is set back to it afterwards."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()


@dataclass(frozen=True)
class LoadReport:
    """The verified facts of a load. ``stored_bytes``: bytes of the weights in memory, quantized or not."""

    model: str
    stand_in_for: str | None
    precision: str
    parameters: int
    stored_bytes: int
    linear_layers: int
    quantized_layers: int
    dtypes: dict[str, int]
    devices: dict[str, int]
    seconds: float
    repaired: bool
    cache_bytes_per_token: int = 0  # keys and values of one sequence
    grouped_cache: bool = False  # Falcon with a cache of its key-value heads only: see workarounds.grouped_cache
    commit: str | None = None  # of a hub's repository, and whether the profile pins it
    copied: bool = False  # from a quantized copy that an earlier load saved: see helpers.models.kept
    read_bytes: int = 0  # of the tensors in the files that were read


def _build_report(ref: ModelRef, precision: str, model: PreTrainedModel, device_map: DeviceMap) -> LoadReport:
    """What is in memory and on disk; time, repair and commit are for ``load`` to add."""
    from helpers.models.workarounds.grouped_cache import _has_grouped_cache

    dtypes: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    bytes_on_disk = 0
    for name, parameter in model.named_parameters():
        # An offloaded parameter is on the device "meta"; the map knows where its values are.
        device = str(_device_of(name, device_map) if parameter.is_meta else parameter.device)
        dtypes[_dtype(parameter)] += _weights_in(parameter)
        devices[device] += _weights_in(parameter)
        if device == "disk":
            bytes_on_disk += parameter.nbytes
    grouped = ref.family == "falcon" and _has_grouped_cache(model)
    return LoadReport(
        model=ref.label,
        stand_in_for=ref.stand_in_for,
        precision=precision,
        parameters=dtypes.total(),
        stored_bytes=stored_bytes(model) - bytes_on_disk,
        linear_layers=len(quantizable_layers(model)),
        quantized_layers=len(_quantized_layers(model)),
        dtypes=dict(dtypes),
        devices=dict(devices),
        seconds=0.0,
        repaired=False,
        cache_bytes_per_token=kv_bytes_per_token(model.config, precision, heads="kv" if grouped else "library"),
        grouped_cache=grouped,
    )


def report_table(loaded: Loaded) -> pd.DataFrame:
    """The load report for a notebook: property and value."""
    import pandas as pd

    report = loaded.report
    cache = f"{report.cache_bytes_per_token:,} bytes per token"
    rows = {
        "model": report.model,
        "stands in for": report.stand_in_for or "nothing: it is the model itself",
        "precision": report.precision,
        "parameters": f"{report.parameters:,}",
        "weights in memory": human(report.stored_bytes),
        "linear layers": f"{report.linear_layers}, of them quantized: {report.quantized_layers}",
        "types": _shares(report.dtypes),
        "devices": _shares(report.devices),
        "loaded in": f"{report.seconds:.1f} s",
        "read": f"{human(report.read_bytes)}, {'a saved quantized copy' if report.copied else 'the published files'}",
        "Falcon repair": "applied while loading" if report.repaired else "not needed",
        "KV cache": f"{cache}, grouped" if report.grouped_cache else cache,
    }
    if report.commit:
        rows["commit"] = report.commit
    return pd.DataFrame(list(rows.items()), columns=["property", "value"])


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,} parameters" for name, count in counts.items())


@dataclass(frozen=True)
class Load:
    """One model that a notebook loaded.

    ``commit`` is None unless the model really comes from a hub. ``made_here``: the notebook itself wrote the
    checkpoint, as when it saves a model and loads it again; ``model`` is then the name of its folder.
    """

    model: str
    label: str
    precision: str
    commit: str | None
    made_here: bool


def _note_load(ref: ModelRef, precision: str, checkpoint: Path) -> None:
    """Append the load of a checkpoint to the notes of the active run, if there is one."""
    run = settings.run_folder()
    if run is None:
        return
    # Profiles name models by a hub's id or a folder of this repository; only ``save`` and ``merge`` make whole paths.
    made_here = Path(ref.id).is_absolute()
    commit = None
    if ref.source == "hub" and not ref.rehearsed:
        commit = checkpoint.name  # the hub's cache names a snapshot's folder so
    load = Load(ref.name if made_here else ref.id, ref.label, precision, commit, made_here)
    file = _file(run, settings.notebook_name())
    file.parent.mkdir(exist_ok=True)
    # One write of one line: the processes of a training append to the same file.
    with file.open("a", encoding="utf-8") as notes:
        notes.write(json.dumps(asdict(load)) + "\n")


def read_loads(run: Path, notebook: str) -> list[Load]:
    """Return what a notebook of a run loaded, in order and each load once.

    Raises WorkbookError, naming file and line, if the notes are damaged.
    """
    file = _file(run, notebook)
    if not file.exists():
        return []
    loads: dict[Load, None] = {}
    # By the line's end alone: a text within a line may hold other characters that end one.
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line:
            continue
        try:
            loads[Load(**json.loads(line))] = None
        except (ValueError, TypeError, RecursionError) as error:
            raise WorkbookError(f"{file}, line {number} is not the note of a load. Run the notebook again.") from error
    return list(loads)


def forget_loads(run: Path, notebook: str) -> None:
    """Drop the notes of a notebook that is about to run again."""
    _file(run, notebook).unlink(missing_ok=True)


def _file(run: Path, notebook: str) -> Path:
    return run / "loaded" / f"{notebook}.jsonl"
