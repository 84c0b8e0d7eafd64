"""What a source URL may be, and where an HTTP one really leads."""

from __future__ import annotations

import base64
import email.message
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO

from data.sources.capture import CaptureError
from utils.errors import UserError, nearest

SCHEMES = ("http", "https", "rtsp", "rtsps")
PORTS = {"rtsp": 554, "rtsps": 322}
UNAUTHORIZED = 401  # cameras ask for digest authentication, which the video library knows
MAX_IMAGE_BYTES = 128 << 20  # of one image behind a URL
PLAYLISTS = ("mpegurl", "dash+xml")  # in content types


@dataclass(frozen=True)
class Answer:
    """What a URL turned out to be: where to read it, and the bytes if it is one image."""

    url: str
    image: bytes | None = None


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


def ask(url: str, *, timeout: float, total: float) -> Answer:
    """Connect to `url` once and follow its redirects under the rules of `_Redirects`.

    Raises CaptureError when the host does not answer within `timeout` seconds, when an image is not
    complete after `total` seconds, and when the host refuses or redirects to a forbidden address.
    """
    answers: queue.SimpleQueue[Answer | CaptureError] = queue.SimpleQueue()
    deadline = time.monotonic() + total + 1  # the thread ends after its result has lost its use
    # in a thread, since every byte of a slow answer would restart the socket's timeout
    work = threading.Thread(
        target=lambda: answers.put(_try(url, timeout, deadline)), daemon=True, name="URL"
    )
    work.start()
    try:
        answer = answers.get(timeout=total)
    except queue.Empty:
        raise CaptureError(f"not complete within {total:g} s") from None
    if isinstance(answer, CaptureError):
        raise answer
    return answer


def _try(url: str, timeout: float, deadline: float) -> Answer | CaptureError:
    try:
        if urllib.parse.urlsplit(url).scheme.lower() in PORTS:
            return _describe(url, timeout)
        return _get(url, timeout, deadline)
    except CaptureError as error:
        return error
    except urllib.error.HTTPError as error:
        error.close()
        refused = CaptureError(f"HTTP {error.code} {error.reason}")
        return Answer(url) if error.code == UNAUTHORIZED else refused
    except Exception as error:  # whatever a foreign server makes the libraries raise
        return CaptureError(_cause(getattr(error, "reason", error)))


def _cause(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _describe(url: str, timeout: float) -> Answer:
    """Ask an RTSP server for the stream: FFmpeg would follow a redirect to any host."""
    parts = urllib.parse.urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    connection = socket.create_connection((host, parts.port or PORTS[scheme]), timeout)
    if scheme == "rtsps":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # cameras sign their certificates themselves
        connection = context.wrap_socket(connection, server_hostname=host)
    request = f"DESCRIBE {public(url)} RTSP/1.0\r\nCSeq: 1\r\nAccept: application/sdp\r\n\r\n"
    with connection, connection.makefile("rb") as reply:
        connection.sendall(request.encode())
        status = reply.readline(1000).split()
        headers = http.client.parse_headers(reply)
    if status[1:2] and status[1].startswith(b"3"):
        target = urllib.parse.urlsplit(headers.get("Location", "")).hostname or "another address"
        raise CaptureError(
            f"redirects to {target}, which RTSP may not; give that URL itself if it is meant"
        )
    return Answer(url)


def _get(url: str, timeout: float, deadline: float) -> Answer:
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(public(url), headers={"User-Agent": "FeatherDet"})
    if parts.username is not None:
        words = f"{parts.username}:{parts.password or ''}"
        token = base64.b64encode(urllib.parse.unquote(words).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    opener = urllib.request.build_opener(_Redirects(parts.hostname or ""))
    with opener.open(request, timeout=timeout) as response:
        final = response.geturl()
        if any(kind in response.headers.get_content_type() for kind in PLAYLISTS):
            raise CaptureError("is a playlist, which may name any host; give the stream's own URL")
        if response.headers.get_content_maintype() == "image":
            return Answer(final, _read_image(response, deadline))
    return Answer(url if final == public(url) else final)


def _read_image(response: http.client.HTTPResponse, deadline: float) -> bytes:
    data = bytearray()
    size = int(response.headers.get("Content-Length") or 0)
    while max(len(data), size) <= MAX_IMAGE_BYTES:
        if time.monotonic() > deadline:
            raise TimeoutError
        part = response.read1(1 << 16)
        if not part:
            return bytes(data)
        data += part
    raise CaptureError(f"more than {MAX_IMAGE_BYTES} bytes are not read")


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
        fp.close()
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
