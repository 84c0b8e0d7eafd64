"""Every kind of source, and every way in which one can be bad."""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data.sources.capture import OPTIONS, StreamConfig
from data.sources.frames import Frame, Sources
from data.sources.urls import check_url, public
from utils.errors import SourceLostError, UserError

QUICK = StreamConfig(timeout=1.0, give_up=2.0, first_delay=0.05, max_delay=0.2)


def picture(path: Path, value: int = 90, size: tuple[int, int] = (12, 16)) -> Path:
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def video(path: Path, frames: int = 20, *, code: str = "MJPG") -> Path:
    """Frame k, of 10 per second, is (10 k, 10 k, 5 k) in RGB: its colour is its number."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (64, 48))
    assert writer.isOpened()
    for k in range(frames):
        writer.write(np.full((48, 64, 3), (5 * k, 10 * k, 10 * k), np.uint8))  # OpenCV's order
    writer.release()
    return path


def big_png(side: int) -> bytes:
    """A PNG whose header asks for side x side pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(10_000))),
        (b"IEND", b""),
    )
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts += [struct.pack(">I", len(data)), kind, data]
        parts.append(struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


class Read:
    """All frames of a source, the lines it reported and its problems."""

    def __init__(self, source: object, **options: object) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.frames: list[Frame] = []
        self.sources = Sources(source, report=self.lines.append, **options)
        try:
            self.frames.extend(self.sources)
        except (UserError, SourceLostError) as error:
            self.error = error
        self.problems = self.sources.problems


def names(read: Read) -> list[str]:
    return [Path(frame.label).name for frame in read.frames]


# files


def test_one_image_by_a_name_that_looks_like_a_pattern(tmp_path):
    path = picture(tmp_path / "ein bild äß [1].png", 77)
    read = Read(str(path))
    (frame,) = read.frames
    assert (frame.kind, frame.path) == ("image", path)
    assert frame.item == frame.items == frame.number == 1
    assert (frame.image == np.full((12, 16, 3), 77)).all()
    assert not read.problems
    assert not read.lines


def test_directory_is_sorted_and_names_what_it_leaves_out(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.gif"):
        picture(tmp_path / name)
    for name in ("notes.md", "labels.txt", ".DS_Store"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "._b.jpg").write_text("attributes of a file, as macOS keeps them")
    (tmp_path / "sub").mkdir()
    video(tmp_path / "d.avi", 2)
    read = Read(tmp_path)
    assert names(read) == ["a.PNG", "b.jpg", "c.gif", "d.avi", "d.avi"]
    assert [frame.item for frame in read.frames] == [1, 2, 3, 4, 4]
    assert not read.problems
    (line,) = read.lines
    assert "3 files of other kinds are left out (.DS_Store, labels.txt, notes.md)" in line


def test_glob_list_and_several(tmp_path):
    (tmp_path / "in").mkdir()
    a, b = picture(tmp_path / "in" / "a.jpg"), picture(tmp_path / "in" / "b.png")
    assert names(Read(str(tmp_path / "in" / "*.jpg"))) == ["a.jpg"]
    assert names(Read(str(tmp_path / "**" / "*.*"))) == ["a.jpg", "b.png"]
    listed = tmp_path / "list.txt"
    listed.write_text(f"\ufeff{b}\r\n\r\n in/a.jpg \n", encoding="utf-8")
    assert names(Read(str(listed))) == ["b.png", "a.jpg"]
    streams = listed.rename(tmp_path / "list.streams")  # YOLOv5's name for a list of URLs
    assert names(Read(str(streams))) == ["b.png", "a.jpg"]
    streams.rename(listed)
    assert names(Read([str(listed), a])) == ["b.png", "a.jpg", "a.jpg"]


def test_bad_lines_of_a_list_are_named_with_their_number(tmp_path):
    good = picture(tmp_path / "a.jpg")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{good}\nmissing.jpg\nfile:///etc/passwd\nlist.txt\n", encoding="utf-8")
    read = Read(str(listed))
    assert len(read.frames) == 1
    assert read.error is None
    assert [problem.split(": ")[0] for problem in read.problems] == [
        f"{listed}:{n}" for n in (2, 3, 4)
    ]
    assert "no such file" in read.problems[0]
    assert "refused" in read.problems[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing.jpg", "no such file or folder"),
        (lambda d: d, "no images or videos in this folder"),
        (lambda d: (d / "x").mkdir() or d, r"1 folders are not searched: use '.*/\*\*'"),
        (lambda d: d / "*.jpg", "no images or videos match this pattern"),
        (lambda d: (d / "x.xyz").write_text("x") and d / "*.xyz", "no images or videos match"),
        (lambda d: (d / "x.xyz").write_text("x") and d / "x.xyz", "unknown file type"),
        (lambda d: (d / "x.txt").write_text("\n") and d / "x.txt", "the list is empty"),
        (lambda d: (d / "x.txt").write_bytes(b"\xff\xfe\x00") and d / "x.txt", "not UTF-8"),
        (lambda d: "file:///etc/passwd", "file:// is refused"),
        (lambda d: "ftp://host/a.mp4", "ftp:// is refused"),
        (lambda d: "concat://a|b", "concat:// is refused"),
        (lambda d: "htp://host/a.mp4", "did you mean 'http'"),
        (lambda d: "http:///a.mp4", "names no host"),
        (lambda d: "http://host:port/a.mp4", "not a URL"),
    ],
)
def test_a_single_bad_source_is_a_user_error(tmp_path, make, message):  # D5, S19
    with pytest.raises(UserError, match=message) as caught:
        Sources(str(make(tmp_path)))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no source"):
        Sources([])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".txt", "x" * 300 + "*", "d/" * 2500])
def test_a_name_too_long_is_named(tmp_path, name):
    good = picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"xxx|d/d"):
        Sources(name)
    (tmp_path / "list.txt").write_text(f"{name}\n{good}\n", encoding="utf-8")
    for read in (Read([name, str(good)]), Read(str(tmp_path / "list.txt"))):
        assert names(read) == ["a.jpg"]
        assert len(read.problems) == 1


def test_what_may_not_be_read_is_named_and_passed_over(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    for part in (folder.parent.parent, folder.parent, folder):
        part.chmod(0o755)
    modes = {"a.jpg": 0, "b.avi": 0, "list.txt": 0, "closed": 0, "locked": 0o444}
    for name in ("closed", "locked"):
        (folder / name).mkdir()
        picture(folder / name / "a.jpg")
    good = picture(folder / "good.png")
    picture(folder / "a.jpg")
    video(folder / "b.avi", 2)
    (folder / "list.txt").write_text("a.jpg\n", encoding="utf-8")
    for name, mode in modes.items():
        (folder / name).chmod(mode)  # of locked the names can be read, nothing behind them
    values = [str(folder / name) for name in (*modes, "closed/a.jpg", "closed/*.jpg")]
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # without root's right to read everything
        read = Read([*values, str(good)])
    finally:
        os.seteuid(user)
        for name in modes:
            (folder / name).chmod(0o755)
    assert names(read) == ["good.png"]
    assert sorted(p.rpartition(": ")[0] for p in read.problems) == sorted(values)


# bad images


def test_bad_images_are_named_with_their_cause_and_passed_over(tmp_path):  # D1 D2 S15 S16 I6 I8
    data = picture(tmp_path / "a.jpg", size=(200, 300)).read_bytes()
    Image.new("L", (9, 9)).save(tmp_path / "y.gif")
    half = data[: len(data) // 2]
    bad = {
        "b.jpg": (b"", "empty file"),
        "c.jpg": (half, "JPEG data is truncated"),
        "d.jpg": ((tmp_path / "y.gif").read_bytes(), "GIF data under another name"),
        "e.png": (big_png(14_000), "14000x14000 pixels"),
        "f.png": (big_png(33_500), "33500x33500 pixels"),
        "g.jpg": ("nowhere.jpg", "dangling or looping symbolic link"),
        "h.jpg": ("h.jpg", "dangling or looping symbolic link"),
        "i.jpg": (b"hello", "not an image"),
        "k.jpg": (half + b"\xff\xd9", "Corrupt JPEG data: premature end of data segment"),
    }
    for name, (content, _) in bad.items():
        if isinstance(content, str):
            (tmp_path / name).symlink_to(tmp_path / content)
        else:
            (tmp_path / name).write_bytes(content)
    start = time.process_time()
    read = Read(tmp_path)
    assert time.process_time() - start < 1
    assert names(read) == ["a.jpg", "y.gif"]
    assert read.error is None
    for problem, (name, (_, cause)) in zip(read.problems, bad.items(), strict=True):
        assert problem.startswith(f"{tmp_path / name}: {cause}")
    assert read.lines == [f"skipped: {problem}" for problem in read.problems]
    alone = Read(tmp_path / "b.jpg")  # D3
    assert isinstance(alone.error, UserError)
    assert str(alone.error) == "nothing could be read: 1 of 1 failed"


# videos


@pytest.mark.parametrize(
    ("name", "code"), [("a.avi", "MJPG"), ("a.mp4", "mp4v"), ("a.mkv", "mp4v")]
)
def test_video_gives_all_frames_in_order(tmp_path, name, code):
    read = Read(video(tmp_path / name, 20, code=code))
    assert [frame.number for frame in read.frames] == list(range(1, 21))
    assert all((frame.kind, frame.frames, frame.fps) == ("video", 20, 10) for frame in read.frames)
    colours = [frame.image.reshape(-1, 3).mean(0) for frame in read.frames]
    assert np.allclose(colours, np.outer(np.arange(20), (10, 10, 5)), atol=4)
    assert not read.problems


def test_stride_takes_every_nth_frame(tmp_path):
    read = Read(video(tmp_path / "a.avi", 20), stride=6)
    assert [frame.number for frame in read.frames] == [1, 7, 13, 19]
    assert [round(frame.image[..., 0].mean() / 10) for frame in read.frames] == [0, 6, 12, 18]
    assert not read.problems
    with pytest.raises(ValueError, match="stride"):
        Sources(tmp_path / "a.avi", stride=0)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: data[: len(data) // 2], "no readable video"),
        (lambda data: b"not a video", "no readable video"),
        (lambda data: data, "64x48 pixels; more than 3008 are not decoded"),
    ],
)
def test_unreadable_video_among_good_sources(tmp_path, monkeypatch, damage, cause):  # D6 D7
    monkeypatch.setattr("data.sources.capture.MAX_PIXELS", 64 * 47)
    path = video(tmp_path / "a.mp4", 20, code="mp4v")
    path.write_bytes(damage(path.read_bytes()))
    picture(tmp_path / "b.jpg")
    read = Read(tmp_path)
    assert names(read) == ["b.jpg"]
    (problem,) = read.problems
    assert f"a.mp4: {cause}" in problem


def test_video_without_frames(tmp_path):  # D6
    read = Read(video(tmp_path / "a.avi", 0))
    assert isinstance(read.error, UserError)
    assert len(read.problems) == 1


def test_broken_middle_says_how_many_frames_were_read(tmp_path):  # D8
    path = video(tmp_path / "a.avi", 20)
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    path.write_bytes(data)
    read = Read(path)
    assert 0 < len(read.frames) < 19
    assert read.error is None
    assert read.problems == [f"{path}: read {len(read.frames)} of 20 frames"]
    assert read.lines == [f"incomplete: {read.problems[0]}"]


def playlist(url: str) -> str:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:5", "#EXTINF:5,", url, "#EXT-X-ENDLIST", ""]
    return "\n".join(lines)


def test_a_playlist_named_mp4_reaches_nothing_else(tmp_path):
    secret = video(tmp_path / "secret.avi", 5)
    with Server({"/secret.ts": response(secret.read_bytes())}) as server:
        for text in (playlist(server.url("/secret.ts")), "ffconcat version 1.0\nfile secret.avi\n"):
            (tmp_path / "a.mp4").write_text(text, encoding="utf-8")
            read = Read(tmp_path / "a.mp4")
            assert isinstance(read.error, UserError)
            assert not read.frames
        assert server.asked == []


def test_the_environment_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv(OPTIONS, "threads;1")
    Read(video(tmp_path / "a.avi", 1))
    assert os.environ[OPTIONS] == "threads;1"
    monkeypatch.delenv(OPTIONS)
    Read(tmp_path / "a.avi")
    assert OPTIONS not in os.environ


# streams


def response(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.0 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body


class Server(socketserver.ThreadingTCPServer):
    """A local camera: bytes or functions that answer for a path, MJPEG at /live, else 404."""

    daemon_threads = True

    def __init__(self, answers: dict[str, bytes | Callable[[socket.socket], None]] | None = None):
        self.answers = answers or {}
        self.asked: list[str] = []
        self.requests: list[bytes] = []
        self.down = threading.Event()  # while set, live connections end and new ones get 503
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.server_address[1]}{path}"

    def finish_request(self, connection: socket.socket, address: object) -> None:
        with suppress(OSError):  # the reader may have gone
            self.requests.append(connection.recv(4096))
            path = "/" + self.requests[-1].split()[1].decode().rpartition("/")[2]
            self.asked.append(path)
            answer = self.answers.get(
                path, self.live if path == "/live" else response(status="404 Not Found")
            )
            if isinstance(answer, bytes):
                connection.sendall(answer)
            else:
                answer(connection)

    def live(self, connection: socket.socket) -> None:
        if self.down.is_set():
            connection.sendall(response(status="503 Service Unavailable"))
        else:
            connection.sendall(response(Content_Type="multipart/x-mixed-replace; boundary=frame"))
        jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 200, np.uint8))[1].tobytes()
        head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
        while not self.down.is_set():
            connection.sendall(head + jpeg + b"\r\n")
            time.sleep(0.02)

    def __exit__(self, *exception: object) -> None:
        self.down.set()
        self.shutdown()
        self.server_close()


def test_stream_drops_comes_back_then_is_lost_for_good():  # D10
    lines: list[str] = []
    numbers: list[int] = []
    with Server() as server:
        sources = Sources(server.url("/live"), stride=2, stream=QUICK, report=lines.append)
        with pytest.raises(SourceLostError, match=r"lost for 2 s, given up: HTTP 503"):  # noqa: PT012
            for frame in sources:
                assert np.allclose(frame.image, 200, atol=3), "a frame that nobody sent"
                assert (frame.kind, frame.frames) == ("stream", None)
                numbers.append(frame.number)
                if len(numbers) == 5:  # gone for a moment
                    server.down.set()
                    threading.Timer(0.4, server.down.clear).start()
                if len(numbers) == 10:  # gone for good
                    server.down.set()
        assert server.asked.count("/live") < 60, "no back-off"
    assert len(numbers) >= 10
    assert numbers == sorted(set(numbers))
    assert all(number % 2 for number in numbers)  # every other one
    lost, back, *_, last = [line.removeprefix(f"{server.url('/live')}: ") for line in lines]
    assert (lost, back) == ("connection lost; retrying for 2 s", "reconnected")
    assert last == f"lost: {sources.problems[-1]}"


def test_two_streams_run_side_by_side_and_end_separately():
    seen: list[int] = []
    with Server() as first, Server() as second:
        urls = [first.url("/live"), second.url("/live")]
        sources = Sources(urls, stream=QUICK, report=lambda line: None)
        with pytest.raises(SourceLostError) as caught:  # noqa: PT012
            for frame in sources:
                seen.append(frame.item)
                if len(seen) == 6:
                    first.down.set()
                if sources.problems:
                    second.down.set()
    assert set(seen[:6]) == {1, 2}
    assert seen[-1] == 2, "the second went on after the loss of the first"
    assert str(caught.value).count("lost for") == 2


def test_leaving_the_loop_ends_the_reader_threads():
    with Server() as server:
        for _ in Sources(server.url("/live"), stream=QUICK):
            break
        assert not [t for t in threading.enumerate() if t.name == "stream reader"]


def test_dead_urls_say_which_and_why_in_time(tmp_path):  # D9
    with Server() as closed:
        pass
    refusal = {"/login": response(status="401 Unauthorized")}  # FFmpeg knows other ways to log in
    with Server(refusal) as server, socket.create_server(("127.0.0.1", 0)) as mute:
        never = f"127.0.0.1:{mute.getsockname()[1]}/live"
        causes = {
            closed.url("/live"): "Connection refused",
            closed.url("/live", "rtsp"): "Connection refused",
            server.url("/nothing"): "HTTP 404 Not Found",
            server.url("/login"): "sent no readable video within 1 s",
            f"http://{never}": "no answer in time",
            f"rtsp://{never}": "no answer in time",
        }
        listed = tmp_path / "streams.txt"
        listed.write_text("\n".join([*causes, str(picture(tmp_path / "a.jpg"))]), encoding="utf-8")
        start = time.monotonic()
        read = Read(str(listed), stream=QUICK)
    assert time.monotonic() - start < 10
    assert names(read) == ["a.jpg"]
    assert read.problems == [f"{url}: {cause}" for url, cause in causes.items()]


def test_a_picture_and_a_finite_video_behind_a_url(tmp_path):
    png = picture(tmp_path / "a.png", 33).read_bytes()
    mp4 = video(tmp_path / "a.mp4", 7, code="mp4v").read_bytes()
    files = {
        "/a.png": response(png, Content_Type="image/png"),
        "/a.mp4": response(mp4, Content_Type="video/mp4", Content_Length=str(len(mp4))),
    }
    with Server(files) as server:
        read = Read([server.url("/a.png"), server.url("/a.mp4")], stream=QUICK)
    assert [frame.kind for frame in read.frames] == ["image"] + ["video"] * 7
    assert (read.frames[0].image == 33).all()
    assert read.frames[0].path is None
    assert not read.problems


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("/live", True),
        ("http://169.254.169.254/latest/meta-data", False),
        ("http://192.168.1.1/", False),
        ("http://127.0.0.2:1/", False),
        ("http://[::1]:1/", False),
        ("file:///etc/passwd", False),
        ("ftp://127.0.0.1:1/x", False),
    ],
)
def test_redirects_lead_into_no_other_private_network(target, allowed):  # S19
    with Server({"/cam": response(status="302 Found", Location=target)}) as server:
        if allowed:
            frame = next(iter(Sources(server.url("/cam"), stream=QUICK)))
            assert np.allclose(frame.image, 200, atol=3)
        else:
            read = Read(server.url("/cam"), stream=QUICK)
            assert isinstance(read.error, UserError)
            assert "which is refused" in read.problems[0] or "not allowed" in read.problems[0]
            assert server.asked == ["/cam"]


@pytest.mark.parametrize(
    ("path", "kind", "cause"),
    [
        ("/list.m3u8", "video/mp4", "no readable video"),
        ("/live", "video/mp4", "no readable video"),
        ("/live", "application/x-mpegURL", "is a playlist"),
    ],
)
def test_a_playlist_behind_a_url_reaches_no_other_host(path, kind, cause):
    with Server() as other:
        text = playlist(other.url("/secret.ts")).encode()
        with Server({path: response(text, Content_Type=kind)}) as server:
            read = Read(server.url(path), stream=QUICK)
        assert cause in read.problems[0]
        assert other.asked == []


def test_rtsp_redirects_are_refused():
    with Server() as other:
        target = other.url("/x", "rtsp")
        moved = f"RTSP/1.0 302 Moved\r\nCSeq: 1\r\nLocation: {target}\r\n\r\n".encode()
        with Server({"/cam": moved}) as server:
            read = Read(server.url("/cam", "rtsp"), stream=QUICK)
        assert isinstance(read.error, UserError)
        assert "redirects to 127.0.0.1" in read.problems[0]
        assert other.asked == []


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\nX: ", response(Content_Type="image/jpeg")])
def test_an_image_that_drips_ends_in_time(head):
    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.1)

    start = time.monotonic()
    with Server({"/a.jpg": drip}) as server:
        read = Read(server.url("/a.jpg"), stream=QUICK)
    assert time.monotonic() - start < 4
    assert "not complete within 2 s" in read.problems[0]


@pytest.mark.parametrize("length", [{}, {"Content_Length": "1000000000"}])
def test_a_flood_is_refused_early(length, monkeypatch):
    monkeypatch.setattr("data.sources.urls.MAX_IMAGE_BYTES", 1 << 20)
    sent = [0]

    def flood(connection: socket.socket) -> None:
        connection.sendall(response(Content_Type="image/jpeg", **length))
        while sent[0] < 50 << 20:
            sent[0] += connection.send(bytes(1 << 16))

    with Server({"/a.jpg": flood}) as server:
        read = Read(server.url("/a.jpg"), stream=QUICK)
    assert "more than 1048576 bytes" in read.problems[0]
    assert sent[0] < 20 << 20


def test_credentials_are_sent_but_never_shown():
    url = "rtsp://user:pa%40ss@cam.local:554/a@b"
    assert public(url) == "rtsp://cam.local:554/a@b"
    with pytest.raises(UserError) as caught:
        check_url("ftp://user:secret@host/x")
    assert "secret" not in str(caught.value)
    with Server() as server:
        read = Read(server.url("/none").replace("//", "//user:secret@"), stream=QUICK)
    assert b"Authorization: Basic dXNlcjpzZWNyZXQ=" in server.requests[0]
    assert read.problems == [f"{server.url('/none')}: HTTP 404 Not Found"]
    assert "secret" not in "".join(read.lines)


def test_missing_webcam_is_named():
    read = Read("97")
    assert read.problems == ["webcam 97: no such camera, or it is in use"]
    assert isinstance(read.error, UserError)


@pytest.mark.parametrize("field", ["timeout", "give_up", "first_delay", "max_delay"])
@pytest.mark.parametrize("value", [0, float("inf"), float("nan")])
def test_stream_times_must_be_positive(field, value):
    with pytest.raises(ValueError, match=field):
        StreamConfig(**{field: value})
