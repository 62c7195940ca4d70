"""What a secret looks like, and which secrets this user has: in the environment, in parameters, in files of tokens.

A value is a secret because of its shape. Either it has the form of a well-known token (``hf_`` and 34 letters), or
it stands under a name such as DB_PASSWORD and is no number, word, path or name of the workbook. A word cannot be told
from what a notebook computes: ``DB_PASSWORD=laptop`` would blank the profile's name in every file. So a word, or a
text under six characters, is hidden only beside its own name (``DB_PASSWORD=laptop``), never elsewhere.
"""

from __future__ import annotations

import functools
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from helpers.base.files import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# What the runner writes in the place of a secret.
REDACTED = "[redacted]"
SHORTEST = 6
_SHORTEST_KEY = 8  # of a value whose name promises less, such as CACHE_KEY
_LONG_WORD = 16  # letters: no word of a notebook is as long
_LONG_PHRASE = 20
_MOST_BYTES = 64 * 2**10  # of a file of tokens
_NAMED = "\0"  # between a name and its value: hidden only beside each other

_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|KEY|PASSWORD|PASSWD|(?<!^)(?<!^OLD)PWD|PASS|PASSPHRASE|CREDENTIAL|AUTH|PAT)S?\d*(_|$)", re.I
)
# Names that promise a secret. Any other KEY may as well be that of a cache or of a dictionary.
_SURE_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PWD|PASS|PASSPHRASE|CREDENTIALS?|(API|ACCESS|PRIVATE|ACCOUNT)_?KEY)\d*(_|$)", re.I
)
# The tokens of services that people use beside models, as their documentation and secret scanners describe them.
# Every repetition is bounded: a long line must cost linear time.
TOKEN_SHAPES = (
    r"hf[_-][A-Za-z0-9]{30,64}",  # with a dash, as in the name of a figure's file
    r"api_org_[A-Za-z0-9]{30,64}",
    r"gh[pousr]_[A-Za-z0-9]{30,255}",
    r"github_pat_[A-Za-z0-9_]{22,255}",
    r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat|ffct)-[\w.-]{20,255}",
    r"sk-[\w-]{20,255}",
    r"[srp]k_(?:live|test)_[A-Za-z0-9]{16,255}",
    r"A(?:KI|SI|BI|CC)A[A-Z0-9]{16}",
    r"AIza[\w-]{35}",
    r"ya29\.[\w-]{20,1000}",
    r"GOCSPX-[\w-]{20,64}",
    r"xox[a-z]-[A-Za-z0-9-]{10,255}",
    r"xapp-\d-[A-Za-z0-9-]{10,255}",
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[\w-]{50,1000}",
    r"SG\.[\w-]{16,64}\.[\w-]{16,64}",
    r"do[opr]_v1_[0-9a-f]{64}",
    r"dckr_pat_[\w-]{20,64}",
    r"dapi[0-9a-f]{32}",
    r"hv[sbr]\.[\w-]{20,255}",
    r"r8_[A-Za-z0-9]{30,64}",
    r"gsk_[A-Za-z0-9]{40,64}",
    r"xai-[A-Za-z0-9]{40,128}",
    r"nvapi-[\w-]{40,128}",
    r"pplx-[A-Za-z0-9]{40,64}",
    r"ATATT3[\w=-]{50,300}",
    r"lsv2_(?:pt|sk)_[A-Za-z0-9_]{30,80}",
    r"eyJ[\w-]{8,4000}\.[\w-]{8,8000}\.[\w-]{0,2000}",  # a JSON web token
)
_TOKEN = re.compile(f"(?:{'|'.join(TOKEN_SHAPES)})(?![A-Za-z0-9])")
_USER_INFO = re.compile(r"://([^/?#\s\"'<>]{1,1024})@")
_PAIR = re.compile(
    # A look ahead, because in "login me password x" each word may be a name.
    r"(?<![\w.-])(?=([\w.-]{0,40}(?:token|secret|key|password|passwd|passphrase|auth)[\w.-]{0,16})"
    r"[\"']?\s{0,4}[:=\s]\s{0,4}[\"']?([^\s\"',;}]{4,4096}))",
    re.I,
)
_PART = re.compile(r"\d{0,8}([A-Za-z]{0,20})\d{0,8}[A-Za-z]{0,3}")
_BETWEEN_PARTS = re.compile(r"[-_./:=,; ]+")
_HUMP = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[A-Z]")
_BETWEEN_NAMES = re.compile(r"[^a-z0-9]+")
# Further names that libraries give: to kernels, numbers, encodings and tensors.
_NAMES = ("python3", "float16", "float32", "float64", "bfloat16", "int16", "int32", "int64", "uint8", "utf8", "sha256",
          "base64", "ipython3", "cuda0", "attn", "proj", "self", "layers", "q", "k", "v", "o")  # fmt: skip
_NUMBER = re.compile(r"[-+\d.,:_/ ]+|[-+\d.]+[eE][-+]?\d+|0[xX][0-9a-fA-F]{1,16}")


def _find_secrets(named: Mapping[str, object], public: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the secrets among ``named`` (the environment, and parameters) and in this user's files, longest first.

    ``public`` are names of the workbook, such as the profile's, which are never secrets. A text with a NUL in it is a
    name and its value: the value is to be hidden beside this name only. The files are those of ``hf auth login``, git,
    netrc and the like; HOME, HF_HOME and so on among ``named`` say where they are.
    """
    known = {name.casefold() for name in public}
    secrets: set[str] = set()
    for name, value in named.items():
        secrets.update(_in_value(name, str(value), known))
    for text in _token_files(named):
        secrets.update(_in_file(text, known))
    # The longest first: a secret that holds another one must be hidden whole.
    return tuple(sorted(secrets, key=lambda secret: (-len(secret), secret)))


def _is_token(text: str) -> bool:
    """True if what has the form of a token is no row of words, such as ``sk-learn-and-its-neighbours``."""
    return not _is_worded(text)


def _looks_secret(value: str, sure: bool = True, public: Iterable[str] = ()) -> bool:
    """True if a value has the shape of a secret; ``sure`` if its name promises one."""
    if len(value) < (SHORTEST if sure else _SHORTEST_KEY) or value.casefold() in public:
        return False
    if _NUMBER.fullmatch(value) or _is_path(value):
        return False
    return not _is_worded(value) or (sure and not _is_of_workbook(value) and _is_worded_password(value))


def _is_worded_password(value: str) -> bool:
    """True for "hunter22" and "correct-horse-battery-staple"; "laptop" and "max-length" may be anything."""
    if value.isalpha():
        return len(value) >= _LONG_WORD
    letters = sum(character.isalpha() for character in value)
    return value.isalnum() or (len(value) >= _LONG_PHRASE and letters > len(value) / 2)


def _is_worded(text: str) -> bool:
    """True if a text is made of words and short numbers: ``falcon-180B``, ``q_proj.weight``, ``LlamaForCausalLM``."""
    for part in _BETWEEN_PARTS.split(text):
        match = _PART.fullmatch(part)
        # Letters in random case change it with every second one.
        if match is None or len(_HUMP.findall(match[1])) * 3 > max(len(match[1]), 3):
            return False
    return True


def _is_of_workbook(value: str) -> bool:
    """True if a value is made of names that the workbook's own notebooks and models use, such as ``float32``."""
    return all(part.isdigit() or part in _vocabulary() for part in _BETWEEN_PARTS.split(value.casefold()))


@functools.cache
def _vocabulary() -> frozenset[str]:
    words = set(_NAMES)
    for pattern in ("notebooks/source/*.py", "env/profiles/*.yaml", "env/models/configs/*.json"):
        for path in ROOT.glob(pattern):
            with suppress(OSError):
                words.update(_BETWEEN_NAMES.split(path.read_text(encoding="utf-8", errors="replace").casefold()))
    return frozenset(words)


def _is_path(text: str) -> bool:
    if not text.startswith(("/", "~", "./", "../")):
        return False
    if _is_worded(text.lstrip("~")):
        return True
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # longer than any path, or no home, or a NUL: it is none
        return False


def _in_value(name: str, text: str, public: Iterable[str]) -> Iterator[str]:
    """The secrets in one value: all of it, or the tokens, passwords and fields in it."""
    yield from _in_text(text)
    if not _SECRET_NAME.search(name):
        return
    if _looks_secret(text, bool(_SURE_NAME.search(name)), public):
        yield text
        yield from _long_lines(text)
    elif _SURE_NAME.search(name) and text and not _NUMBER.fullmatch(text) and not _is_path(text):
        yield f"{name}{_NAMED}{text}"
    yield from _in_fields(text, public)


def _in_text(text: str) -> Iterator[str]:
    """The tokens in a text, and the passwords of its addresses, as they stand and decoded."""
    for token in _TOKEN.finditer(text):
        if _is_token(token.group()):
            yield token.group()
    for address in _USER_INFO.finditer(text):
        user, _, password = address[1].partition(":")
        for part in {password, unquote(password)}:
            if _looks_secret(part):
                yield part
        if len(user) >= _LONG_PHRASE and _looks_secret(user, sure=False):
            yield user


def _long_lines(text: str) -> Iterator[str]:
    """The lines of a secret of several, such as a private key: a log is read line by line."""
    lines = text.split()
    for line in lines if len(lines) > 1 else ():
        if len(line) >= _LONG_PHRASE and _looks_secret(line):
            yield line


def _in_fields(text: str, public: Iterable[str]) -> Iterator[str]:
    """The secrets in a value that is a JSON object, as the credentials of a cloud are."""
    if not text.lstrip().startswith("{"):
        return
    with suppress(ValueError, RecursionError):
        for name, value in json.loads(text).items():
            if isinstance(value, str):
                yield from _in_value(name, value, public)


def _in_file(text: str, public: Iterable[str]) -> Iterator[str]:
    """The secrets in a file of tokens, whatever its format: one token, or names and values."""
    yield from _in_text(text)
    if len(text.split()) == 1 and _looks_secret(text.strip(), public=public):
        yield text.strip()
    for pair in _PAIR.finditer(text):
        if _looks_secret(pair[2], public=public):
            yield pair[2]


def _token_files(named: Mapping[str, object]) -> Iterator[str]:
    """The contents of the files in which programs keep this user's tokens."""
    home = Path(str(named["HOME"])) if named.get("HOME") else None
    for path in dict.fromkeys(_token_paths(named, home)):
        with suppress(OSError, ValueError), path.open(encoding="utf-8", errors="replace") as file:
            yield file.read(_MOST_BYTES)


def _token_paths(named: Mapping[str, object], home: Path | None) -> Iterator[Path]:
    for variable in ("HF_TOKEN_PATH", "NETRC", "AWS_SHARED_CREDENTIALS_FILE", "PIP_CONFIG_FILE"):
        if value := named.get(variable):
            yield Path(str(value))
    if hub := named.get("HF_HOME"):
        yield from (Path(str(hub), "token"), Path(str(hub), "stored_tokens"))
    if home is None:
        return
    cache = Path(str(named.get("XDG_CACHE_HOME") or home / ".cache"))
    config = Path(str(named.get("XDG_CONFIG_HOME") or home / ".config"))
    yield from (cache / "huggingface/token", cache / "huggingface/stored_tokens", home / ".huggingface/token")
    yield from (config / "git/credentials", config / "gh/hosts.yml", config / "pip/pip.conf", home / ".pip/pip.conf")
    for name in (".netrc", ".git-credentials", ".aws/credentials", ".docker/config.json", ".kaggle/kaggle.json"):
        yield home / name
    yield from (home / ".pypirc", home / ".npmrc", home / ".env")
