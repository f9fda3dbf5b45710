"""Models of Hugging Face by name, from a server of ours that answers as its API does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tiny_models
from llama_semanticache import ModelFileError, hub

REPO = "someone/tiny-GGUF"
COMMIT = "a" * 40
FILES = ["README.md", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "mmproj-tiny-f16.gguf"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/repo", ("owner/repo", None)),
        ("owner/repo-GGUF:q8_0", ("owner/repo-GGUF", "q8_0")),
        ("owner/repo.v1:UD-Q4_K_XL", ("owner/repo.v1", "UD-Q4_K_XL")),
        ("hf.co/owner/repo:q8_0", ("owner/repo", "q8_0")),
        ("https://huggingface.co/owner/repo", ("owner/repo", None)),
        ("folder/model.gguf", None),
        ("a/b/c", None),
        ("smollm2-135m", None),
        ("/owner/repo", None),
        ("./nosuch", None),
        ("../model.bin", None),
        ("models/tiny.GGUF", None),
    ],
)
def test_names(name, expected):
    parsed = hub.parse(name)
    assert (parsed and (parsed.repo, parsed.quant)) == expected
    assert parsed is None or name.endswith(str(parsed))


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("m-Q4_K_M.gguf", "Q4_K_M"),
        ("M.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("m.q8_0.gguf", "Q8_0"),
        ("m-UD-Q6_K_XL.gguf", "UD-Q6_K_XL"),
        ("m-bf16-00001-of-00003.gguf", "BF16"),
        ("sub/m-f16.gguf", "F16"),
        ("m-mxfp4.gguf", "MXFP4"),
        ("model.gguf", ""),
    ],
)
def test_quantization_of_a_file(file, quant):
    assert hub.quant_of(file) == quant


def test_the_file_that_a_name_stands_for():
    def choose(name, files=FILES):
        return hub.choose(hub.parse(name), files)

    assert choose(REPO) == choose(f"{REPO}:q4_k_m") == "tiny-Q4_K_M.gguf"
    assert choose(f"{REPO}:Q8_0") == choose(f"{REPO}:tiny-Q8_0.gguf") == "tiny-Q8_0.gguf"
    assert choose(REPO, ["one.gguf", "x.txt"]) == "one.gguf"
    with pytest.raises(ModelFileError, match="QUANT with one of Q4_K_M, Q8_0; got someone/tiny-GGUF:Q5_0"):
        choose(f"{REPO}:Q5_0")
    with pytest.raises(ModelFileError, match="GGUF files, got one without"):
        choose(REPO, ["model.safetensors"])
    with pytest.raises(ModelFileError, match="2 parts.*llama-gguf-split"):
        choose(f"{REPO}:bf16", ["m-bf16-00001-of-00002.gguf", "m-bf16-00002-of-00002.gguf"])
    with pytest.raises(ModelFileError, match="there are 2 files"):
        choose(REPO, ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.write_tiny(tmp_path_factory.mktemp("hub") / "tiny.gguf", "llama", n_layer=4)


@pytest.fixture
def site(model):
    """Address of a server with one repository, and what it was asked for."""
    data, asked = model.read_bytes(), []
    etag = hashlib.sha256(data).hexdigest()

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{REPO}"):
                siblings = [{"rfilename": f, "type": "file", "path": f, "size": len(data), "oid": etag} for f in FILES]
                info = {"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": []}
                self.answer(json.dumps(siblings if "/tree/" in path else info).encode(), "application/json")
            elif path.startswith(f"/{REPO}/resolve/") and path.endswith(".gguf"):
                self.answer(data, "application/octet-stream")
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, body, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def program(tmp_path, site):
    """The command line, whose Hugging Face is that server."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": site[0],
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "LLAMA_SEMANTICACHE_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def run(*args, **more):
        command = [sys.executable, "-m", "llama_semanticache", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**environment, **more})
        return done

    return run


def test_a_model_by_name_is_fetched_once_listed_and_removed(program, site, model):
    settings = ("--n-ctx", "512", "--kv-profile", "none", "--threads", "1", "--max-tokens", "4")
    by_path = program("run", str(model), "hello", "--temp", "0", *settings)
    by_name = program("run", REPO, "hello", "--temp", "0", *settings)
    assert by_name.returncode == 0, by_name.stderr
    assert by_name.stdout == by_path.stdout
    n_asked = len(site[1])
    assert n_asked and program("run", f"{REPO}:q4_k_m", "hello", *settings).returncode == 0
    assert len(site[1]) == n_asked  # what is there needs no network
    listed = json.loads(program("models", "list", "--json").stdout)
    (entry,) = [e for e in listed if e["name"] == f"{REPO}:Q4_K_M"]
    assert Path(entry["path"]).read_bytes() == model.read_bytes() and entry["size_bytes"] == model.stat().st_size
    assert f"{REPO}:Q4_K_M: from Hugging Face" in program("models").stdout
    other = program("models", "pull", f"{REPO}:Q8_0")
    assert other.returncode == 0 and other.stdout.strip().endswith("tiny-Q8_0.gguf"), other.stderr
    removed = program("models", "rm", REPO)
    assert removed.returncode == 0 and "free again" in removed.stderr, removed.stderr
    names = [e["name"] for e in json.loads(program("models", "list", "--json").stdout)]
    assert f"{REPO}:Q4_K_M" not in names and f"{REPO}:Q8_0" in names
    assert f"expected a model that was fetched, got {REPO}:Q4_K_M" in program("models", "rm", f"{REPO}:Q4_K_M").stderr
    # of what is left it is the only file: used where nobody can be asked, and removed by the plain name
    offline = program("run", REPO, "hello", "--temp", "0", *settings, HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0 and offline.stdout == by_path.stdout, offline.stderr
    asked = program("models", "pull", REPO, HF_ENDPOINT="http://127.0.0.1:9")  # whether there is a newer one: not known
    assert asked.returncode == 1 and "check the name and the network" in asked.stderr
    assert program("models", "rm", REPO).returncode == 0 and REPO not in program("models").stdout


def test_what_cannot_be_fetched(program):
    for name, said in (
        (f"{REPO}:Q2_K", "QUANT with one of Q4_K_M, Q8_0"),
        ("someone/no-such", "check the name and the network"),
    ):
        done = program("run", name, "hello")
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = program("run", REPO, "hello", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and "check the name and the network" in done.stderr


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(hub.LibraryError, match=r"pip install 'llama-semanticache\[hub\]'"):
        hub.fetch(hub.parse(REPO))
    assert hub.fetched() == []


def test_the_shell_completes_models(tmp_path):
    environment = {**os.environ, "_LLAMA_SEMANTICACHE_COMPLETE": "bash_complete", "HF_HOME": str(tmp_path)}
    program = Path(sys.executable).with_name("llama-semanticache")
    done = subprocess.run(
        [program],
        env={**environment, "COMP_WORDS": "llama-semanticache run smol", "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["file,smol", "plain,smollm2-135m"]
