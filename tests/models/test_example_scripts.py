"""The scripts in examples/ run, and route."""

import json
import runpy
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "models" / "tiny_grounding")


def main_of(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


@pytest.fixture
def photos(tmp_path):
    for name in ("b", "a", "c"):
        Image.open(ROOT / "models" / "tiny_grounding" / "example.png").rotate(ord(name)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_one_image(photos, capsys):
    main_of("one_image")(TINY, str(photos / "a.png"), "box of the small red triangle")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("unrouted: 0.")
    assert lines[1].startswith("rerouted: 0.")
    assert "layers 2 to 3: text and 23.8% of the visual" in lines
    assert lines[-1].startswith("latest prompt: 144 visual of ")


def test_folder(photos, capsys, monkeypatch):
    script = main_of("folder")
    monkeypatch.setitem(script.__globals__, "BATCH", 2)
    script(TINY, str(photos), "box of the small red triangle")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["a.png", "b.png", "c.png"]
    assert all(len(line.split()) == 5 for line in lines)


def test_vllm_client(photos, capsys):
    """A server that answers as vLLM's does; tests/vllm/ asks a real one."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "on the left"}}]}).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        main_of("vllm_client")(url, "tiny", str(photos / "a.png"), "Where is the cup?")
    assert capsys.readouterr().out == "on the left\n"
    ((path, body),) = asked
    assert path == "/v1/chat/completions"
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert (body["model"], text["text"]) == ("tiny", "Where is the cup?")
