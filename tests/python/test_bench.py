"""bench: what is measured on a tiny model, and the arithmetic of its tables."""

from __future__ import annotations

import json
import os

import pytest
import tiny_models
from click.testing import CliRunner

from llama_semanticache.bench import speed
from llama_semanticache.bench.settings import parse_setting
from llama_semanticache.cli import main
from llama_semanticache.errors import ArgumentError


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Heads of 64 values, which stock llama.cpp can quantize."""
    return str(tiny_models.write_tiny(tmp_path_factory.mktemp("wide") / "m.gguf", "llama", n_embd_head=64))


def test_settings():
    assert parse_setting("semanticache:0.25")[1] == {"kv_compress": "semanticache", "kv_ratio": 0.25}
    text = "semanticache:0.5:equal:stage=96:type_k=q8_0:merge=0:horizon=7:profile=a.profile"
    assert parse_setting(text) == (text, {
        "kv_compress": "semanticache", "kv_ratio": 0.5, "kv_stage": 96, "kv_type_k": "q8_0", "kv_profile": "a.profile",
        "kv_params": {"merge": 0, "n_horizon": 7},
    })  # fmt: skip
    for bad in ("semanticache", "semanticache:x", "semanticache:0.5:stage", "semanticache:0.5:merge=yes"):
        with pytest.raises(ArgumentError, match="setting: expected METHOD:RATIO"):
            parse_setting(bad)


def test_speeds_by_hand():
    base = {"prefill_s": [10.0, 20.0, 10.0], "decode_s": [4.0, 4.0, 8.0]}
    ours = {"prefill_s": [5.0, 20.0, 8.0], "decode_s": [1.0, 2.0, 2.0]}
    assert speed.ratios(ours, base, "prefill_s") == [2.0, 1.0, 1.25]
    assert speed.ratios(ours, base, "decode_s") == [4.0, 2.0, 4.0]
    assert speed.rate(ours, "prefill_s", 400) == 50.0


def test_speed_measures_every_setting_in_every_round(wide, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog. " * 40)
    out = tmp_path / "speed.json"
    settings = ("stock:q8_0", "semanticache:0.25:equal:stage=96:window=12")
    command = ["bench", "speed", wide, "--text", str(text), "--depth", "300", "--depth", "50", "--n-decode", "5", "--rounds", "2", "--threads", "1"]
    command += ["--json", str(out), *(word for s in settings for word in ("--setting", s))]
    assert os.environ.get(speed.STOCK_VARIABLE), f"expected {speed.STOCK_VARIABLE}, got nothing; run `make test`, which builds the unpatched library"
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [(r["depth"], r["setting"]) for r in result["records"]] == [(d, s) for d in (50, 300) for s in ("stock:f16", *settings)]
    f16, q8_0, ours = result["records"][3:]
    for record in result["records"]:
        assert len(record["prefill_s"]) == len(record["decode_s"]) == 2 and min(record["prefill_s"] + record["decode_s"]) > 0
    assert ours["pass_s"] and 0 < sum(ours["pass_s"]) < sum(ours["prefill_s"]) and not f16["pass_s"]
    assert f16["kv_bytes"] == 2 * 2 * 2 * 64 * 2 * 512  # layers, kv heads, K and V, head size, bytes, cells
    assert q8_0["kv_bytes"] == f16["kv_bytes"] * 34 // 64
    assert f"{ours['kv_bytes'] / 2**20:.1f}" in done.output and "semanticache" in done.output


def test_speed_needs_the_stock_library(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv(speed.STOCK_VARIABLE, raising=False)
    text = tmp_path / "text.txt"
    text.write_text("short")
    done = CliRunner().invoke(main, ["bench", "speed", tiny("llama"), "--text", str(text)])
    assert done.exit_code == 1 and "make stock" in done.output


def test_speed_of_a_text_that_is_too_short(wide, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    done = CliRunner().invoke(main, ["bench", "speed", wide, "--text", str(text), "--depth", "300", "--setting", "stock:q4_0", "--threads", "1"])
    assert done.exit_code == 1 and "expected at least 364 tokens" in done.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stock:q5_0", "expected one of stock:f16, stock:q8_0, stock:q4_0"),
        ("semanticache:much", "setting: expected METHOD:RATIO"),
        ("stock:q8_0", "stock:q8_0: expected a measurement, got the end of its process"),  # heads of 16 values
    ],
)
def test_speed_of_a_setting_that_cannot_be(setting, message, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox. " * 100)
    done = CliRunner().invoke(main, ["bench", "speed", tiny("llama"), "--text", str(text), "--depth", "50", "--setting", setting, "--threads", "1"])
    assert done.exit_code == 1 and "Error: " in done.output
    assert message in done.output and "Traceback" not in done.output
