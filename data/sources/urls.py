"""What a source URL may be, and where an HTTP one really leads."""

from __future__ import annotations

import base64
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
from typing import Any

from data.sources.capture import CaptureError, StreamConfig
from utils.errors import UserError, nearest

SCHEMES = ("http", "https", "rtsp", "rtsps")
PORTS = {"rtsp": 554, "rtsps": 322}
UNAUTHORIZED = 401  # cameras ask for digest authentication, which the video library knows
MAX_IMAGE_BYTES = 128 << 20  # of one image behind a URL
VIDEO_PAGES = ("youtube.com", "youtu.be")  # YOLOv5 looks for the video in them
PLAYLISTS = ("mpegurl", "dash+xml")  # in content types


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
    if host.removeprefix("www.") in VIDEO_PAGES:
        raise UserError(f"{public(url)}: a page, not a video: download the video, name its file")


def public(url: str) -> str:
    """The URL without user name and password, for messages and file names."""
    head, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return head + separator + authority.rpartition("@")[2] + slash + path


def ask(url: str, limits: StreamConfig) -> str | bytes:
    """Connect to `url` once: the URL to read, or the bytes if it is one image.

    Redirects are followed under the rules of `_Redirects`.  Raises CaptureError when the host does
    not answer within `limits.timeout`, when an image is not complete after `limits.give_up`, and
    when the host refuses or redirects to a forbidden address.
    """
    answers: queue.SimpleQueue[str | bytes | CaptureError] = queue.SimpleQueue()
    # in a thread, since every byte of a slow answer would restart the socket's timeout
    threading.Thread(target=lambda: answers.put(_try(url, limits)), daemon=True, name="URL").start()
    try:
        answer = answers.get(timeout=limits.give_up)
    except queue.Empty:
        raise CaptureError(f"not complete within {limits.give_up:g} s") from None
    if isinstance(answer, CaptureError):
        raise answer
    return answer


def _try(url: str, limits: StreamConfig) -> str | bytes | CaptureError:
    deadline = time.monotonic() + limits.give_up + 1  # then nobody waits for the result any more
    try:
        if urllib.parse.urlsplit(url).scheme.lower() in PORTS:
            return _describe(url, limits.timeout)
        return _get(url, limits.timeout, deadline)
    except CaptureError as error:
        return error
    except urllib.error.HTTPError as error:
        error.close()
        refused = CaptureError(f"HTTP {error.code} {error.reason}")
        return url if error.code == UNAUTHORIZED else refused
    except Exception as error:  # whatever a foreign server makes the libraries raise
        reason = getattr(error, "reason", error)
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return CaptureError("no answer in time" if isinstance(reason, TimeoutError) else cause)


def _describe(url: str, timeout: float) -> str:
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
            f"redirects to {target}, which RTSP may not; give that URL directly if you trust it"
        )
    return url


def _get(url: str, timeout: float, deadline: float) -> str | bytes:
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
            return _read_image(response, deadline)
    return url if final == public(url) else final


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
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request to follow, or CaptureError."""
        fp.close()
        parts = urllib.parse.urlsplit(newurl)
        if parts.scheme.lower() not in {"http", "https"}:
            raise CaptureError(f"redirects to {parts.scheme}://, which is refused")
        host = parts.hostname or ""
        if host != self.typed_host:
            for row in socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_STREAM):
                if not ipaddress.ip_address(str(row[4][0]).partition("%")[0]).is_global:
                    raise CaptureError(
                        f"redirects to {host}, an address of a private network, which is refused; "
                        "give that URL itself if it is meant"
                    )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
