"""What a source URL may be, and where an HTTP one really leads."""

from __future__ import annotations

import base64
import email.message
import http.client
import ipaddress
import socket
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO

from data.sources.capture import CaptureError
from utils.errors import UserError, nearest
from utils.images import MAX_BYTES

SCHEMES = ("http", "https", "rtsp", "rtsps")
PORTS = {"rtsp": 554, "rtsps": 322}
UNAUTHORIZED = 401  # cameras ask for digest authentication, which the video library knows


@dataclass(frozen=True)
class Answer:
    """What a URL turned out to be: where to read it, and the bytes if it is one picture."""

    url: str
    picture: bytes | None = None


def check_url(url: str) -> None:
    """Raise UserError unless `url` is an http(s) or rtsp(s) URL with a host."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises on nonsense
    except ValueError as error:
        raise UserError(f"{public(url)}: not a URL: {error}") from error
    if parts.scheme.lower() not in SCHEMES:
        hint = nearest(parts.scheme, SCHEMES)
        raise UserError(
            f"{public(url)}: {parts.scheme}:// is refused; sources are http(s):// or rtsp:// URLs"
            f" and plain paths{hint}"
        )
    if not host:
        raise UserError(f"{public(url)}: the URL names no host")


def public(url: str) -> str:
    """The URL without user name and password, for messages and file names."""
    head, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return head + separator + authority.rpartition("@")[2] + slash + path


def ask(url: str, *, timeout: float) -> Answer:
    """Connect to `url` once and follow its redirects under the rules of `_Redirects`.

    Raises CaptureError when the host does not answer within `timeout` seconds, refuses, or
    redirects to a forbidden place.
    """
    try:
        if urllib.parse.urlsplit(url).scheme.lower() in PORTS:
            return _knock(url, timeout)
        return _get(url, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == UNAUTHORIZED:
            return Answer(url)
        raise CaptureError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise CaptureError(_cause(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise CaptureError(_cause(error)) from error


def _cause(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _knock(url: str, timeout: float) -> Answer:
    parts = urllib.parse.urlsplit(url)
    port = parts.port or PORTS[parts.scheme.lower()]
    socket.create_connection((parts.hostname or "", port), timeout).close()
    return Answer(url)


def _get(url: str, timeout: float) -> Answer:
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(public(url), headers={"User-Agent": "FeatherDet"})
    if parts.username is not None:
        words = f"{parts.username}:{parts.password or ''}"
        token = base64.b64encode(urllib.parse.unquote(words).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    opener = urllib.request.build_opener(_Redirects(parts.hostname or ""))
    with opener.open(request, timeout=timeout) as response:
        final = response.geturl()
        if response.headers.get_content_maintype() == "image":
            data = response.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise CaptureError(f"more than {MAX_BYTES} bytes are not read")
            return Answer(final, data)
    return Answer(url if final == public(url) else final)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only, and into no private network but the typed host itself.

    Otherwise a public camera's owner could make this machine read its neighbours' or the cloud's
    internal pages.
    """

    max_redirections = 5

    def __init__(self, typed_host: str) -> None:
        self.typed_host = typed_host

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage | email.message.Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request to follow, or CaptureError."""
        parts = urllib.parse.urlsplit(newurl)
        if parts.scheme.lower() not in {"http", "https"}:
            raise CaptureError(f"redirects to {parts.scheme}://, which is refused")
        host = parts.hostname or ""
        if host != self.typed_host and _is_private(host, parts.port or 80):
            raise CaptureError(
                f"redirects to {host}, an address of a private network, which is refused; "
                "give that URL itself if it is meant"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]  # typeshed wants HTTPMessage


def _is_private(host: str, port: int) -> bool:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = (ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in found)
    return any(not address.is_global for address in addresses)
