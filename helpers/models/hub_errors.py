"""What goes wrong between this machine and a hub: named, with what to do, and tried again where that helps."""

from __future__ import annotations

import email.utils
import re
import time
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from helpers.base.errors import WorkbookError
from helpers.base.hub_variables import check_connection_variables, without_password
from helpers.models.checkpoint import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from helpers.models.references import ModelRef

_T = TypeVar("_T")
_WAITS = (1, 2, 4, 8, 16)  # seconds before each further try; a hub that says how long is believed
_LONGEST_WAIT = 60  # seconds: who is told to wait longer is told so, and tries again later
_PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_NO_NETWORK = "or use the profile laptop, which needs no network."


def _tried(ref: ModelRef, ask: Callable[[], _T]) -> _T:
    """What ``ask`` gets from the hub. Passing errors are tried again, and said while waiting. Raises LoadError."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _check_connection(ref)
    with _hub_errors(ref):
        for wait in _WAITS:
            try:
                return ask()
            except Exception as error:
                seconds = _seconds_to_wait(error, wait)
                if seconds is None:
                    raise
                _say(f"{ref.label}: {_what(error)} Trying again in {seconds:.0f} s ...")
                time.sleep(seconds)
        return ask()


def _check_connection(ref: ModelRef) -> None:
    try:
        check_connection_variables()
    except WorkbookError as error:
        raise LoadError(f"{ref.label} could not be downloaded: {error}") from error


def _seconds_to_wait(error: Exception, otherwise: float) -> float | None:
    """How long to wait before another try; None if it would not help."""
    from httpx2 import ReadError, RemoteProtocolError, TimeoutException

    cause = _root(error)
    if (status := _status(cause)) is None:
        passing = isinstance(cause, (TimeoutException, ReadError, RemoteProtocolError))
        return otherwise if passing else None
    if status not in _PASSING:
        return None
    told = _retry_after(cause)
    if told is None:
        return otherwise
    return told if told <= _LONGEST_WAIT else None


def _retry_after(error: BaseException) -> float | None:
    """The seconds that the hub asks to wait (Retry-After: a number, or a date); None if it names none."""
    text = _header(error, "Retry-After")
    if text.isdecimal():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn the errors of the hub and of the connection into LoadErrors that say what to do."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    # The last four: an answer is read as JSON, with the fields that a hub sends.
    except (OSError, RuntimeError, HTTPError, ImportError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{ref.label} could not be downloaded: {_advice(ref, error)} ({type(error).__name__})"
        ) from error


def _advice(ref: ModelRef, error: Exception) -> str:
    """What happened and what to do, as a sentence that begins in small letters."""
    cause = _root(error)
    named = _refused(ref, cause) or _offline(error) or _failed(cause) or _disconnected(cause) or _no_hub(cause)
    return named or _without_secrets(error)


def _refused(ref: ModelRef, error: BaseException) -> str | None:
    """What the hub refuses to give, or does not have."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{ref.id}"
    # The first class that fits counts, so a subclass must come before its base.
    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: f"its licence must be accepted. Do so on {page}, then run `hf auth login` with a token "
        "of the same account.",
        errors.DisabledRepoError: f"the hub has disabled {page}. Name another model in the profile.",
        errors.RepositoryNotFoundError: f"{page} does not exist or is private. Check the profile, or run "
        "`hf auth login`.",
        errors.RevisionNotFoundError: f"{page} has no revision {ref.revision}. Correct the profile.",
        errors.RemoteEntryNotFoundError: f"{page} has no such file at the revision {ref.revision}. Check the "
        "profile: it must name a model in the format of transformers.",
    }
    for kind, text in advice.items():
        if isinstance(error, kind):
            return text
    if _status(error) == 401:
        return (
            f"the hub does not know this token. Make a new one on {_TOKEN_PAGE}, then run `hf auth login`, or "
            "correct HF_TOKEN."
        )
    if _status(error) == 403:
        return f"this token may not read it. Give it read access to gated repositories on {_TOKEN_PAGE}."
    return None


def _offline(error: Exception) -> str | None:
    """What to do about a model that is not here, or not whole, where HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub import constants, errors

    if not constants.HF_HUB_OFFLINE:
        return None
    state = "it was not downloaded yet"
    if isinstance(error, errors.IncompleteSnapshotError):
        state = "its download is not complete"
    return (
        f"{state} and the hub cannot be reached, because HF_HUB_OFFLINE is set. Unset it (complete files are kept), "
        f"{_NO_NETWORK}"
    )


def _failed(error: BaseException) -> str | None:
    """An answer of the hub that says that it cannot answer."""
    status = _status(error)
    if status is None:
        return None
    if status == 429:
        told = _retry_after(error)
        when = "Wait some minutes" if told is None else f"Wait {told:.0f} s"
        return f"{_what(error)} {when} and try again, or run `hf auth login`, which raises the limit."
    if status == 407:
        return f"{_what(error)} It is a proxy that asks for a user name and password: put them into HTTP_PROXY."
    if status == 511:
        return f"{_what(error)} This network asks you to log in first. Open any page in a browser, {_NO_NETWORK}"
    if status >= 500 or status == 408:
        return f"{_what(error)} The hub cannot be reached now: try again later, {_NO_NETWORK} Complete files are kept."
    return f"{_what(error)} Check HF_ENDPOINT and the profile, {_NO_NETWORK}"


def _disconnected(error: BaseException) -> str | None:
    """A connection that was not made, or that broke."""
    import httpx2

    cannot = f"the hub cannot be reached: {_what(error)}"
    text = str(error)
    if isinstance(error, httpx2.ProxyError):
        return f"{cannot} Correct HTTPS_PROXY (with the user name and password, if it asks for them)."
    if isinstance(error, httpx2.ConnectError) and "CERTIFICATE" in text.upper():
        return (
            f"{cannot} If a proxy of your network signs for it, set SSL_CERT_FILE to a file with your organisation's "
            "certificates."
        )
    if isinstance(error, (httpx2.ConnectError, httpx2.TimeoutException)):
        return f"{cannot} Connect to the network (and check HF_ENDPOINT and HTTPS_PROXY), {_NO_NETWORK}"
    if isinstance(error, httpx2.TooManyRedirects):
        return f"{cannot} It leads to another page, such as a login page. Open it in a browser and log in."
    if isinstance(error, httpx2.HTTPError):
        return f"the connection to the hub broke. Load it again: complete files are kept. {_without_secrets(error)}"
    return None


def _no_hub(error: BaseException) -> str | None:
    """An answer that no hub gives, or a question that cannot be sent."""
    from huggingface_hub.errors import FileMetadataError

    if isinstance(error, UnicodeEncodeError):
        return (
            "what is sent to the hub holds a letter that is not ASCII, most likely the token. Make a copy of it again, "
            f"from {_TOKEN_PAGE}, for HF_TOKEN or `hf auth login`, and check the other HF_ variables."
        )
    of_answer = (FileMetadataError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
    answered = isinstance(error, of_answer)
    # The library's own words for a file without the headers of a hub.
    if not answered and "X-Repo-Commit" not in str(error):
        return None
    return (
        f"{_address()} answered with something that no hub sends, such as the login page of a network or a proxy. "
        f"Open it in a browser and log in, or correct HF_ENDPOINT, {_NO_NETWORK}"
    )


def _what(error: BaseException) -> str:
    """What happened, as a sentence without advice."""
    import httpx2

    cause, address = _root(error), _address()
    if (status := _status(cause)) is not None:
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown"
        return f"{address} answered {status} ({phrase})."
    text = _without_secrets(cause).rstrip(".")
    if isinstance(cause, httpx2.TimeoutException):
        return f"{address} did not answer in time ({type(cause).__name__})."
    if "Errno -2" in text or "Errno -3" in text or "Errno -5" in text or "name resolution" in text:
        return f"the name of {address} cannot be resolved ({text})."
    return f"the connection to {address} failed ({text})."


def _address() -> str:
    from huggingface_hub import constants

    return without_password(constants.ENDPOINT)


def _root(error: BaseException) -> BaseException:
    """The error of the hub or of the connection under what the library made of it."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (HfHubHTTPError, HTTPError)):
            return cause
        cause = cause.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _header(error: BaseException, name: str) -> str:
    response = getattr(error, "response", None)
    return str(response.headers.get(name, "")) if response is not None else ""


def _without_secrets(error: BaseException) -> str:
    """The text of an error; addresses in it may hold a user name and password."""
    return re.sub(r"://[^/@\s]*@", "://", str(error))


def _say(text: str) -> None:
    from helpers.base.terminal import Terminal, tell

    tell(Terminal(stderr=True), text)
