# SPDX-License-Identifier: Apache-2.0
"""The probe of a server against real ones on this machine; nothing of it outlives the call."""

import contextlib
import http.server
import os
import socket
import sys
import threading
import time

import pytest

from sources import reach


@contextlib.contextmanager
def silent_server():
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@contextlib.contextmanager
def answering_server(status, asked):
    """The URL of a server that answers with `status` and appends what it was asked for to `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/model"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, no time-out that a busy machine could reach, and no thread that is left."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(reach, "SECONDS", 60.0)
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.mark.parametrize("status", [200, 403, 404, 500])
def test_any_answer_will_do(status):
    asked = []
    with answering_server(status, asked) as url:
        assert reach.why_unreachable(url) == ""
    assert asked == ["/model"]


def test_an_answer_that_is_not_to_be_trusted_is_one():
    """A server without TLS on the port of one with it."""
    with answering_server(200, []) as url:
        assert reach.why_unreachable(url.replace("http:", "https:")) == ""


def test_the_proxy_of_the_environment_is_asked(monkeypatch):
    asked = []
    with answering_server(200, asked) as url:
        monkeypatch.setenv("http_proxy", url)
        assert reach.why_unreachable("http://nowhere.invalid/model") == ""
    assert asked == ["http://nowhere.invalid/model"]


def test_a_closed_port_is_told_at_once():
    with silent_server() as url:
        pass
    assert "Connection refused" in reach.why_unreachable(url)


def test_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr(reach, "SECONDS", 0.5)
    start = time.monotonic()
    with silent_server() as url:
        assert reach.why_unreachable(url) == "no answer within 0.5 s"
    assert time.monotonic() - start < 10


def test_a_look_up_that_hangs_is_ended(monkeypatch, tmp_path):
    """For it stands a process that does not heed the time."""
    pid = tmp_path / "pid"
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 100\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    monkeypatch.setattr(reach, "SECONDS", 1.0)
    start = time.monotonic()
    assert reach.why_unreachable("http://nowhere.invalid/") == "no answer within 1 s"
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
