"""lm-evaluation-harness ties layers of the model it is given, which a copy keeps it from."""

import importlib
import io
import random

import lm_eval.models.huggingface as harness
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from helpers.base.files import ROOT
from helpers.models.workarounds.lm_eval_model import (
    logits_without_cache,
    same_random_state,
    slow_bars_only,
    untied_copy,
)


@pytest.fixture
def untied(falcon):
    """A model whose configuration ties the output layer, while the layer is one of its own."""
    model = falcon(vocab_size=4096)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    return model


def in_harness(model):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    return harness.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=64)


def test_the_harness_still_ties_the_output_layer(untied):
    in_harness(untied)
    assert untied.lm_head.weight is untied.get_input_embeddings().weight, "the harness ties nothing: delete untied_copy"


def test_a_copy_is_not_tied_and_shares_the_weights(untied):
    before = untied.lm_head.weight
    copied = untied_copy(untied)
    in_harness(copied)
    assert copied.lm_head.weight is untied.lm_head.weight is before
    assert before is not untied.get_input_embeddings().weight


def test_the_harness_still_keeps_the_cache_of_a_batch(untied):
    ids, calls = torch.tensor([[5, 9, 2]]), []
    hook = untied.register_forward_hook(lambda module, given, output: calls.append(output.past_key_values))
    plain = in_harness(untied_copy(untied))._model_call(ids)
    hook.remove()
    assert calls[0] is not None, "the harness asks for no cache: delete logits_without_cache"
    hook = untied.register_forward_hook(lambda module, given, output: calls.append(output.past_key_values))
    assert torch.equal(logits_without_cache(untied, ids), plain)
    hook.remove()
    assert calls[1] is None


def test_the_harness_still_shows_its_bars_at_once(monkeypatch):
    written = io.StringIO()
    module = importlib.import_module("lm_eval.api.task")
    list(module.tqdm(range(2), file=written))
    assert written.getvalue(), "the harness draws no bar at once: delete slow_bars_only"
    quiet = io.StringIO()
    before = module.tqdm
    with slow_bars_only(module):
        list(module.tqdm(range(2), file=quiet))
    assert quiet.getvalue() == ""
    assert module.tqdm is before


def draw_a_task() -> None:
    folder = ROOT / "notebooks/data/tasks"
    TaskManager(include_path=[folder], include_defaults=False).load(["short_facts"])


def test_the_random_state_is_the_same_afterwards():
    before = random.getstate()
    with same_random_state():
        random.random()
    assert random.getstate() == before
