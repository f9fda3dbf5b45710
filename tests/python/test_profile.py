"""Calibration: the file, its use, and that it is what the numpy reference computes."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import tiny_models
from conftest import SMALL
from llama_semanticache import ArgumentError, Llama, ProfileError, _native, models, profile
from llama_semanticache.model_file import ModelFile

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "llama_semanticache"

# As in test_reference.py: the folder is appended because its profile.py must not hide the standard one.
if str(PACKAGE) not in sys.path:
    sys.path.append(str(PACKAGE))

import reference as ref  # noqa: E402

LETTERS = "the quick brown fox jumps over a lazy dog; while, slowly, night falls. "
TEXTS = [LETTERS * 14, LETTERS.upper() * 7 + LETTERS[::-1] * 6]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(models.CACHE_VARIABLE, str(folder))
    return folder


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_calibration_writes_a_profile_that_is_used(arch, tiny, cache, load):
    path = profile.calibrate(tiny(arch), texts=TEXTS, n_ctx=1024, progress=False, n_threads=1)
    id = profile.model_id(tiny(arch))
    assert path == profile.profile_path(id) and cache in path.parents
    got = ref.read_profile(path)
    heads = tuple((il, head) for il in {"llama": (0, 1), "gemma3": (5,)}[arch] for head in (0, 1))
    assert (got.model_id, got.n_text, got.parts, got.heads) == (id, len(TEXTS), ref.PARTS, heads)
    assert (got.errors > 0).all() and (got.errors[:, -1] < got.errors[:, 0]).all()

    for ratio in (0.25, 0.4):
        llm = load(tiny(arch), **{**SMALL, "kv_profile": path, "kv_ratio": ratio})
        expected = ref.budgets(got, ratio, 1024, 4)
        assert [rows for *_, rows, _ in llm.kv_rows()] == expected.tolist()


def test_calibration_on_more_than_a_pass_could_make_room_for(cache, tmp_path):
    model = tiny_models.write_tiny(tmp_path / "long.gguf", "llama", n_ctx_train=8192)
    path = profile.calibrate(model, texts=[TEXTS[0] * 10], n_ctx=7680, progress=False, n_threads=2)
    got = ref.read_profile(path)
    assert got.n_text == 1 and (got.errors[:, -1] < got.errors[:, 0]).all()


def test_calibration_is_kept(tiny, cache, tmp_path):
    path = profile.calibrate(tiny("llama"), texts=TEXTS, n_ctx=1024, progress=False, n_threads=1)
    first = path.read_bytes()
    path.write_bytes(first + b"\n")
    assert profile.calibrate(tiny("llama"), texts=TEXTS, n_ctx=1024, progress=False) == path
    assert path.read_bytes() == first + b"\n"  # not touched
    profile.calibrate(tiny("llama"), texts=TEXTS, n_ctx=1024, progress=False, n_threads=2, force=True)
    assert path.read_bytes() == first  # the same again, with another number of threads
    out = tmp_path / "deep" / "other.profile"
    assert profile.calibrate(tiny("llama"), texts=TEXTS[:1], n_ctx=1024, progress=False, n_threads=1, out=out) == out
    assert ref.read_profile(out).n_text == 1


def test_a_second_process_waits_for_the_first(tiny, cache, capfd):
    """And takes what the first has written: not bytes of its own."""
    model = ModelFile.of(tiny("llama"))
    path = profile.profile_path(model.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = threading.Thread(target=lambda: results.append(profile.calibrate(model, texts=TEXTS, n_ctx=1024)))
    results = []
    with FileLock(path.with_suffix(".lock")):
        waiting.start()
        while "waiting for another process" not in capfd.readouterr().err:
            time.sleep(0.01)
        path.write_bytes(profile.HEADER + b"of the first")
    waiting.join()
    assert results == [path] and path.read_bytes() == profile.HEADER + b"of the first"


def test_what_came_with_the_package_is_not_measured_again(tiny, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "SHIPPED", tmp_path)
    monkeypatch.setattr(profile, "_measure", None)  # calling it would fail
    shipped = tmp_path / f"{profile.model_id(tiny('llama'))}.profile"
    shipped.write_bytes(profile.HEADER)
    assert profile.calibrate(tiny("llama"), progress=False) == shipped


def test_auto_calibrates_once(tiny, cache, load, monkeypatch, capfd):
    calls = []
    calibrate = profile.calibrate
    monkeypatch.setattr(profile, "read_texts", lambda paths=None: TEXTS)
    monkeypatch.setattr(profile, "N_TEXT_TOKENS", 1024)
    monkeypatch.setattr(
        profile, "calibrate", lambda *args, **kwargs: calls.append(args) or calibrate(*args, n_ctx=1024, **kwargs)
    )
    options = {**SMALL, "kv_profile": "auto"}
    path = tiny_models.write_tiny(cache.parent / "model.gguf", "llama", seed=3, n_layer=4)
    one = load(path, **options, verbose=True)
    said = capfd.readouterr().err
    assert said.count("first use of model.gguf") == 1 and str(profile.profile_path(profile.model_id(path))) in said
    two = load(path, **options, verbose=True)
    assert "first use" not in capfd.readouterr().err
    assert len(calls) == 1
    assert one.kv_rows() == two.kv_rows()
    equal = load(path, **SMALL)
    assert one.kv_rows() != equal.kv_rows()
    assert one.kv_stats().rows_allocated == equal.kv_stats().rows_allocated


@pytest.mark.filterwarnings("ignore:.*no use without kv_compress")
def test_auto_needs_no_profile_where_none_is_used(tmp_path, cache, load, monkeypatch):
    monkeypatch.setattr(profile, "calibrate", None)  # calling it would fail
    path = tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=4)
    for options in (dict(kv_ratio=1), dict(kv_compress="paper"), dict(kv_compress="streaming"), dict(kv_compress=None)):
        load(path, **{**SMALL, "kv_profile": "auto", **options})
    with pytest.raises(TypeError):
        load(path, **{**SMALL, "kv_profile": "auto"})
    few = tiny_models.write_tiny(tmp_path / "few.gguf", "llama", n_layer=3)
    assert load(few, **{**SMALL, "kv_profile": "auto"}).kv_rows() == load(few, **SMALL).kv_rows()
    assert not cache.exists()


def test_a_profile_of_another_model(tiny, cache, load):
    path = profile.calibrate(tiny("llama"), texts=TEXTS, n_ctx=1024, progress=False, n_threads=1)
    with pytest.raises(ProfileError, match="expected model .* got .*; calibrate"):
        load(tiny("qwen3"), **{**SMALL, "kv_profile": path})


def test_no_text_or_too_short_a_text(tiny, cache):
    with pytest.raises(ArgumentError, match="at least one"):
        profile.read_texts([])
    with pytest.raises(Exception, match="expected one text of more than .* got") as error:
        profile.calibrate(tiny("llama"), texts=["Hi."], n_ctx=1024, progress=False, n_threads=1)
    assert type(error.value).__module__ == "llama_semanticache.errors"
    assert not profile.profile_path(profile.model_id(tiny("llama"))).exists()


def test_a_model_of_too_short_a_context(tmp_path, cache):
    path = tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=4, n_ctx_train=512)
    with pytest.raises(
        ProfileError, match="of at least 1024 tokens to measure its heads on, got one of 512; pass kv_profile=None"
    ):
        Llama(str(path), n_ctx=1024, kv_compress="semanticache", verbose=False)


def test_model_id(tiny, tmp_path):
    path = Path(tiny("llama"))
    id = profile.model_id(path)
    assert len(id) == 64 and id == profile.model_id(str(path))
    copy = tmp_path / "copy.gguf"
    data = bytearray(path.read_bytes())
    copy.write_bytes(data)
    assert profile.model_id(copy) == id  # not of the name
    data[-1] ^= 1
    copy.write_bytes(data)
    assert profile.model_id(copy) != id


def test_a_text_that_was_refused_leaves_nothing_behind(tiny, cache, load, tmp_path):
    ffi, lib = _native.load()
    options = dict(
        kv_compress="semanticache", kv_ratio=1.0, kv_stage=1024, kv_profile=None, kv_params={"calibrate": 1}, n_ctx=1024
    )
    llm = load(tiny("llama"), **options, flash_attn=True, n_threads=1)

    def read(text):
        llm.reset()
        tokens = llm.tokenize(text.encode(), special=False)[:1024]
        for i in range(0, len(tokens), 256):
            llm.eval(tokens[i : i + 256])

    read(LETTERS.upper())
    with pytest.raises(Exception, match="expected one text of more than"):
        _native.check(lib.semcache_calibrate_add(_native.context(llm)))
    read(TEXTS[0])
    for _ in range(2):  # and the same text counts again as it did
        _native.check(lib.semcache_calibrate_add(_native.context(llm)))
    _native.check(lib.semcache_calibrate_write(_native.context(llm), str(tmp_path / "a.profile").encode(), b"x"))
    alone = ref.read_profile(profile.calibrate(tiny("llama"), texts=TEXTS[:1], n_ctx=1024, progress=False, n_threads=1))
    got = ref.read_profile(tmp_path / "a.profile")
    assert got.n_text == 2
    np.testing.assert_array_equal(got.errors, alone.errors)


def test_a_profile_of_an_older_format_is_measured_again(tiny, cache):
    path = profile.profile_path(profile.model_id(tiny("llama")))
    path.parent.mkdir(parents=True)
    path.write_text("semcache-profile 1\n")
    assert profile.find(tiny("llama")) is None
    assert profile.calibrate(tiny("llama"), texts=TEXTS[:1], n_ctx=1024, progress=False, n_threads=1) == path
    assert profile.find(tiny("llama")) == path and ref.read_profile(path).n_text == 1


def test_errors_are_those_of_the_reference(tmp_path, load, cache):
    """One layer, so that its queries, keys, values and output can be computed here; then the reference's passes."""
    n_sink, n_window, n_probe = 4, 256, 256
    path = tiny_models.write_tiny(tmp_path / "one.gguf", "llama", n_layer=1)
    out = profile.calibrate(path, texts=TEXTS[:1], n_ctx=1024, progress=False, n_threads=1)
    got = ref.read_profile(out)

    from gguf import GGUFReader

    weights = {t.name: np.array(t.data, dtype=np.float64) for t in GGUFReader(path).tensors}
    llm = load(path, n_ctx=1024)
    n_head, n_head_kv, d = 4, 2, 16
    gqa = n_head // n_head_kv
    inv_freq = 1e4 ** (-2 * np.arange(d // 2) / d)
    tokens = llm.tokenize(TEXTS[0].encode(), special=False)[:1024]
    n = len(tokens)

    def norm(y, name):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * weights[f"blk.0.{name}.weight"]

    def matrix(y, name):
        return y @ weights[f"blk.0.{name}.weight"].T

    def rope(y, heads):
        y = y.reshape(n, heads, d // 2, 2)
        angle = np.arange(n)[:, None] * inv_freq
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = y[..., 0], y[..., 1]
        return np.stack([a * c - b * s, a * s + b * c], -1).reshape(n, heads, d)

    def f16(y):
        return y.astype(np.float16).astype(np.float64)

    x = weights["token_embd.weight"][tokens]
    q, k, v = (matrix(norm(x, "attn_norm"), f"attn_{part}") for part in "qkv")
    q, k, v = rope(q, n_head), f16(rope(k, n_head_kv)), f16(v.reshape(n, n_head_kv, d))

    # the size of the residual stream: a last layer's output is evaluated for the last token of every batch
    causal = np.where(np.tri(n) > 0, 0.0, -np.inf)
    heads = [
        ref.attend(q[:, h * gqa : (h + 1) * gqa], k[:, h], v[:, h], np.zeros(n), d**-0.5, mask=causal)
        for h in range(n_head_kv)
    ]
    x = x + matrix(np.concatenate(heads, axis=1).reshape(n, -1), "attn_output")
    y = norm(x, "ffn_norm")
    gate = matrix(y, "ffn_gate")
    x = x + matrix(gate / (1 + np.exp(-gate)) * matrix(y, "ffn_up"), "ffn_down")
    sizes = np.sort(np.linalg.norm(x[sorted({*range(255, n, 256), n - 1})], axis=1))

    ends = ref.delimiter_table([llm.detokenize([t]) for t in tokens], np.zeros(n, bool))
    n_past = n - n_window - n_probe
    chunk = ref.chunk_ids(ends[n_sink:n_past], 32, 0)
    params = ref.PassParams(
        scale=d**-0.5,
        softcap=0.0,
        inv_freq=inv_freq,
        rope_neox=False,
        n_past=0,
        n_horizon=512,
        seed=0,
        budget=0,
        distinct=0,
    )
    expected = [
        ref.output_errors(
            ref.TextInput(
                k[:, h],
                v[:, h],
                q[:, h * gqa : (h + 1) * gqa],
                np.arange(n),
                chunk,
                n_sink,
                n_window + n_probe,
                n_probe,
            ),
            params,
            ref.PARTS,
        )
        / sizes[len(sizes) // 2]
        for h in range(n_head_kv)
    ]
    # the ring's queries have 8 bits, and one choice more or less is made otherwise for it
    np.testing.assert_allclose(got.errors, expected, rtol=0.1)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_a_norm_behind_the_attention(arch, tmp_path, cache):
    """It undoes the size of the heads' outputs: values and errors eight times as large are the same model."""
    from gguf import GGUFReader

    errors = []
    for factor in (1, 8):
        path = tiny_models.write_tiny(tmp_path / f"{factor}.gguf", arch)
        for tensor in GGUFReader(path, "r+").tensors:
            if tensor.name.endswith("attn_v.weight"):
                tensor.data[...] *= factor
        errors.append(
            ref.read_profile(profile.calibrate(path, texts=TEXTS[:1], n_ctx=1024, progress=False, n_threads=1)).errors
        )
    assert errors[0].min() > 0
    # one choice may be made otherwise for rounding
    off = np.abs(errors[1] / errors[0] - 1)
    assert off.max() < 0.1 and (off > 0.02).sum() <= 1, off


@pytest.mark.parametrize("method", ["keydiff", "streaming"])
def test_a_profile_that_is_named_holds_for_every_method(method, tiny, cache, load):
    path = str(profile.calibrate(tiny("llama"), texts=TEXTS[:1], n_ctx=1024, progress=False, n_threads=1))

    def budgets(**options):
        return [allocated for _, _, allocated, _ in load(tiny("llama"), **{**SMALL, **options}).kv_rows()]

    ours = budgets(kv_profile=path)
    assert len(set(ours)) > 1 and budgets(kv_compress=method, kv_profile=path) == ours
    assert len(set(budgets(kv_compress=method, kv_profile="auto"))) == 1
