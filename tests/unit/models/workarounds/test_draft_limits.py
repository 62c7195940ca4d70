"""The limits of a draft: transformers warns about its own call, unless they are in the configuration."""

import copy
import logging

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from helpers.models.workarounds.draft_limits import merge_limits

IDS = torch.tensor([[5, 9, 2, 77, 3]])


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """Runs assisted generation with a draft; returns its tokens and what transformers logged."""
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    transformers_logging.get_logger("transformers").setLevel(logging.WARNING)

    def run(model, draft):
        # A message of warning_once is kept, and would not come a second time.
        logging.Logger.warning_once.cache_clear()
        caplog.clear()
        settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        mask = torch.ones_like(IDS)
        tokens = model.generate(IDS, attention_mask=mask, generation_config=settings, assistant_model=draft)
        return tokens, caplog.text

    level = transformers_logging.get_verbosity()
    yield run
    transformers_logging.set_verbosity(level)


def models(falcon):
    model, draft = falcon(), copy.copy(falcon(num_hidden_layers=1))
    model.generation_config = GenerationConfig()
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    return model, draft


def test_transformers_still_warns_about_its_own_call(falcon, warnings_of):
    _, text = warnings_of(*models(falcon))
    assert "generation_config" in text, "transformers gives a draft its limits silently: delete draft_limits.py"


def test_merged_limits_give_the_same_tokens_no_warning_and_a_count(falcon, warnings_of):
    plain, _ = warnings_of(*models(falcon))
    model, draft = models(falcon)
    counts = []
    merge_limits(draft, counts.append)
    tokens, text = warnings_of(model, draft)
    assert torch.equal(tokens, plain)
    assert "generation_config" not in text
    assert counts
    assert max(counts) <= 3
