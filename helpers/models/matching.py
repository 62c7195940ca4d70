"""Whether configuration, tokenizer and weights of a checkpoint belong together, asked before the weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from helpers.models.checkpoint import LoadError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from helpers.models.checkpoint import _Shards
    from helpers.models.references import ModelRef

_EMBEDDINGS = ("word_embeddings.weight", "embed_tokens.weight")
_LAYER = re.compile(r"\.(?:h|layers)\.(\d+)\.")
# What the model of a chat format has learned as single tokens.
_CHAT_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama-2": ("<s>", "</s>")}
# How Falcon's files were called before transformers 4.33 knew them, and whether they are of the new architecture.
_OLD_FALCONS = {"RefinedWeb": "true", "RefinedWebModel": "false"}


def _check_model_type(ref: ModelRef, folder: Path, fields: object) -> None:
    """Refuse a config.json that names no model type, an old or an unknown one. Raises LoadError."""
    from transformers import CONFIG_MAPPING, __version__

    file = folder / "config.json"
    named = fields.get("model_type") if isinstance(fields, Mapping) else None
    if not isinstance(named, str):
        raise LoadError(
            f'{ref.label}: {file} names no model_type. It must be a JSON object with "model_type": "{ref.family}".'
        )
    if named in _OLD_FALCONS:
        raise LoadError(
            f"{ref.label}: {file} names the model type {named}, which Falcon had until transformers 4.33. Take a newer "
            f'revision of the repository, or change the file: "model_type": "falcon", "new_decoder_architecture": '
            f"{_OLD_FALCONS[named]}; rename n_layer to num_hidden_layers, n_head to num_attention_heads and n_head_kv "
            "to num_kv_heads; remove auto_map."
        )
    if named not in CONFIG_MAPPING:
        raise LoadError(
            f"{ref.label}: {file} names the model type {named!r}, which transformers {__version__} does not know. "
            "This project loads the types falcon and llama."
        )


def _check_layers(ref: ModelRef, config: PreTrainedConfig, files: _Shards) -> None:
    """Refuse files with other layers than the configuration says. Raises LoadError."""
    there = {int(match[1]) for name in files.shapes if (match := _LAYER.search(name))}
    wanted = set(range(config.num_hidden_layers))
    if there == wanted or not there:
        return
    say = f"{ref.label}: {files.folder / 'config.json'} says num_hidden_layers {len(wanted)}, and the files hold "
    if missing := sorted(wanted - there):
        say += f"no weight of layer {', '.join(map(str, missing[:5]))}{' and others' if missing[5:] else ''}. "
        # A file cut by a conversion keeps the numbers of the layers after the gap.
        if there == set(range(len(there))):
            raise LoadError(f"{say}If the layers were removed on purpose, say num_hidden_layers {len(there)} there.")
        raise LoadError(f"{say}Download or convert the checkpoint again, or number its layers without a gap.")
    raise LoadError(f"{say}{len(there)} layers. Say num_hidden_layers {len(there)} there, or remove the other layers.")


def _check_tokenizer(
    ref: ModelRef, config: PreTrainedConfig, files: _Shards, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer of another model: ids without a row, no end token, no chat tokens. Raises LoadError."""
    rows = _embedding_rows(files) or config.vocab_size
    if rows != config.vocab_size:
        raise LoadError(
            f"{ref.label}: {files.folder / 'config.json'} says vocab_size {config.vocab_size:,}, and the embeddings "
            f"have {rows:,} rows. Correct vocab_size, or take the files of one model."
        )
    vocabulary = tokenizer.get_vocab()
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= rows:
        raise LoadError(
            f"{ref.label}: the tokenizer has ids up to {largest:,} ({token!r}), and the embeddings have {rows:,} rows. "
            f"Take the tokenizer of this model, or remove what was added to it from {files.folder / 'tokenizer.json'}."
        )
    if tokenizer.eos_token_id is None:
        raise LoadError(
            f"{ref.label}: its tokenizer names no end token, so that no reply would end. Name it as eos_token in "
            f"{files.folder / 'tokenizer_config.json'}."
        )
    wanted = () if ref.rehearsed else _CHAT_TOKENS.get(ref.format, ())
    if missing := [name for name in wanted if name not in vocabulary]:
        raise LoadError(
            f"{ref.label}: the chat format {ref.format} needs the tokens {', '.join(missing)}, which are not among the "
            f"{len(vocabulary):,} of the tokenizer. Correct the format in the profile, or take the chat model's files."
        )


def _check_special_ids(ref: ModelRef, fields: object, file: Path, rows: int) -> None:
    """Refuse begin, end and pad tokens in a configuration that no row stands for. Raises LoadError."""
    if not isinstance(fields, Mapping):
        raise LoadError(f"{ref.label}: {file} is not a JSON object. Restore it.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name)
        for token in value if isinstance(value, list) else [value]:
            # Some published configurations say -1 for a token that they do not have.
            if token is not None and (not isinstance(token, int) or token >= rows):
                raise LoadError(f"{ref.label}: {file} says {name} {token}, and there are {rows:,} tokens. Correct it.")


def _embedding_rows(files: _Shards) -> int | None:
    for name, shape in files.shapes.items():
        if name.endswith(_EMBEDDINGS):
            return shape[0]
    return None
