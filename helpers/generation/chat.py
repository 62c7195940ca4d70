"""A conversation with a model: history, system prompt, saving and loading."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.files import FileError, write_json
from helpers.base.text import is_blank
from helpers.generation.decoding import PLAIN
from helpers.generation.generating import _fitting, generate, stream
from helpers.generation.sampling import Sampling, _check_sampling
from helpers.models.formats import spoken
from helpers.models.loaded import context_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from helpers.generation.decoding import Decoding
    from helpers.generation.sampling import Reply
    from helpers.models.formats import Message
    from helpers.models.loaded import Loaded

CHAT_SAMPLING = Sampling(max_new_tokens=200)


class Chat:
    """A conversation with one model.

    ``transcript`` keeps every turn. ``messages`` are those that the model may be shown: no format's training data has a
    turn whose reply is blank. If they outgrow the context, the model is shown only the newest whole turns (see
    ``prompt``). Turn n (from 0) is drawn with ``sampling.seed + n``: a question asked twice may get two replies, and
    the same questions give the same transcript. ``decoding``: see ``generation.generate``. ``last_reply`` is the newest
    finished reply with its timings.
    """

    def __init__(
        self,
        loaded: Loaded,
        system: str | None = None,
        sampling: Sampling = CHAT_SAMPLING,
        *,
        decoding: Decoding = PLAIN,
    ) -> None:
        self.loaded, self.system, self.sampling, self.decoding = loaded, system, sampling, decoding
        self.last_reply: Reply | None = None
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation without turns whose reply is blank; a system message comes first."""
        return spoken(self.transcript)

    @property
    def transcript(self) -> list[Message]:
        """A copy of the whole conversation, blank replies included; a system message comes first."""
        return copy.deepcopy(self._with_system(self._turns))

    def ask(self, text: str) -> Reply:
        """Ask and wait for the whole reply. After an error the history is as before.

        Raises WorkbookError for a blank question, and what ``generation.generate`` raises.
        """
        reply = generate(self.loaded, self._asking(text), self._turn_sampling(), decoding=self.decoding)
        self._keep(text, reply)
        return reply

    def stream(self, text: str) -> Generator[str, None, Reply]:
        """Ask and yield the reply in pieces; the generator's value is the Reply.

        The history changes when the reply is finished: a stream that is closed, interrupted or fails leaves nothing of
        its turn behind. Raises as ``ask`` does; errors of the question come at once, before the first piece.
        """
        pieces = stream(self.loaded, self._asking(text), self._turn_sampling(), decoding=self.decoding)
        return self._streamed(text, pieces)

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self._turns, self.last_reply = [], None

    def prompt(self, text: str | None = None) -> str:
        """The exact text that the model would be given for the question ``text``, or for an empty question."""
        return self.loaded.format.render(_fitting(self.loaded, self._next(text or ""), self.sampling.max_new_tokens))

    def tokens_left(self) -> int:
        """Number of tokens that the next question may take before the oldest turn is left out.

        Negative if turns are left out already. The tokens reserved for the reply are not available.
        """
        used = len(self.loaded.format.encode(self.loaded.tokenizer, spoken(self._next(""))))
        context = context_tokens(self.loaded)
        reply = min(self.sampling.max_new_tokens, context // 2)
        return context - reply - used

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON (UTF-8): model id, system prompt, sampling and turns; whole or not at all.

        Raises WorkbookError if it cannot be written; then an earlier file is as it was.
        """
        state = {
            "model": self.loaded.ref.id,
            "system": self.system,
            "sampling": asdict(self.sampling),
            "turns": self._turns,
        }
        try:
            # of a link, the file that it points to
            write_json(Path(path).resolve(), state)
        except FileError as error:
            raise WorkbookError(f"The conversation was not saved. {error}") from error
        except (OSError, TypeError, ValueError) as error:
            reason = "a text in it holds half of a character" if isinstance(error, UnicodeEncodeError) else error
            raise WorkbookError(
                f"The conversation was not saved to {path}: {reason}. Choose another path, or correct what is named."
            ) from error

    @classmethod
    def load(cls, path: str | Path, loaded: Loaded) -> Chat:
        """A saved conversation, to be continued with ``loaded``: the model that began it, or another.

        Raises WorkbookError if the file is missing or is not a saved conversation.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            chat = cls(loaded, state["system"], Sampling(**state["sampling"]))
            chat._turns = list(state["turns"])
            # with a question appended, valid messages mean that the saved turns are whole pairs
            loaded.format.check(chat._next("a question may follow"))
            _check_sampling(chat.sampling)
        except FileNotFoundError as error:
            raise WorkbookError(f"There is no saved conversation at {path}. Check the path.") from error
        except OSError as error:
            raise WorkbookError(f"{path} cannot be read: {error}. Check the path and its permissions.") from error
        except (ValueError, KeyError, TypeError, WorkbookError, RecursionError) as error:
            reason = str(error).rstrip(".")
            raise WorkbookError(
                f"{path} is not a conversation that Chat.save wrote: {reason}. Choose another file."
            ) from error
        return chat

    def _with_system(self, turns: list[Message]) -> list[Message]:
        if self.system is None:
            return turns
        return [{"role": "system", "content": self.system}, *turns]

    def _next(self, text: str) -> list[Message]:
        return self._with_system([*self._turns, {"role": "user", "content": text}])

    def _asking(self, text: str) -> list[Message]:
        # what is not a string is left to the format's check, whose message names its type
        if isinstance(text, str) and is_blank(text):
            raise WorkbookError("The question is blank. Ask something.")
        return self._next(text)

    def _turn_sampling(self) -> Sampling:
        turn = len(self._turns) // 2  # each turn is two messages
        return replace(self.sampling, seed=self.sampling.seed + turn)

    def _streamed(self, text: str, pieces: Generator[str, None, Reply]) -> Generator[str, None, Reply]:
        reply = yield from pieces
        self._keep(text, reply)
        return reply

    def _keep(self, text: str, reply: Reply) -> None:
        turn: list[Message] = [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        self._turns = [*self._turns, *turn]
        self.last_reply = reply


def play(
    chat: Chat, questions: Iterable[str], show: Callable[[str, Reply], None] = lambda _question, _reply: None
) -> list[Reply]:
    """Ask the questions in order, as a scripted transcript; ``show(question, reply)`` is called after each reply."""
    replies = []
    for question in questions:
        reply = chat.ask(question)
        replies.append(reply)
        show(question, reply)
    return replies
