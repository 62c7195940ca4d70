"""An adapter's folder: written whole or not at all, known by its hashes, and only ever put on the base it belongs to.

``fine_tune.json`` says what a fine-tune is made of (recipe, base with the hashes of its files, data) and, once the
adapter is there, the names and shapes of its tensors. ``hashes.json`` is written last. ``reload`` and ``merge`` read
both, so that an adapter always meets the base that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helpers.base.errors import WorkbookError, first_names
from helpers.base.files import read_json, write_json
from helpers.base.hashes import HASHES, unchanged, write_hashes
from helpers.base.text import well_formed
from helpers.models import finding, loading
from helpers.models.checkpoint import LoadError, content_hashes
from helpers.models.references import ModelRef
from helpers.models.workarounds.frozen_head import contiguous_head
from helpers.training.checkpoints import _damage
from helpers.training.recipe import FinetuneError, TrainingStoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

    from helpers.models.loaded import Loaded
    from helpers.training.conversations import Example
    from helpers.training.recipe import Recipe

IDENTITY_FILE = "fine_tune.json"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_Tensors = dict[str, list[int]]  # the shape of each tensor by name


def reload(adapter_dir: Path) -> Loaded:
    """The base model in the precision it was trained in, with the adapter of a folder.

    Raises FinetuneError if the folder holds no adapter, if its files are not those that were saved, or if the base
    model is not the one that it was trained on.
    """
    from peft import PeftModel

    with unchanged(adapter_dir, FinetuneError), _quiet_libraries():
        loaded = _load_base(adapter_dir)
        model = PeftModel.from_pretrained(loaded.model, adapter_dir)
    contiguous_head(loaded.model)
    model.eval()
    # a PeftModel is no PreTrainedModel, but passes all calls on to the one inside it
    return replace(loaded, model=cast("PreTrainedModel", model))


def merge(adapter_dir: Path, out_dir: Path) -> ModelRef:
    """Add an adapter to its base model's weights and save the sum in bf16; return the entry to load it with.

    A quantized base is dequantized first, so that the adapter is added to the very weights it was trained on; merging
    into 4-bit weights would round the sum again. ``out_dir`` appears when everything in it is written. Raises
    FinetuneError as ``reload`` does, and if ``out_dir`` holds files already.
    """
    import torch
    from peft import PeftModel

    out_dir = Path(out_dir)
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise FinetuneError(f"{out_dir} is there already. Choose another folder, so that nothing is overwritten.")
    with _quiet_libraries(), _appearing(out_dir) as folder, unchanged(adapter_dir, FinetuneError):
        loaded = _load_base(adapter_dir)
        model = loaded.model.dequantize() if loaded.report.quantized_layers else loaded.model
        merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload().to(torch.bfloat16)
        merged.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    # unload frees the memory only if nothing else holds the weights
    del model, merged
    loading.unload(loaded)
    return replace(loaded.ref, id=str(out_dir.resolve()), source="embedded", revision=None, file=None)


@dataclass(frozen=True)
class _Identity:
    """What a fine-tune is made of: recipe, base model and data. It is saved beside the adapter."""

    recipe: dict[str, Any]
    base: dict[str, Any]
    base_commit: str | None
    base_files: dict[str, str]
    precision: str
    double_quant: bool
    data_sha256: str
    processes: int

    @classmethod
    def of(cls, loaded: Loaded, recipe: Recipe, data: Sequence[Sequence[Example]], processes: int) -> _Identity:
        """The identity of a fine-tune; ``data``: the examples to train on, and those held out."""
        quantization = getattr(loaded.model.config, "quantization_config", None)
        base = asdict(loaded.ref)
        del base["keep"]  # where copies of a model are kept does not change it
        ids = []
        for part in data:
            ids.append([example.input_ids for example in part])
        return cls(
            recipe=asdict(recipe),
            base=base,
            base_commit=loaded.report.commit,
            base_files=_base_files(loaded),
            precision=loaded.report.precision,
            double_quant=bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
            data_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
            processes=processes,
        )

    @property
    def label(self) -> str:
        """What the hashes of its checkpoints and of its adapter say that they are of."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"fine-tune {hashlib.sha256(text.encode()).hexdigest()}"

    def check_folder(self, out_dir: Path) -> None:
        """Raise FinetuneError if a folder holds a fine-tune that differs in some part, or an adapter of unknown origin.

        A file that was cut off is no obstacle as long as nothing else is there to be lost.
        """
        if out_dir.exists() and not out_dir.is_dir():
            raise FinetuneError(f"{out_dir} is a file. Choose a folder.")
        if not well_formed(str(out_dir.absolute())):
            raise FinetuneError(f"{out_dir} has bytes in its name that are not UTF-8. Choose another folder.")
        saved = _read_identity(out_dir / IDENTITY_FILE)
        if saved is None:
            self._check_unknown(out_dir)
            return
        different = [name for name, value in asdict(self).items() if saved.get(name) != value]
        if different:
            raise FinetuneError(
                f"{out_dir} holds a fine-tune with another {' and '.join(different)}. Choose or empty another folder."
            )

    def _check_unknown(self, out_dir: Path) -> None:
        """Refuse to train over an adapter, unless its hashes say that it is of this very fine-tune."""
        if not (out_dir / _WEIGHTS).exists():
            return
        others = [phrase for phrase in _damage(out_dir, self.label) if not phrase.startswith(f"{IDENTITY_FILE} ")]
        if others:
            raise FinetuneError(
                f"{out_dir} holds an adapter whose {IDENTITY_FILE} is missing or damaged, so nobody knows what it was "
                "trained on. Restore that file, or choose another folder."
            )

    def write(self, out_dir: Path, tensors: _Tensors | None = None) -> None:
        """Save the identity in a folder, whole or not at all, unless the same one is there."""
        path = out_dir / IDENTITY_FILE
        if tensors is None and _read_identity(path) is not None:
            return
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(self) | {"tensors": tensors})
        except OSError as error:
            raise TrainingStoppedError(
                f"{out_dir} cannot be written: {error}. Choose another folder, or repair this one."
            ) from error


def _save_adapter(model: PeftModel, identity: _Identity, out_dir: Path) -> None:
    """Write an adapter into a folder: beside what is there first, then in its place, and its hashes last.

    Raises TrainingStoppedError if some weight is not finite, or if it cannot be written. Then nothing has changed.
    """
    wrong = [name for name, weight in model.named_parameters() if weight.requires_grad and not _is_finite(weight)]
    if wrong:
        raise TrainingStoppedError(
            f"The adapter was not saved: {len(wrong)} of its tensors hold a nan or an infinity, such as "
            f"{first_names(wrong, 1)}. Lower learning_rate, or look for what is unusual in the data."
        )
    from safetensors import SafetensorError

    saving = out_dir / ".saving"
    try:
        shutil.rmtree(saving, ignore_errors=True)
        model.save_pretrained(str(saving))
        tensors = _tensors(saving / _WEIGHTS)
        (out_dir / HASHES).unlink(missing_ok=True)
        for file in saving.iterdir():
            file.replace(out_dir / file.name)
        saving.rmdir()
        identity.write(out_dir, tensors)
        write_hashes(out_dir, identity.label)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(saving, ignore_errors=True)
        raise TrainingStoppedError(
            f"The adapter could not be written to {out_dir}: {error}. Free some disk space or repair the folder, and "
            "repeat the call: it continues from the last checkpoint."
        ) from error


def _load_base(adapter_dir: Path) -> Loaded:
    """The base model of an adapter, loaded as it was for training, if both are what they were."""
    adapter_dir = Path(adapter_dir)
    identity = _checked_identity(adapter_dir)
    ref = ModelRef(**identity.base)
    current = content_hashes(finding.resolve(ref))
    if current != identity.base_files:
        # the symmetric difference of name and hash
        changed = {name for name, _ in current.items() ^ identity.base_files.items()}
        raise FinetuneError(
            f"The adapter in {adapter_dir} was trained on {ref.label} with other files than it has now: "
            f"{first_names(changed)}. Restore these files, or train the adapter again on the new base."
        )
    options = loading.LoadOptions(double_quant=identity.double_quant)
    return loading.load(ref, identity.precision, unpacked=True, options=options)


def _checked_identity(adapter_dir: Path) -> _Identity:
    """The identity of the adapter in a folder. Raises FinetuneError unless it is the adapter that was saved."""
    identity, tensors = _saved_identity(adapter_dir)
    if not tensors:
        raise FinetuneError(f"The fine-tune in {adapter_dir} is not finished. Repeat its call, which continues it.")
    found = _damage(adapter_dir)
    # If the identity is as it was written, it tells what is wrong with the others.
    if not any(phrase.startswith((IDENTITY_FILE, HASHES)) for phrase in found):
        found = _weight_faults(adapter_dir, identity, tensors) or found or _damage(adapter_dir, identity.label)
    if found:
        raise FinetuneError(
            f"The adapter in {adapter_dir} is not the one that was saved: {'; '.join(found)}. Restore its files, or "
            "train it again."
        )
    return identity


def _saved_identity(adapter_dir: Path) -> tuple[_Identity, _Tensors]:
    """What the identity file of an adapter says, and its tensors, which there are once the training is finished."""
    path = adapter_dir / IDENTITY_FILE
    if not path.is_file():
        raise FinetuneError(
            f"{adapter_dir} holds no adapter of this workbook: {IDENTITY_FILE} is missing. Give another folder."
        )
    saved = _read_identity(path) or {}
    tensors = saved.pop("tensors", None) or {}
    try:
        return _Identity(**saved), tensors
    except TypeError as error:
        raise FinetuneError(
            f"{path} is damaged or of another version. Restore it, or train the adapter again."
        ) from error


def _weight_faults(adapter_dir: Path, identity: _Identity, tensors: _Tensors) -> list[str]:
    """What is wrong with the tensors and the configuration of an adapter, a phrase for each."""
    from safetensors import SafetensorError

    found = []
    try:
        config = cast("dict[str, object]", read_json(adapter_dir / _CONFIG))
        for name, own in (("r", "rank"), ("lora_alpha", "alpha")):
            if config.get(name) != identity.recipe[own]:
                found.append(f"{own} is {config.get(name)} in {_CONFIG}, not {identity.recipe[own]}")
        actual = _tensors(adapter_dir / _WEIGHTS, finite=True)
    except (WorkbookError, OSError, ValueError, SafetensorError, KeyError, AttributeError) as error:
        return [*found, str(error).rstrip(".")]
    kinds = {
        "missing": tensors.keys() - actual,
        "not its own": actual.keys() - tensors,
        "of another shape": {name for name in tensors.keys() & actual if tensors[name] != actual[name]},
    }
    for kind, names in kinds.items():
        if names:
            found.append(f"{len(names)} of {len(tensors)} tensors are {kind}: {first_names(names, 1)}")
    return found


def _tensors(file: Path, *, finite: bool = False) -> _Tensors:
    """The shapes of the tensors of a file; with ``finite``, raise FinetuneError if one holds a nan or an infinity."""
    from safetensors import safe_open

    shapes = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, it is no mapping
            shapes[name] = list(tensors.get_slice(name).get_shape())
            if finite and not _is_finite(tensors.get_tensor(name)):
                raise FinetuneError(f"{file.name} holds a nan or an infinity in {name}")
    return shapes


def _is_finite(tensor: Any) -> bool:
    return bool(tensor.detach().isfinite().all())


def _read_identity(path: Path) -> dict[str, Any] | None:
    """What the identity file holds; None if it is missing or damaged."""
    try:
        saved = read_json(path)
    except (WorkbookError, OSError, RecursionError):
        return None
    return saved if isinstance(saved, dict) else None


def _base_files(loaded: Loaded) -> dict[str, str]:
    """The hashes of what the base model was loaded from; of its weights in memory if there are no files."""
    try:
        return content_hashes(finding.resolve(loaded.ref))
    except LoadError:
        import torch

        digest = hashlib.sha256()
        for name, weight in sorted(loaded.model.state_dict().items()):
            digest.update(name.encode())
            # numpy has no bfloat16, but bytes are bytes
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"weights in memory": digest.hexdigest()}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block is done, and is removed if it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield part
        part.chmod(0o755)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the libraries' bars, log lines and deprecations. Warnings of possible errors are still shown."""
    import warnings

    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
