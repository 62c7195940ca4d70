"""Turn text into token ids: a raw prompt, the text of a conversation, and text in which nothing is a control token.

Tokenizers find their added tokens (``<|im_start|>``, ``>>QUESTION<<``) in any text. In a raw prompt that is wanted.
What a user wrote in a conversation must stay text, so a conversation goes through a double of the tokenizer without
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from helpers.base.errors import WorkbookError
from helpers.base.text import well_formed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

_END_OF_TEXT = "<|endoftext|>"
_OPENS_A_TURN = frozenset({"<|im_start|>", "<|im_end|>"})  # some tokenizers name these as begin and end of a text


class Token(NamedTuple):
    """A token id, and the part of the text (``start`` to ``end``) that it stands for."""

    id: int
    start: int
    end: int


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a raw prompt, with the begin token if the tokenizer adds one; control tokens in the text count.

    A text that begins with the begin token gets no second one, and no end token is added. Each further begin token
    starts a sequence of its own, as in Llama-2's conversations.
    """
    begin = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
    _check_characters(text)
    ids: list[int] = []
    if _adds_begin(tokenizer) and not text.startswith(begin):
        ids.append(tokenizer.bos_token_id)
    for number, sequence in enumerate(text.split(begin) if begin else [text]):
        if number > 0:
            ids.append(tokenizer.bos_token_id)
        # verbose would warn about texts longer than the context, which callers check themselves.
        ids += tokenizer.encode(sequence, add_special_tokens=False, verbose=False)
    return ids


def literal_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Token]:
    """The tokens of a text in which nothing is a control token; no begin token is added."""
    return list(_Double(tokenizer).tokens(text))


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one, such as a reply after its prompt; nothing is a control token.

    Tokenizers in the manner of sentencepiece put a space before every text, which a continuation must not get.
    """
    double = _Double(tokenizer)
    if not double.prepends:
        return [token.id for token in double.tokens(text)]
    # A line end is one token, which takes the space and is cut off together with it.
    return [token.id for token in double.tokens("\n" + text) if token.end > 1]


def _conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, controls: Sequence[str], begin: str = ""
) -> list[Token]:
    """The tokens of a conversation's text, in which only ``controls`` are control tokens.

    ``begin`` starts a sequence of its own, wherever it occurs. A control string that the tokenizer does not have as a
    token is ordinary text.
    """
    double = _Double(tokenizer, controls)
    tokens: list[Token] = []
    sequences = text.split(begin) if begin in double.ids else [text]
    if _adds_begin(tokenizer) and not (len(sequences) > 1 and not sequences[0]):
        tokens.append(Token(tokenizer.bos_token_id, 0, 0))
    position = 0
    for number, sequence in enumerate(sequences):
        if number > 0:
            tokens.append(Token(double.ids[begin], position, position + len(begin)))
            position += len(begin)
        tokens += double.tokens(sequence, position)
        position += len(sequence)
    return tokens


def document_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that began a document in the model's training; None if the tokenizer has none.

    That is the begin token, or else the end token, unless it opens or closes a turn of a chat: tokenizers of chat
    models name such tokens too.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (tokenizer.bos_token, tokenizer.eos_token, _END_OF_TEXT):
        if isinstance(token, str) and token in vocabulary and token not in _OPENS_A_TURN:
            return token
    return None


def _adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts its begin token before a text."""
    begin = tokenizer.bos_token_id
    if begin is None:
        return False
    # Found out by trying, because the settings for it differ from one class of tokenizers to the next.
    with_special: list[int] = tokenizer.encode("a")
    without: list[int] = tokenizer.encode("a", add_special_tokens=False)
    return with_special[:1] == [begin] and without[:1] != [begin]


def _check_characters(text: str) -> None:
    if not well_formed(text):
        raise WorkbookError("The text holds half of a surrogate pair, which is no character. Remove it.")


class _Double:
    """A tokenizer's double that shares its model but knows only the added tokens that it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Sequence[str] = ()) -> None:
        from tokenizers import Tokenizer

        backend: Tokenizer = tokenizer.backend_tokenizer
        self.tokenizer = Tokenizer(backend.model)
        self.tokenizer.normalizer, self.tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self.ids: dict[str, int] = {}
        for token_id, token in backend.get_added_tokens_decoder().items():
            if token.content in controls or _is_text(token):
                self.tokenizer.add_tokens([token])
                self.ids[token.content] = token_id
        # The double numbers tokens that its model does not have anew.
        self._renumbered = {self.tokenizer.token_to_id(content): token_id for content, token_id in self.ids.items()}

    @property
    def prepends(self) -> bool:
        """True if the tokenizer puts a space before every text."""
        return "".join(self.tokenizer.encode("a", add_special_tokens=False).tokens) != "a"

    def tokens(self, text: str, position: int = 0) -> Iterator[Token]:
        """The tokens of a text that begins at ``position``."""
        _check_characters(text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield Token(self._renumbered.get(token_id, token_id), position + start, position + end)


def _is_text(token: AddedToken) -> bool:
    """True for an added token that is part of the vocabulary of texts: a word, or a run of spaces."""
    return not token.special and all(character.isalnum() or character.isspace() for character in token.content)
