"""The drawings: their numbers are those of a real layer, their texts stay inside their boxes."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch
from transformers import FalconForCausalLM

from helpers import figures
from helpers.machine import published_config
from helpers.models import nf4_code

CONFIG = published_config("tiiuae/falcon-180B")
TOKENS = ["User", ":", " Is", " a", " dog", " an", " animal", "?", "\n", "Falcon", ":", " Yes", ".", "<|endoftext|>"]
TRAINED = [False] * 11 + [True] * 3
torch.manual_seed(0)
BLOCKS = torch.randn(500, 64)
BLOCKS = BLOCKS / BLOCKS.abs().amax(1, keepdim=True)
INPUTS = torch.cat([torch.linspace(-2, 2, 61), torch.tensor([-25.4, 8.0])])
DRAWINGS = {
    "decoder_layer": lambda: figures.decoder_layer(CONFIG, "falcon-mini (stand-in)"),
    "shared_heads": lambda: figures.shared_heads(CONFIG, "falcon-mini (stand-in)"),
    "quantization_grids": lambda: figures.quantization_grids(INPUTS, BLOCKS, nf4_code(), "falcon-mini (stand-in)"),
    "lora_and_qlora": lambda: figures.lora_and_qlora(14848, 59392, 16, "falcon-mini (stand-in)"),
    "loss_tokens": lambda: figures.loss_tokens(TOKENS, TRAINED, "falcon-mini (stand-in)"),
}


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_names_its_model_fits_its_paper_and_keeps_texts_inside_their_boxes(name):
    figure = DRAWINGS[name]()
    assert "falcon-mini (stand-in)" in figure.get_suptitle()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.get_tightbbox(canvas.get_renderer())
    assert min(page.x0, page.y0) >= 0
    assert (page.x1, page.y1) <= tuple(figure.get_size_inches())
    boxes = [box for axis in figure.axes for box in axis.patches if isinstance(box, FancyBboxPatch)]
    for axis in figure.axes:
        for text in axis.texts:
            extent = text.get_window_extent()
            around = [box.get_window_extent() for box in boxes]
            holding = [box for box in around if box.contains(*(extent.p0 + extent.p1) / 2)]
            assert all(box.x0 <= extent.x0 and extent.x1 <= box.x1 for box in holding), text.get_text()


def test_a_drawing_is_narrow_enough_for_a_telephone():
    """On 390 pixels a letter of the usual size is at least nine pixels high."""
    for draw in DRAWINGS.values():
        figure = draw()
        assert 10.5 / 72 * 390 / figure.get_figwidth() > 8.8


def test_the_decoder_layer_has_the_shapes_of_the_library_s():
    with torch.device("meta"):
        layer = FalconForCausalLM(CONFIG).transformer.h[0]
    shown = texts(figures.decoder_layer(CONFIG, "Falcon-180B"))
    matrices = {name.split(".")[-2]: weight for name, weight in layer.named_parameters() if weight.ndim == 2}
    assert len(matrices) == 4
    for name, weight in matrices.items():
        assert f"{name}\n{weight.shape[1]:,} → {weight.shape[0]:,}" in shown
    norms = {name.split(".")[0] for name, weight in layer.named_parameters() if weight.ndim == 1}
    assert {f"{norm}: layer norm" for norm in norms} <= set(shown)


def test_the_heads_are_counted_and_their_cache_is_to_scale():
    above, below = figures.shared_heads(CONFIG, "Falcon-180B").axes
    assert sum(len(group.get_offsets()) for group in above.collections) == 232
    assert len(above.patches) == 8
    assert [{bar.get_height() for bar in bars} for bars in below.containers] == [{8}, {232}]
    few, many = texts(figures.shared_heads(CONFIG, "Falcon-180B"))[-2:]
    # A measured cache of transformers: 4,751,360 bytes per token, a 29th of it with 8 heads.
    assert "160 KiB per token" in few
    assert "0.312 GiB at 2,048 tokens" in few
    assert f"{4_751_360 / 1024:,.0f} KiB per token" in many
    assert "9.06 GiB at 2,048 tokens" in many


def test_the_grids_are_those_of_int8_and_nf4_and_the_errors_those_of_all_blocks():
    axes = figures.quantization_grids(INPUTS, BLOCKS, nf4_code(), "x").axes
    titles = [axis.get_title("left") for axis in axes]
    assert titles[0].endswith("the largest input, 25.4, sets the step\nstep 0.200")
    assert titles[1] == "int8 without 2 outliers (magnitude 6 or more)\nstep 0.016"
    lines = [[segment[0][0] for segment in axis.collections[0].get_segments()] for axis in axes]
    assert lines[0][1] - lines[0][0] == pytest.approx(25.4 / 127)
    assert lines[3] == pytest.approx(list(nf4_code()))
    assert len(axes[1].collections[1].get_offsets()) == 61
    for axis, grid in ((axes[2], torch.linspace(-1, 1, 16)), (axes[3], torch.tensor(nf4_code()))):
        error = (BLOCKS[..., None] - grid).abs().amin(-1).mean()
        assert f"mean error {error:.4f} over 500 blocks" in axis.get_title("left")


def test_the_adapter_s_size_is_counted_by_hand():
    shown = "\n".join(texts(figures.lora_and_qlora(14848, 59392, 16, "x")))
    assert f"{16 * (14848 + 59392) / 1e6:.2f} M numbers" in shown
    assert "bf16: 1,764 MB" in shown  # 881,852,416 weights of two bytes
    assert "nf4: 496 MB" in shown  # of half a byte, and four for each 64
    assert "0.13% of W's" in shown


def test_only_the_reply_and_the_end_token_carry_the_loss():
    shown = texts(figures.loss_tokens(TOKENS, TRAINED, "x"))
    assert shown[:-1:2] == [token.replace(" ", "␣").replace("\n", "↵") for token in TOKENS]
    assert shown[1:-1:2] == ["-100"] * 11 + ["loss"] * 3
    assert shown[-1].startswith("3 of 14 tokens count")
