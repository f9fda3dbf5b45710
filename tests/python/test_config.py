"""config.py: one place for defaults, checks and the rule for profiles, which all that takes settings goes by."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import click
import llama_cpp
import numpy as np
import pytest

import llama_semanticache
import tiny_models
from conftest import SMALL, last_logits, random_tokens
from llama_semanticache import ArgumentError, Llama, _native, models, profile
from llama_semanticache.bench.settings import profiles_of
from llama_semanticache.cli import main
from llama_semanticache.config import MAX_ROOM, METHODS, N_CHUNK, OURS, PARAMS, ROW_TYPES, STAGE_TYPES, KVConfig
from llama_semanticache.memory import estimate
from llama_semanticache.model_file import ModelFile

SMALL_KV = {name: value for name, value in SMALL.items() if name.startswith("kv_")} | {"kv_profile": "auto"}


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """Paths of the models that are measured; the measurement itself is left out."""
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "cache"))
    measured = []
    monkeypatch.setattr(profile, "calibrate", lambda model, **_: measured.append(model.path) or tmp_path / "a.profile")
    return measured


def test_defaults_are_the_library_s():
    _, lib = _native.load()
    theirs, ours = lib.semcache_default_params(), KVConfig(OURS)
    assert theirs.method == getattr(lib, f"SEMCACHE_METHOD_{METHODS[OURS]}")
    assert (theirs.ratio, theirs.n_stage, theirs.n_window, theirs.n_sink, theirs.n_chunk) == (
        ours.ratio(48),
        ours.kv_stage,
        ours.kv_window,
        ours.kv_sink,
        N_CHUNK,
    )
    assert (ours.kv_type_k, ours.kv_type_v) == ("auto", "auto")
    assert theirs.type_k == theirs.type_v == lib.SEMCACHE_TYPE_AUTO
    assert lib.SEMCACHE_MAX_ROOM == MAX_ROOM
    assert all(hasattr(theirs, name) for name in PARAMS)


def test_models_of_few_heads_keep_all_rows():
    """Unless it is said otherwise: methods of others have no use for so many."""
    ours, theirs = KVConfig(OURS), KVConfig("keydiff")
    assert [config.ratio(n) for config in (ours, theirs) for n in (7, 8)] == [1, 0.25, 0.25, 0.25]
    assert KVConfig(OURS, kv_ratio=0.5).ratio(1) == 0.5
    assert not ours.has_too_few_heads(7) and KVConfig(OURS, kv_ratio=0.5).has_too_few_heads(7)


def test_methods_are_the_library_s():
    ffi, lib = _native.load()
    names = ffi.typeof("enum semcache_method").relements
    assert {f"SEMCACHE_METHOD_{name}" for name in METHODS.values()} == set(names)


def test_defaults_of_llama_are_these():
    parameters = inspect.signature(Llama.__init__).parameters
    assert {name: parameters[name].default for name in KVConfig().arguments()} == KVConfig().arguments()
    assert KVConfig().changed() == [] and KVConfig(OURS, kv_sink=8).changed() == ["kv_compress", "kv_sink"]


@pytest.mark.parametrize("command", ["chat", "run", "serve", "memory"])
def test_options_of_the_command_line_are_these(command):
    options = {o.name: o for o in main.commands[command].params if (o.name or "").startswith("kv_")}
    settings = {field.name for field in fields(KVConfig)} - {"kv_params"}
    assert options.keys() == (
        settings - {"kv_compress", "kv_profile", "kv_budget"} if command == "memory" else settings
    )
    for name, option in options.items():
        default = OURS if name == "kv_compress" else getattr(KVConfig, name)
        assert option.default == default, name
        if isinstance(option.type, click.Choice):
            choices = {"kv_compress": (*METHODS, "auto", "none"), "kv_type_stage": STAGE_TYPES}
            assert tuple(option.type.choices) == choices.get(name, ROW_TYPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_ratio=2), "kv_ratio: expected 0 < kv_ratio <= 1, got 2; "),
        (dict(kv_compress=["paper"]), r"kv_compress: expected None or one of semanticache, .* got \['paper'\]; "),
        (dict(kv_type_k="q6_k"), "kv_type_k: expected one of auto, f16, q8_0, q5_0, q4_0, iq4_nl, got 'q6_k'; "),
        (dict(kv_type_stage="q4_0"), "kv_type_stage: expected one of auto, f16, q8_0, got 'q4_0'; "),
        (dict(kv_stage=96, kv_window=92), r"kv_stage: expected more than kv_window \+ kv_sink = 96, got 96; "),
        (dict(kv_stage=4700), r"kv_stage: expected at most kv_window \+ 4096 = 4352, got 4700; "),
        (dict(kv_stage=2048), "n_ctx: expected at least kv_stage = 2048, got 1024; "),
        (dict(kv_params={"n_chunk": 0}), "kv_params: expected n_chunk of 1 to 255, got 0; "),
        (dict(kv_params={"n_chunk": "x"}), "kv_params: expected n_chunk of 1 to 255, got 'x'; "),
        (dict(kv_params={"chunk": 3}), "kv_params: expected n_horizon, n_chunk, .* got chunk; "),
    ],
    ids=str,
)
def test_llama_and_the_estimate_refuse_the_same(options, message, tiny):
    for refuse in (
        lambda kv: Llama(tiny("llama"), **{"n_ctx": 1024, **kv}, verbose=False),
        lambda kv: estimate(ModelFile.read(tiny("llama")).shape, 1024, OURS, **kv),
    ):
        with pytest.raises(ArgumentError, match=message):
            refuse({"kv_compress": OURS, **options})


@pytest.mark.parametrize(
    ("n_layer", "options", "measures"),
    [
        (4, {}, True),
        (4, dict(kv_ratio=1.0), False),
        (4, dict(kv_ratio=1), False),
        (4, dict(kv_compress="keydiff"), False),
        (4, dict(kv_profile=None), False),
        (3, {}, False),
    ],
    ids=str,
)
def test_who_decides_by_the_model_s_own_profile(n_layer, options, measures, tmp_path, calibrated, monkeypatch):
    """The rule is the same for Llama, for `bench` and for the command line; a profile takes minutes to measure."""
    path = tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=n_layer)
    model = ModelFile.read(path)
    config = KVConfig(**{**SMALL_KV, **options})
    expected = [path] if measures else []

    assert config.decides_by_own_profile(model) == measures
    monkeypatch.setattr(_native, "compressed", None)  # Llama comes no further than this
    with pytest.raises(TypeError):
        Llama(model, n_ctx=1024, verbose=False, **config.arguments())
    assert calibrated == expected

    calibrated.clear()
    setting = f"{config.kv_compress}:{config.kv_ratio}" + (":equal" if config.kv_profile is None else "")
    profiles_of(model, ["stock:f16", setting, "kvpress:keydiff:0.3"], None)
    assert calibrated == expected


def test_a_profile_that_is_none_is_found_before_the_model_is_measured(tmp_path, calibrated):
    model = ModelFile.read(tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=4))
    with pytest.raises(profile.ProfileError, match=r"expected .* a file, got .*none.profile, which is none; run"):
        profiles_of(model, ["semanticache:0.25", f"keydiff:0.25:profile={tmp_path / 'none.profile'}"], None)
    assert calibrated == []


@pytest.mark.parametrize("arch", ["llama", "mamba", "bloom"])
def test_auto_compresses_where_it_can(arch, tiny, load, capfd):
    """And says in one line why it does not; the answers are then those of an uncompressed cache."""
    llm = load(tiny(arch), **{**SMALL, "n_ctx": 2048, "kv_compress": "auto"})
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llama-semanticache: ")]
    stats = llm.kv_stats()
    if arch == "llama":
        assert llm.kv_compress == stats.kv_compress == "semanticache" and stats.why_uncompressed is None
        assert stats.compression_factor > 1 and not said
        return
    why = {"mamba": "recurrent", "bloom": "ALiBi"}[arch]
    assert llm.kv_compress is stats.kv_compress is None and why in stats.why_uncompressed
    assert len(said) == 1 and said[0].endswith(stats.why_uncompressed)
    llm.eval(random_tokens(50))
    plain = load(tiny(arch), n_ctx=2048, n_batch=80)
    plain.eval(random_tokens(50))
    np.testing.assert_array_equal(last_logits(llm), last_logits(plain))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(n_ctx=256), "n_ctx = 256 tokens fit the stage of 384"),
        (dict(n_ctx=512, kv_ratio=1, kv_type_k="f16", kv_type_v="f16", kv_type_stage="f16"), "it would take"),
        (dict(n_ctx=2048, embedding=True), "got embedding=True"),
        (dict(n_ctx=2048, type_k=llama_cpp.GGML_TYPE_Q8_0, flash_attn=True), "type_k: expected None or f16"),
    ],
)
def test_auto_leaves_the_cache_alone_where_nothing_is_gained(options, why, tiny, load):
    llm = load(tiny("qwen3"), kv_compress="auto", kv_profile=None, **options)
    assert llm.kv_compress is None and why in llm.kv_stats().why_uncompressed


def test_auto_does_not_hide_mistakes(tiny, load):
    with pytest.raises(ArgumentError, match="kv_ratio: expected 0 < kv_ratio <= 1, got 7"):
        load(tiny("llama"), n_ctx=2048, kv_compress="auto", kv_ratio=7)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ratio", "kv_ratio"), ("kv_compres", "kv_compress"), ("nctx", "n_ctx"), ("n_gpu_layer", "n_gpu_layers")],
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(name, meant, tiny, load):
    """llama_cpp.Llama takes any name and ignores it."""
    with pytest.raises(ArgumentError, match=rf"got {name} \(did you mean {meant}\?\); check the spelling"):
        load(tiny("llama"), **{name: 1})
    with pytest.raises(ArgumentError, match="got zzz; check the spelling"):
        load(tiny("llama"), zzz=1)
    load(tiny("llama"), n_ctx=1024, f16_kv=True, n_parts=-1)  # LangChain still passes what llama_cpp had once


def test_the_package_shows_what_it_has_and_its_types():
    assert "Llama" in dir(llama_semanticache) and "Llama" in llama_semanticache.__all__
    assert Path(llama_semanticache.__file__).with_name("py.typed").is_file()


def test_types_have_ggmls_numbers():
    """They are written down, so that `memory` need not import llama_cpp."""
    types = set(ROW_TYPES) - {"auto"}
    assert types == set(_native.GGML_TYPES)
    assert all(_native.GGML_TYPES[name] == getattr(llama_cpp, f"GGML_TYPE_{name.upper()}") for name in types)
