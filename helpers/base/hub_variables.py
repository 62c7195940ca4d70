"""What the environment tells huggingface_hub and tqdm, checked before they read it: there a mistake is a traceback."""

from __future__ import annotations

import os
import ssl
from importlib.util import find_spec
from urllib.parse import urlsplit

from helpers.base.errors import WorkbookError

_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_LONGEST_SECONDS = 86_400  # a day; the system's own clock overflows at much more
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_PUBLIC_HUB = "https://huggingface.co"


def check_hub_variables() -> None:
    """Refuse values that huggingface_hub and tqdm cannot even be imported with. Raises WorkbookError."""
    _check_bars()
    for name in _SECONDS:
        value = os.environ.get(name, "").strip()
        number = value.isascii() and value.isdecimal() and len(value) < 10
        if value and not (number and 0 < int(value) <= _LONGEST_SECONDS):
            raise WorkbookError(f"{name} is {value!r}. Set it to a whole number of seconds, such as 10, or unset it.")
    if _scheme("HF_ENDPOINT") is None:
        raise WorkbookError(
            f"HF_ENDPOINT is not an address: {_shown('HF_ENDPOINT')}. Set it to one such as {_PUBLIC_HUB}, or unset it."
        )


def check_connection_variables() -> None:
    """Refuse proxies and certificates that no download can use. Raises WorkbookError."""
    check_hub_variables()
    for name in (*_PROXIES, *(name.lower() for name in _PROXIES)):
        if os.environ.get(name):
            _check_proxy(name)
    _check_certificates()


def without_password(address: str) -> str:
    """An address without the user name and password that it may hold."""
    before, at, rest = address.strip().rpartition("@")
    scheme, slashes, _ = before.partition("://")
    start = f"{scheme}://" if at and slashes else ""
    return f"{start}{rest}".rstrip("/")


def _check_bars() -> None:
    """Refuse options of progress bars that tqdm cannot read, which it does when it is imported."""
    names = sorted(name for name in os.environ if name.startswith("TQDM_"))
    if names:
        try:
            import tqdm  # noqa: F401
        except (ValueError, TypeError) as error:
            raise WorkbookError(f"tqdm cannot read {' or '.join(names)} ({error}). Correct it, or unset it.") from error


def _check_proxy(name: str) -> None:
    scheme = _scheme(name, schemes=("http", "https", "socks5", "socks5h"))
    if scheme is None:
        raise WorkbookError(
            f"{name} is not the address of a proxy: {_shown(name)}. Set it to one such as http://proxy.example:3128, "
            "or unset it."
        )
    if scheme.startswith("socks5") and find_spec("socksio") is None:
        raise WorkbookError(
            f"{name} names a SOCKS proxy ({_shown(name)}), which needs the package socksio. Install it with: pip "
            f"install socksio, or unset {name}, or set it to an HTTP proxy."
        )


def _check_certificates() -> None:
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    unset = "Correct it, or unset it to use the certificates of this system."
    if folder and not os.access(folder, os.R_OK):
        raise WorkbookError(f"SSL_CERT_DIR names {folder}, which is missing or cannot be read. {unset}")
    if file:
        try:
            # Not the default context, which also opens a log of keys that the environment may name.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        except OSError as error:  # an SSLError is one
            reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise WorkbookError(
                f"SSL_CERT_FILE names {file}, which is not a readable file of certificates ({reason}). {unset}"
            ) from error


def _scheme(name: str, schemes: tuple[str, ...] = ("http", "https")) -> str | None:
    """The scheme of the address in a variable; None if it is no address. An empty one counts as unset."""
    value = os.environ.get(name, "").strip()
    if not value:
        return ""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts.scheme if valid and not any(map(str.isspace, value)) else None


def _shown(name: str) -> str:
    return without_password(os.environ.get(name, ""))
