"""Speed and memory: what is counted is counted by hand here; how fast the machine is, is nobody's to test."""

import itertools
import math
import os
import sys
from dataclasses import replace

import pytest
import torch
from transformers import FalconConfig

from helpers import speed
from helpers.base import WorkbookError
from helpers.machine import Gpu, anatomy, hardware, memory
from helpers.speed import Benchmark, SpeedSettings, benchmark
from helpers.speed.benchmark import _peak_memory, _Spread

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20
SMALL = SpeedSettings(prompt_tokens=6, new_tokens=4, repeats=2, bandwidth=1e9)
# The tiny model of conftest: 2 layers that cache 4 heads of 16, keys and values, in fp32.
CACHE_BYTES = 2 * 2 * 4 * 16 * 4


def machine(gpus=0, gpu_bytes=80_000_000_000, ram_bytes=8 * 2**30):
    found = [Gpu(index, "a GPU", gpu_bytes, gpu_bytes, (8, 0)) for index in range(gpus)]
    return replace(hardware.detect(), gpus=tuple(found), ram_available_bytes=ram_bytes)


def test_a_spread_is_median_least_and_largest():
    assert _Spread.of([3.0, 1.0, 2.0, 10.0]) == _Spread(2.5, 1.0, 10.0)
    assert _Spread(0.105, 0.098, 0.11).text(1000) == "105 (98 to 110)"
    assert _Spread(2.5, 1, 1234.5).text() == "2.5 (1 to 1,234)"


def test_every_figure_follows_from_times_and_sizes(tiny_loaded):
    found = speed.measure(tiny_loaded, (1, 3), SMALL)
    assert not found.interleaved
    assert found.bandwidth == 1e9
    assert [row.batch_size for row in found.rows] == [1, 3]
    for row in found.rows:
        assert row.model == tiny_loaded.ref.label
        assert row.stored_bytes == tiny_loaded.report.stored_bytes
        # the prompt and half of the new tokens are cached on average; embeddings and head are one matrix
        assert row.step_bytes == row.stored_bytes + row.batch_size * (6 + 2) * CACHE_BYTES
        assert row.limit == pytest.approx(row.batch_size * 1e9 / row.step_bytes)
        assert row.prefill.high == pytest.approx(row.batch_size * 6 / row.first_token.low)
        assert 0 < row.decode.low <= row.decode.median <= row.decode.high < math.inf
        assert row.missing == ""


def test_embeddings_that_a_step_does_not_read_are_not_counted(tiny_loaded):
    model = type(tiny_loaded.model)(
        tiny_loaded.model.config.from_dict({**tiny_loaded.model.config.to_dict(), "tie_word_embeddings": False})
    )
    untied = replace(tiny_loaded, model=model.eval())
    (row,) = speed.measure(untied, [1], SMALL).rows
    assert row.step_bytes == row.stored_bytes - len(untied.tokenizer) * 64 * 4 + 8 * CACHE_BYTES


def test_a_reply_has_exactly_the_tokens_asked_for_also_where_every_token_ends_it(tiny_loaded, monkeypatch):
    monkeypatch.setattr(tiny_loaded.model.generation_config, "eos_token_id", list(range(len(tiny_loaded.tokenizer))))
    arrivals = benchmark._run(tiny_loaded.model, torch.tensor([[5, 6], [7, 8]]), 9)
    assert len(arrivals) == 9
    assert all(earlier < later for earlier, later in itertools.pairwise([0.0, *arrivals]))


def test_prompts_are_of_the_length_asked_for_and_differ(tiny_loaded):
    ids = benchmark._prompts(tiny_loaded, 3, 100)
    assert ids.shape == (3, 100)
    assert len({tuple(row.tolist()) for row in ids}) == 3


def test_models_take_turns(tiny_loaded):
    models, calls = [replace(tiny_loaded, model=type(tiny_loaded.model)(tiny_loaded.model.config)) for _ in "ab"], []
    for name, one in zip("ab", models, strict=True):
        one.model.register_forward_pre_hook(lambda module, given, name=name: calls.append(name))
    found = speed.measure(models, [1, 2], SMALL)
    turns = "".join(name for name, _ in itertools.groupby(calls))
    assert turns == "ab" * (1 + 2 * 3)  # warming up, then for both batch sizes the untimed run and two repeats
    assert calls.count("a") == calls.count("b") == 2 + 2 * 3 * 4
    assert found.interleaved
    assert [row.batch_size for row in found.rows] == [1, 2, 1, 2]


# Memory


def test_peak_memory_is_the_most_that_is_alive_at_once():
    def work():
        kept = torch.ones(2 * MIB, dtype=torch.uint8)
        for _ in range(3):
            torch.ones(3 * MIB, dtype=torch.uint8)
        return kept

    assert _peak_memory(work, torch.device("cpu")) == 5 * MIB


def test_peak_memory_counts_from_where_it_starts():
    held = [torch.ones(4 * MIB, dtype=torch.uint8)]

    def work():
        held.clear()
        torch.ones(MIB, dtype=torch.uint8)

    assert _peak_memory(work, torch.device("cpu")) <= MIB
    assert _peak_memory(lambda: None, torch.device("cpu")) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_leaves_out_what_was_there():
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.ones(8 * MIB, dtype=torch.uint8, device=device)
    assert _peak_memory(lambda: torch.ones(4 * MIB, dtype=torch.uint8, device=device), device) == 4 * MIB
    assert held.sum() == 8 * MIB


def test_the_peak_holds_weights_cache_and_logits(tiny_loaded):
    small, large = speed.measure(tiny_loaded, [1, 8], replace(SMALL, prompt_tokens=64, repeats=1)).rows
    vocabulary = len(tiny_loaded.tokenizer) * 4
    for row in (small, large):
        beside = row.peak_bytes - row.stored_bytes
        assert beside > row.batch_size * (67 * CACHE_BYTES + vocabulary)
        assert beside < row.batch_size * (67 * CACHE_BYTES + 64 * vocabulary)  # not the logits of the whole prompt
    assert large.peak_bytes > small.peak_bytes


def test_nothing_is_written_to_standard_error(tiny_loaded, capfd):
    speed.measure(tiny_loaded, [1], SMALL)
    torch.zeros(1).sum()
    assert capfd.readouterr().err == ""


def test_standard_error_works_again_after_a_failure(capfd):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _peak_memory(fails, torch.device("cpu"))
    print("here", file=sys.stderr)
    os.write(2, b" and here\n")
    assert capfd.readouterr().err == "here\n and here\n"


# What does not fit


def test_a_batch_that_cannot_fit_becomes_a_row_that_says_so(tiny_loaded):
    fits, without = speed.measure(tiny_loaded, [1, 10**10], SMALL).rows
    assert fits.decode
    assert not without.decode
    assert without.peak_bytes is None
    assert "GiB missing for this batch" in without.missing
    table = Benchmark((fits, without), False).table()
    assert table["read, tokens/s"].iloc[1] == without.missing
    assert table.index.names == ["model", "precision", "batch size"]


def test_running_out_of_memory_ends_one_row_only(tiny_loaded):
    failing = replace(tiny_loaded, model=type(tiny_loaded.model)(tiny_loaded.model.config))

    def fail(module, given, options):
        if len(options["input_ids"]) > 1:
            raise torch.OutOfMemoryError

    failing.model.register_forward_pre_hook(fail, with_kwargs=True)
    found = speed.measure([failing, tiny_loaded], [1, 2], SMALL).rows
    assert [row.missing for row in found] == ["", "ran out of memory", "", ""]
    assert [bool(row.decode) for row in found] == [True, False, True, True]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"new_tokens": 1}, "two new"),
        ({"repeats": 0}, "one repeat"),
        ({"prompt_tokens": 0}, "prompt token"),
        ({"prompt_tokens": 126}, "126 and 4 tokens do not fit"),
    ],
)
def test_impossible_sizes_are_refused(tiny_loaded, sizes, says):
    with pytest.raises(WorkbookError, match=says):
        speed.measure(tiny_loaded, [1], replace(SMALL, **sizes))


def test_no_batch_size_is_refused(tiny_loaded):
    for batch_sizes in ([], [0]):
        with pytest.raises(WorkbookError, match="batch size"):
            speed.measure(tiny_loaded, batch_sizes, SMALL)


def test_joined_benchmarks_are_interleaved_only_if_there_was_one():
    assert speed.joined([Benchmark((), True)]).interleaved
    assert not speed.joined([Benchmark((), True), Benchmark((), True)]).interleaved
    assert speed.joined([]) == Benchmark((), False)


def test_a_published_shape_sets_the_limit():
    """Falcon-180B in bf16 on A100s (2.04e12 bytes a second, NVIDIA's data sheet): 357 GB a step, under six a second."""
    config = anatomy.published_config("tiiuae/falcon-180B")
    stored = memory.weight_bytes(config, "bf16")
    row = benchmark._SpeedRow("falcon-180B", "bf16", 4, 512, 64, 3, stored, stored, 2.04e12)
    assert row.limit / 4 == pytest.approx(5.71, abs=0.01)


def test_both_caches_are_timed_and_weighed_by_hand():
    """Two layers, 8 query heads on 2 key-value heads of size 8, bf16: 2 · 2 · 2 · 8 · 2 = 128 bytes a token grouped."""
    config = FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_kv_heads=2,
        new_decoder_architecture=True,
    )  # fmt: skip
    rows = speed.compare_caches(config, (10, 30), (1, 3), repeats=2)
    assert [(row.cache, row.batch_size, row.context_tokens) for row in rows] == [
        (cache, batch, tokens) for batch in (1, 3) for tokens in (10, 30) for cache in ("library", "grouped")
    ]
    for row in rows:
        after = row.context_tokens + 3  # a token for each step, the untimed one too
        assert row.cache_bytes == row.batch_size * after * {"grouped": 128, "library": 512}[row.cache]
        assert row.tokens_per_second == row.batch_size / row.seconds.median
        assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
    with pytest.raises(WorkbookError, match="at least 1"):
        speed.compare_caches(config, (0,))
