"""bench: what is measured on a tiny model, and the arithmetic of its tables."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tiny_models
from conftest import last_logits
from llama_semanticache import Llama, profile
from llama_semanticache.bench import cards, cases, chat, memory, quality, report, speed, tables, tasks
from llama_semanticache.bench.process import Worker
from llama_semanticache.bench.runs import Run, machine
from llama_semanticache.bench.settings import check_settings, parse_setting
from llama_semanticache.cli import main
from llama_semanticache.errors import ArgumentError, SemanticCacheError
from llama_semanticache.model_file import ModelFile


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Heads of 64 values, which stock llama.cpp can quantize."""
    return str(tiny_models.write_tiny(tmp_path_factory.mktemp("wide") / "m.gguf", "llama", n_embd_head=64))


def test_settings():
    assert parse_setting("semanticache:0.25") == {"kv_compress": "semanticache", "kv_ratio": 0.25}
    text = "semanticache:0.5:equal:stage=96:type_k=q8_0:merge=0:distinct=20:horizon=7:profile=a.profile"
    assert parse_setting(text) == {
        "kv_compress": "semanticache",
        "kv_ratio": 0.5,
        "kv_stage": 96,
        "kv_type_k": "q8_0",
        "kv_profile": "a.profile",
        "kv_params": {"merge": 0, "distinct": 20, "n_horizon": 7},
    }
    for bad in ("semanticache", "semanticache:x", "semanticache:0.5:stage", "semanticache:0.5:merge=yes"):
        with pytest.raises(ArgumentError, match="or METHOD:RATIO"):
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
    command = [
        "bench",
        "speed",
        wide,
        "--text",
        str(text),
        "--depth",
        "300",
        "--depth",
        "50",
        "--n-decode",
        "90",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    command += ["--json", str(out), *(word for s in settings for word in ("--setting", s))]
    assert os.environ.get(speed.STOCK_VARIABLE), (
        f"expected {speed.STOCK_VARIABLE}, got nothing; run `make test`, which builds the unpatched library"
    )
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    records = speed.speed_records(json.loads(out.read_text()))
    assert [(r["depth"], r["setting"]) for r in records] == [
        (d, s) for d in (50, 300) for s in ("stock:f16", *settings)
    ]
    f16, q8_0, ours = records[3:]
    for record in records:
        assert min(record["resident_bytes"]) > record["kv_bytes"]
        assert (
            len(record["prefill_s"]) == len(record["decode_s"]) == 2
            and min(record["prefill_s"] + record["decode_s"]) > 0
        )
    assert ours["pass_s"] and 0 < sum(ours["pass_s"]) < sum(ours["prefill_s"]) and not f16["pass_s"]
    assert ours["decode_pass_s"] and 0 < sum(ours["decode_pass_s"]) < sum(ours["decode_s"]) and not f16["decode_pass_s"]
    assert f16["kv_bytes"] == 2 * 2 * 2 * 64 * 2 * 512  # layers, kv heads, K and V, head size, bytes, cells
    assert q8_0["kv_bytes"] == f16["kv_bytes"] * 34 // 64
    assert f"{ours['kv_bytes'] / 2**20:.1f}" in done.output and "semanticache" in done.output
    written = out.read_text()
    assert CliRunner().invoke(main, command).exit_code == 0 and out.read_text() == written  # nothing is measured twice
    done = CliRunner().invoke(main, [*command, "--n-decode", "91"])
    assert done.exit_code == 1 and "another asked; name another file" in done.output


def test_speed_needs_the_stock_library(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv(speed.STOCK_VARIABLE, raising=False)
    text = tmp_path / "text.txt"
    text.write_text("short")
    done = CliRunner().invoke(main, ["bench", "speed", tiny("llama"), "--text", str(text)])
    assert done.exit_code == 1 and "make stock" in done.output


def test_speed_of_a_text_that_is_too_short(wide, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    done = CliRunner().invoke(
        main,
        ["bench", "speed", wide, "--text", str(text), "--depth", "300", "--setting", "stock:q4_0", "--threads", "1"],
    )
    assert done.exit_code == 1 and "expected at least 556 tokens" in done.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stock:q5_0", "expected one of stock:f16, stock:q8_0, stock:q4_0 or METHOD:RATIO"),
        ("semanticache:much", "METHOD:RATIO"),
        ("stock:q8_0", "expected heads of a multiple of 32 values for q8_0"),
        ("streaming:0.25:stage=5", "streaming:0.25:stage=5: --kv-stage: expected more than --kv-window + --kv-sink"),
    ],
)
def test_speed_of_a_setting_that_cannot_be(setting, message, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox. " * 100)
    done = CliRunner().invoke(
        main,
        ["bench", "speed", tiny("llama"), "--text", str(text), "--depth", "50", "--setting", setting, "--threads", "1"],
    )
    assert done.exit_code == 1 and "Error: " in done.output
    assert message in done.output and "Traceback" not in done.output


def test_a_process_that_ends_instead_of_answering():
    with (
        Worker("x:1", [sys.executable, "-c", "raise SystemExit(3)"]) as worker,
        pytest.raises(SemanticCacheError, match=r"x:1: expected a measurement, got .*status 3"),
    ):
        worker.ask(load={})


def test_a_process_that_ends_between_two_orders():
    """The order stays in the pipe, which must not hide what is said."""
    with (
        pytest.raises(SemanticCacheError, match=r"x:1: expected a measurement, got .*status 0"),
        Worker("x:1", [sys.executable, "-c", ""]) as worker,
    ):
        worker.process.wait()
        worker.ask(load={})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("semanticache:2:equal", "expected 0 < kv_ratio"),
        ("semanticache:0.25:sink=300", r"expected more than kv_window \+ kv_sink = 556"),
        ("semanticache:0.05:sink=60", "expected at least 92 rows per kv head"),
        ("semanticache:0.25:chunk=256", "expected n_chunk of 1 to 255"),
        ("semanticache:0.0625:chunk=64", "expected at least 68 rows per kv head"),
    ],
)
def test_a_setting_that_the_library_refuses_is_refused_before(setting, message, tiny):
    """By the same rule: the library says so, too."""
    with pytest.raises(ArgumentError, match=message):
        check_settings(ModelFile.read(tiny("llama")), [setting], 1024)
    with pytest.raises(ArgumentError):
        Llama(tiny("llama"), **{**parse_setting(setting), "kv_profile": None}, n_ctx=1024, verbose=False)
    check_settings(ModelFile.read(tiny("llama")), ["semanticache:0.25:sink=0:stage=515"], 1024)


def test_a_setting_that_cannot_be_is_named_before_anything_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "ensure", None)  # it would measure the model's heads
    items, text, out = tmp_path / "items.jsonl", tmp_path / "text.txt", tmp_path / "run.json"
    items.write_text('{"task": "lcc", "id": 0, "prompt": "x", "gold": "y"}')
    text.write_text("the quick brown fox. " * 400)
    for command in (
        ("tasks", "--tasks", items),
        ("quality", "--text", text, "--n-tokens", 300),
        ("chat", "--text", text),
        ("memory",),
    ):
        words = [*map(str, command[1:]), "--n-ctx", "1024", "--setting", "semanticache:2", "--json", str(out)]
        done = CliRunner().invoke(main, ["bench", command[0], tiny("llama"), *words])
        assert (
            done.exit_code == 1
            and "semanticache:2: --kv-ratio: expected 0 < --kv-ratio" in done.output
            and not out.exists()
        ), done.output


def test_the_peak_is_seen_inside_a_call():
    with memory.PeakResident() as peak:
        before = peak.bytes
        block = np.ones(1 << 25)  # 256 MiB, gone before anybody asks
        del block
    assert 0.9 * (1 << 28) < peak.bytes - before < 1.5 * (1 << 28)


def test_divergence_by_hand():
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]))
    other = np.log(np.array([[0.25, 0.75], [0.6, 0.4], [0.2, 0.8]]))
    got = quality.divergence(reference, other, [0, 1, 0])
    first, second = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.9 * math.log(1.5) + 0.1 * math.log(0.25)
    assert got["kl"] == pytest.approx((first + second) / 3)
    assert got["same_top"] == pytest.approx(2 / 3)  # a tie goes to the first
    assert got["log_ppl"] == pytest.approx((math.log(0.5 / 0.75) + math.log(0.9 / 0.6)) / 2)


def test_facts():
    for seed in range(5):
        single, ruler = cases.single_facts(seed), cases.ruler_facts(seed)
        for facts in (single, ruler):
            assert [f.depth for f in facts] == list(cases.DEPTHS)
            for fact in facts:
                assert all(any(answer in text for _, text in fact.sentences) for answer in fact.answers)
                assert not any(answer in fact.prompt for answer in fact.answers)
        assert {f.kind for f in ruler} >= {"multikey", "paraphrase", "multivalue", "tracking"}
        assert [len(f.sentences) for f in ruler if f.kind in ("multikey", "multivalue", "tracking")].count(3) == 2
    assert {cases.ruler_facts(s)[0].kind for s in range(5)} >= {"multikey", "paraphrase", "multivalue", "tracking"}
    assert cases.recalled(["3 July 1822"], " 13 July 1822") == 0, "another date that ends alike"
    assert cases.recalled(["Ann", "Bob", "Eve"], " Bob, Ann and Joe") == pytest.approx(2 / 3)


def test_quality(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog. " * 90)
    out = tmp_path / "quality.json"
    command = [
        "bench",
        "quality",
        tiny("llama"),
        "--text",
        str(text),
        "--n-tokens",
        "700",
        "--n-tokens",
        "900",
        "--facts",
        "ruler",
        "--cases",
        "2",
        "--threads",
        "1",
    ]
    command += [
        "--n-following",
        "40",
        "--setting",
        "semanticache:0.25:equal:stage=96:window=12",
        "--setting",
        "semanticache:1:equal:stage=96:window=12",
        "--json",
        str(out),
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    run = json.loads(out.read_text())
    rows = {(r["setting"].split(":")[1], r["tokens"]): r for r in quality.text_rows(run)}
    assert set(rows) == {(s, n) for s in ("f16", "0.25", "1") for n in (700, 900)}
    for n in (700, 900):
        assert rows["f16", n]["kl"] is None and rows["1", n]["kl"] < 1e-4 < rows["0.25", n]["kl"]
        assert rows["0.25", n]["questions"] == 10 and rows["0.25", n]["kv_mib"] < rows["f16", n]["kv_mib"]
    for record in list(run["records"])[-3:]:  # as if it had been cut off
        del run["records"][record]
    kept = {name: dict(r) for name, r in run["records"].items()}
    out.write_text(json.dumps(run))
    assert CliRunner().invoke(main, command).exit_code == 0
    again = json.loads(out.read_text())
    assert {name: again["records"][name] for name in kept} == kept
    for r in quality.text_rows(again):
        assert r["kl"] == pytest.approx(rows[r["setting"].split(":")[1], r["tokens"]]["kl"])


STUB = """#!{python}
import json, sys
assert sys.argv[1].endswith("transformers_worker.py")
for line in sys.stdin:
    order = json.loads(line)
    answer = {{"ok": True}} if "load" in order else {{
        "kl": 0.5, "same_top": 0.25, "log_ppl": 0.0, "prefill_s": 1.0, "pass_s": 0.0,
        "kv_bytes": int(2**20 * order["keep"]), "rows_used": sum(map(sum, order.get("rows", [[400]]))),
        "texts": [f"{{order['press']}} {{len(q['tokens'])}} {{q['n']}}" for q in order["questions"]]}}
    print(json.dumps(answer), flush=True)
"""


def test_quality_asks_the_process_of_kvpress(tiny, tmp_path):
    """With a process that knows nothing: what it is told, and what becomes of its answers. kvpress itself needs
    torch.
    """
    stub, text, out = tmp_path / "stub", tmp_path / "text.txt", tmp_path / "q.json"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    text.write_text("the quick brown fox jumps over a lazy dog. " * 90)
    run_command(
        "quality",
        tiny("llama"),
        "--text",
        text,
        "--n-tokens",
        400,
        "--cases",
        1,
        "--n-following",
        20,
        "--threads",
        1,
        "--setting",
        "kvpress:keydiff:0.5",
        "--setting",
        "attention-matching:0.25:equal",
        "--kvpress-python",
        stub,
        "--json",
        out,
    )
    base, press, matching = json.loads(out.read_text())["records"].values()
    assert matching["rows_used"] == 2 * 2 * 100 and matching["answers"][0]["got"].startswith("attention-matching ")
    assert press["rows_used"] == 400 and press["kl"] == 0.5 and press["kv_bytes"] == 2**19
    assert len(press["answers"]) == len(base["answers"]) == 5 and press["answers"][0]["got"].startswith("keydiff ")
    assert [a["want"] for a in press["answers"]] == [a["want"] for a in base["answers"]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kvpress:keydiff:0.5", "--kvpress-python: expected a Python with kvpress"),
        ("kvpress:nothing:0.5", "kvpress:NAME:KEEP"),
        ("kvpress:tova:2", "0 < KEEP <= 1"),
        ("attention-matching:0.5", "--kvpress-python: expected a Python with kvpress"),
        ("attention-matching:0.5:profile=x", "attention-matching:KEEP[:equal]"),
        ("attention-matching", "attention-matching:KEEP[:equal]"),
    ],
)
def test_peers_that_cannot_be(setting, message, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    done = CliRunner().invoke(main, ["bench", "quality", tiny("llama"), "--text", str(text), "--setting", setting])
    assert done.exit_code == 1 and message in done.output


def test_quality_of_a_text_that_is_too_short(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    done = CliRunner().invoke(
        main,
        ["bench", "quality", tiny("llama"), "--text", str(text), "--n-tokens", "800", "--setting", "streaming:0.5"],
    )
    assert done.exit_code == 1 and "text: expected more than" in done.output
    done = CliRunner().invoke(
        main,
        [
            "bench",
            "quality",
            tiny("llama"),
            "--text",
            str(text),
            "--n-tokens",
            "800",
            "--n-ctx",
            "1024",
            "--n-following",
            "300",
        ],
    )
    assert done.exit_code == 1 and "--n-ctx: expected at least 1100" in done.output
    text.write_bytes("Grüße".encode("latin-1"))
    done = CliRunner().invoke(
        main,
        ["bench", "quality", tiny("llama"), "--text", str(text), "--n-tokens", "800", "--setting", "streaming:0.5"],
    )
    assert done.exit_code == 1 and "expected a text in UTF-8" in done.output and "Traceback" not in done.output


def test_a_conversation_that_does_not_fit(smollm2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over a lazy dog and runs into the dark wood. " * 90)
    done = CliRunner().invoke(
        main,
        [
            "bench",
            "chat",
            smollm2,
            "--text",
            str(text),
            "--turns",
            "24",
            "--n-answer",
            "50",
            "--chats",
            "1",
            "--n-ctx",
            "1024",
        ],
    )
    assert done.exit_code == 1 and "--n-ctx: expected at least" in done.output and "Traceback" not in done.output


def test_a_package_of_the_extra_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    (tmp_path / "x.json").write_text("{}")
    done = CliRunner().invoke(main, ["bench", "report", str(tmp_path)])
    assert (
        done.exit_code == 1
        and "expected the package jinja2" in done.output
        and "llama-semanticache[bench]" in done.output
    )


def test_a_run_names_files_and_not_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            str(tmp_path),
            "bench",
            str(tmp_path / "none"),
            "a b",
            "streaming:0.3",
            f"x:1:profile={tmp_path / 'p'}",
            f"--json={tmp_path}/",
        ],
    )
    assert (
        Run(None, "speed", {}).data["command"]
        == f"{tmp_path.name} bench none 'a b' streaming:0.3 x:1:profile=p --json={tmp_path.name}/"
    )


def test_a_file_that_is_no_run(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ArgumentError, match="expected the JSON of a bench run"):
        Run(path, "speed", {})
    path.unlink()
    text = tmp_path / "text.txt"
    text.write_text("one")
    Run(path, "speed", {}, [text]).record("x", dict)
    assert Run(path, "speed", {}, [text]).records == {"x": {}}
    text.write_text("two")
    with pytest.raises(ArgumentError, match="got one with another inputs"):
        Run(path, "speed", {}, [text])
    with pytest.raises(ArgumentError, match="expected a folder to write to"):  # said before anything is measured
        Run(tmp_path / "none" / "x.json", "speed", {})


def run_command(*words):
    done = CliRunner().invoke(main, ["bench", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def test_task_metrics_by_hand():
    assert (
        tasks.score("hotpotqa", "The red house!", ["a red car", "Red house"]) == 1.0
    )  # articles, case and punctuation do not count
    assert tasks.score("hotpotqa", "red house", ["red car"]) == 0.5
    assert tasks.score("hotpotqa", "", ["red car"]) == 0.0
    assert tasks.score("multifieldqa_zh", "北京。", ["北京市"]) == pytest.approx(4 / 5)
    assert tasks.score("gov_report", "the cat sat", ["the cat ran off"]) == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )
    assert tasks.score("multifieldqa_zh", "2031年", ["2013年"]) == 0.5  # a number is one word
    assert tasks.score("gov_report", "Taxes fell. The budget rose.", ["The budget rose. Taxes fell."]) == pytest.approx(
        1
    )  # sentence by sentence
    assert (
        tasks.score("gov_report", "no no no no", ["no"]) == pytest.approx(1)
        and tasks.score("gov_report", ".", ["no"]) == tasks.score("samsum", "", ["no"]) == 0.0
    )
    assert tasks.score("vcsum", "甲乙丁", ["甲乙丙"]) == pytest.approx(2 / 3)
    classes = ["Other location", "City", "location", "Location"]
    assert tasks.score("trec", "\nDescription of a thing\nQuestion: Location", ["Location"], classes) == 0.0
    assert (
        tasks.score("trec", "Location of it", ["Location"], classes) == 1.0
        and tasks.score("trec", "the location", ["Location"], classes) == 0.0
    )
    assert (
        tasks.score("trec", "City or Location", ["Location"], classes) == 0.5
        and tasks.score("trec", "Other location", ["Other location"], classes) == 1.0
    )
    assert tasks.score("trec", "City", ["Location"], classes) == 0.0
    assert tasks.score("passage_retrieval_en", "Paragraph 7, not 8", ["Paragraph 7"]) == 0.5
    assert tasks.score("passage_count", "none", ["3"]) == 0.0
    assert tasks.score("lcc", "# a comment\nreturn x\n", ["return x"]) == 1.0
    assert tasks.score("repobench-p", "abcd", ["abxy"]) == 0.5
    assert tasks.cut_middle(range(10), 5) == [0, 1, 7, 8, 9] and tasks.cut_middle(range(3), 5) == [0, 1, 2]


def test_tasks(tiny, tmp_path):
    items, out = tmp_path / "items.jsonl", tmp_path / "tasks.json"
    lines = [
        {"task": "hotpotqa", "id": i, "prompt": "the quick brown fox. " * n, "gold": "fox"}
        for i, n in enumerate((20, 400))
    ]
    items.write_text("\n".join(map(json.dumps, lines)))
    command = (
        "tasks",
        tiny("llama"),
        "--tasks",
        items,
        "--n-ctx",
        1024,
        "--threads",
        1,
        "--setting",
        "h2o:0.5:stage=192:window=32",
        "--json",
        out,
    )
    assert "all items" in run_command(*command)
    records = json.loads(out.read_text())["records"]
    assert len(records) == 4 and {r["tokens"] for r in records.values()} >= {1024 - 32}  # the long one lost its middle
    head, cells = tasks.task_table(
        {
            "asked": {"settings": ["stock:f16", "x:1"]},
            "records": {
                f"task|{setting}|{task}|0": {"score": score, "kv_bytes": n, "tokens": tokens}
                for setting, task, score, n, tokens in (
                    ("stock:f16", "trec", 1.0, 2**21, 1025),
                    ("x:1", "trec", 0.5, 2**20, 1025),
                    ("stock:f16", "lcc", 0.5, 2**21, 1024),
                    ("x:1", "lcc", 0.25, 2**20, 1024),
                    ("stock:f16", "qasper", 1.0, 2**21, 3000),  # which x:1 has not answered yet
                )
            },
        }
    )
    assert head == ["task", "items", "stock:f16", "x:1"]
    assert cells == [
        ["lcc", "1", "50.0", "25.0"],
        ["trec", "1", "100.0", "50.0"],
        ["513 to 1024 tokens", "1", "50.0", "25.0"],
        ["1025 to 2048 tokens", "1", "100.0", "50.0"],
        ["all items", "2", "75.0", "37.5"],
        ["of uncompressed", "", "100.0%", "50.0%"],
        ["95% interval", "", "100% to 100%", "50% to 50%"],
        ["KV MiB", "", "2.0", "1.0"],
    ]
    out.unlink()
    assert "without 1 of 2 items for their length" in " ".join(run_command(*command, "--whole").split())
    assert [name.split("|")[3] for name in json.loads(out.read_text())["records"]] == ["0", "0"]
    run_command(*command[:-1], tmp_path / "long.json", "--min-tokens", 900)
    assert [name.split("|")[3] for name in json.loads((tmp_path / "long.json").read_text())["records"]] == ["1", "1"]
    run_command(*command[:-1], tmp_path / "short.json", "--max-tokens", 900)
    assert [name.split("|")[3] for name in json.loads((tmp_path / "short.json").read_text())["records"]] == ["0", "0"]
    run_command(*command[:-1], tmp_path / "together.json", "--jobs", 3)

    def answers(part: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        return {
            name: {key: value for key, value in record.items() if not key.endswith("_s")}
            for name, record in part.items()
        }

    assert answers(json.loads((tmp_path / "together.json").read_text())["records"]) == answers(records)
    shown = run_command(*command[:-1], tmp_path / "alone.json", "--without-base", "--min-tokens", 900)
    assert "all items" in shown and "of uncompressed" not in shown and "stock:f16" not in shown
    assert [name.split("|")[1] for name in json.loads((tmp_path / "alone.json").read_text())["records"]] == [
        "h2o:0.5:stage=192:window=32"
    ]
    done = CliRunner().invoke(main, ["bench", *map(str, command[:-2]), "--min-tokens", "5000"])
    assert done.exit_code == 1 and "have at least 5000 tokens, got none of 2" in done.output


def test_a_share_of_the_uncompressed_score_has_an_interval():
    def items(n_right):
        return [{"stock:f16": {"score": 1.0}, "x:1": {"score": float(i < n_right)}} for i in range(100)]

    assert tasks.of_base(items(100), "x:1") == "100% to 100%"
    least, most = (int(word.rstrip("%")) for word in tasks.of_base(items(50), "x:1").split(" to "))
    assert 39 <= least <= 41 and 59 <= most <= 61  # 1.96 standard errors of 5%


def test_runs_of_tasks_together():
    def part(item, score, *more):
        records = {
            f"task|{s}|lcc|{item}": {"score": score * share, "kv_bytes": 2**20, "tokens": 2000}
            for s, share in (("stock:f16", 1), ("x:1", 0.5))
        }
        return {
            "kind": "tasks",
            "asked": {"settings": ["stock:f16", "x:1", *more]},
            "records": records,
            "machine": "m",
            "date": "d",
            "upstream_commit": "0" * 40,
            "command": "c",
        }

    together, *each = report.show([part(0, 1.0, "y:1"), part(1, 0.5)])
    assert "| all items" in together["markdown"] and [
        cell.strip() for cell in together["markdown"].split("| all items")[1].split("|")[1:4]
    ] == ["2", "75.0", "37.5"]
    assert [run["where"] for run in each] == ["m; d; llama.cpp 000000000"] * 2 and together[
        "where"
    ] == "2 runs together"
    assert len(report.show([part(0, 1.0)])) == 1
    base, ours = part(0, 1.0), part(0, 1.0)
    base["asked"]["settings"], ours["asked"]["settings"] = ["stock:f16"], ["x:1"]
    for run in (base, ours):
        run["records"] = {
            name: record for name, record in run["records"].items() if run["asked"]["settings"][0] in name
        }
    assert "50.0%" in report.show([base, ours])[0]["markdown"]  # one run has the uncompressed cache, the other the rest


def test_a_run_on_a_card_is_another_subject():
    asked = {"model": "m", "settings": ["stock:f16"], "threads": 2}
    on_cpu, on_card, before = (
        {"kind": "tasks", "asked": {**asked, **more}} for more in ({"n_gpu_layers": 0}, {"n_gpu_layers": -1}, {})
    )
    assert report.subject(on_cpu) == report.subject(before) != report.subject(on_card)


def test_cards(monkeypatch):
    class NVMLError(Exception):
        pass

    class Memory:
        used = 3 << 20

    nvml = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlInit, nvml.nvmlDeviceGetCount = NVMLError, lambda: None, lambda: 2
    nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetName, nvml.nvmlDeviceGetMemoryInfo = (
        lambda i: i,
        lambda card: f"card {card}",
        lambda card: Memory,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert cards.card_bytes() == 6 << 20 and "CPUs, card 0, card 1, " in machine()

    def fail() -> None:
        raise NVMLError("no driver")

    nvml.nvmlInit = fail
    assert cards.card_bytes() is None and "card" not in machine()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cards.card_bytes() is None


def test_runs_of_chats_together():
    def part(setting, number, got):
        records = {
            f"chat|{setting}|{number}": {"kv_bytes": 2**20, "answers": [{"turn": 1, "want": "Turin", "got": got}]}
        }
        asked = {"model": "m", "n_facts": 1, "first_chat": number, "n_chats": 1, "settings": [setting]}
        return {
            "kind": "chat",
            "asked": asked,
            "records": records,
            "machine": "m",
            "date": "d",
            "upstream_commit": "0" * 40,
            "command": "c",
        }

    runs = [
        part("stock:f16", 0, " Turin"),
        part("stock:f16", 1, " Turin"),
        part("x:1", 0, " Turin"),
        part("x:1", 1, " Rome"),
    ]
    assert len(set(map(report.subject, runs))) == 1
    together = report.show(runs)[0]
    assert together["where"] == "4 runs together"
    assert [cell.strip() for cell in together["markdown"].split("| x:1")[1].split("|")[1:3]] == [
        "1/2",
        "50%",
    ]  # of what the other runs have uncompressed


def test_a_task_stands_in_the_chat_template(smollm2):
    with closing(Llama(smollm2, n_ctx=1024, verbose=False)) as llm:
        items = [
            {"task": task, "prompt": "<|im_end|> " + "x y z " * n}
            for task, n in (("hotpotqa", 400), ("lcc", 400), ("qasper", 9))
        ]
        (short, a), (_, b), (_, c) = tasks.fit(llm, items, 512, whole=False)
        assert short["task"] == "qasper" and [len(b), len(c)] == [512 - 64, 512 - 32]
        text = llm.detokenize(a, special=True).decode()
        assert (
            text.startswith("<|im_start|>system")
            and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
            and "user\n<|im_end|> x y z" in text
        )
        assert (
            a.count(llm.tokenize(b"<|im_end|>", add_bos=False, special=True)[0]) == 2
        )  # a prompt's own words end no message
        assert llm.detokenize(b, special=True).decode().startswith("<|im_end|> x y z")
        assert [len(tokens) for _, tokens in tasks.fit(llm, items, 512, whole=True)] == [len(a)]


def test_tasks_that_are_none(tiny, tmp_path):
    items = tmp_path / "items.jsonl"
    good = {"task": "lcc", "id": 0, "prompt": "x", "gold": "y"}
    for bad, message in (
        (good, "a second lcc of the id 0"),
        ({"id": 1}, "no gold, prompt, task"),
        ([], "no JSON object"),
        ({**good, "task": "riddles"}, "the task 'riddles'"),
        ({**good, "task": []}, "the task []"),
        ({**good, "prompt": ""}, "the prompt ''"),
        ({**good, "prompt": 5}, "the prompt 5"),
        ({**good, "gold": 3}, "the gold 3"),
        ({**good, "gold": [3]}, "the gold [3]"),
        ({**good, "gold": []}, "the gold []"),
        ({**good, "id": "a|b"}, "the id 'a|b'"),
        ({**good, "task": "trec"}, "the gold 'y'"),
        ({**good, "task": "trec", "gold": {"answers": ["y"]}}, "the gold {'answers': ['y']}"),
        ({**good, "gold": {"answers": ["y"], "all_classes": ["y"]}}, "the gold {'answers'"),
    ):
        items.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}")
        with pytest.raises(ArgumentError, match=re.escape(f"got {message}")):
            tasks.read_items(items)
    classes = {"answers": ["y"], "all_classes": ["x", "y"]}
    items.write_text("\n".join(map(json.dumps, (good, {**good, "task": "trec", "gold": classes}))))
    assert [(i["gold"], i["all_classes"]) for i in tasks.read_items(items)] == [(["y"], []), (["y"], ["x", "y"])]
    items.write_text(f"{json.dumps(good)}\n{{")
    done = CliRunner().invoke(main, ["bench", "tasks", tiny("llama"), "--tasks", str(items)])
    assert (
        done.exit_code == 1
        and "line 2: expected a task of" in done.output
        and "no JSON object" in done.output
        and "Traceback" not in done.output
    )


def test_chat(smollm2, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "chat.json"
    text.write_text("The quick brown fox jumps over a lazy dog and runs into the dark wood. " * 60)
    settings = ("semanticache:0.25:equal:stage=192:window=32", "shift:0.25")
    options = (smollm2, "--text", text, "--turns", 6, "--facts", 2, "--n-answer", 40)
    options += ("--chats", 1, "--first-chat", 1, "--n-ctx", 1024)
    output = run_command("chat", *options, *(w for s in settings for w in ("--setting", s)), "--json", out)
    records = json.loads(out.read_text())["records"]
    assert [name.split("|")[1] for name in records] == ["stock:f16", *settings]
    wanted = [(turn, fact[3]) for turn, fact in enumerate(cases.chat_facts(1, 2), 1)]
    for record in records.values():
        assert record["tokens"] > 300 and [(a["turn"], a["want"]) for a in record["answers"]] == wanted
    assert all(chat.has_words(a["got"], a["want"]) for a in records["chat|stock:f16|1"]["answers"])
    assert "turn 2" in output and "2/2" in output
    alone = run_command("chat", *options, "--without-base", "--setting", settings[0])
    assert settings[0] in alone and "stock:f16" not in alone
    assert chat.chat_options("shift:0.25", ModelFile.read(smollm2).shape, 8960)[1] in range(512, 8960 // 4, 256)


def test_recall_by_hand():
    assert chat.has_words(" March 17th.", "17 March") and chat.has_words("Hector Penrose, of course", "Hector Penrose")
    assert (
        not chat.has_words(" Hector.", "Hector Penrose")
        and not chat.has_words(" 117 March", "17 March")
        and not chat.has_words(" 36741", "3674")
    )
    run = {
        "asked": {"n_facts": 2},
        "records": {
            f"chat|{setting}|0": {
                "kv_bytes": n << 20,
                "answers": [
                    {"turn": 1, "want": "Turin", "got": got},
                    {"turn": 2, "want": "17 March", "got": " March 17th"},
                ],
            }
            for setting, n, got in (("stock:f16", 4, " Turin"), ("x:1", 1, " Rome"))
        },
    }
    assert chat.chat_table(run)[1] == [
        ["stock:f16", "2/2", "100%", "1/1", "1/1", "4.0"],
        ["x:1", "1/2", "50%", "0/1", "1/1", "1.0"],
    ]


def test_chat_that_cannot_be(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    for more, message in (
        (("--setting", "shift:much"), "expected shift:RATIO"),
        ((), "text: expected at least"),
        (("--setting", "streaming:0.5:widow=2"), "no option of the name widow"),
    ):
        done = CliRunner().invoke(
            main, ["bench", "chat", tiny("llama"), "--text", str(text), *more, "--setting", "streaming:0.5"]
        )
        assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output


def test_context_shift_moves_the_newer_half_up(tiny, load):
    llm = load(tiny("llama"), n_ctx=256, n_batch=64)
    for start in range(0, 256, 64):
        llm.eval(list(range(start + 10, start + 74)))
    chat.shift_if_full(llm, 10, 16)
    assert llm.n_tokens == 256 - 120
    assert llm.input_ids[: llm.n_tokens].tolist() == [*range(10, 26), *range(10 + 16 + 120, 266)]
    llm.eval([5] * 60)
    assert np.isfinite(last_logits(llm)).all()


def test_memory(tiny, tmp_path):
    out = tmp_path / "memory.json"
    setting = "semanticache:0.25:equal:stage=192:window=32"
    output = run_command(
        "memory",
        tiny("llama"),
        "--n-ctx",
        2048,
        "--setting",
        setting,
        "--fill",
        0.5,
        "--gib",
        1,
        "--threads",
        1,
        "--json",
        out,
    )
    records = json.loads(out.read_text())["records"]
    f16, ours = records["memory|stock:f16|2048"], records[f"memory|{setting}|2048"]
    assert f16["kv_bytes"] == 2 * 2 * 2 * 16 * 2 * 2048  # layers, kv heads, K and V, head size, bytes, cells
    assert (
        ours["kv_bytes"]
        == ours["core_bytes"] + ours["stage_bytes"] + ours["query_bytes"] + ours["meta_bytes"]
        < f16["kv_bytes"]
    )
    assert f16["n_tokens"] == ours["n_tokens"] == 1024 and ours["resident_peak"] >= ours["resident_steady"] > 0
    assert ours["largest"] == f16["largest"] == [4096]  # what the model was trained for
    assert "GiB" in output


def test_report(tiny, wide, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog. " * 90)
    ours = "semanticache:0.25:equal:stage=96:window=12"
    run_command(
        "quality",
        tiny("llama"),
        "--text",
        text,
        "--n-tokens",
        400,
        "--n-tokens",
        500,
        "--cases",
        1,
        "--n-following",
        20,
        "--setting",
        ours,
        "--threads",
        1,
        "--json",
        tmp_path / "q.json",
    )
    run_command(
        "quality",
        tiny("llama"),
        "--text",
        text,
        "--n-tokens",
        400,
        "--n-tokens",
        500,
        "--cases",
        1,
        "--n-following",
        20,
        "--setting",
        "streaming:0.25:stage=96:window=12",
        "--threads",
        1,
        "--json",
        tmp_path / "r.json",
    )
    run_command(
        "speed",
        wide,
        "--text",
        text,
        "--depth",
        50,
        "--n-decode",
        3,
        "--rounds",
        1,
        "--setting",
        ours,
        "--threads",
        1,
        "--json",
        tmp_path / "s.json",
    )
    assert "3 runs" in run_command("report", tmp_path)
    markdown, html = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert ours in markdown and markdown.startswith("# Measurements\n") and "| stock:f16" in markdown
    assert markdown.count("\n## ") == html.count("<h2>") == 2, "two runs of the same cases are one subject"
    plots = sorted((tmp_path / "plots").iterdir())
    assert [p.name for p in plots] == [*(f"q-{i}.svg" for i in range(1, 7)), "s-1.svg", "s-2.svg"]
    assert all(f"(plots/{p.name})" in markdown and p.read_text() in html for p in plots)
    facts = (tmp_path / "plots" / "q-2.svg").read_text()
    assert "semanticache 0.25 equal" in facts and "streaming 0.25" in facts and "llama.cpp f16" in facts
    assert Path(tiny("llama")).name in facts and "pale" not in facts
    assert html.count("<svg") == len(plots) and "http" not in html.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    (tmp_path / "x.json").write_text("{}")
    done = CliRunner().invoke(main, ["bench", "report", str(tmp_path)])
    assert done.exit_code == 1 and "x.json: expected the JSON of a bench run" in done.output
    (tmp_path / "x.json").unlink()
    Run(tmp_path / "x.json", "riddles", {"model": "m"}).record("x", dict)
    done = CliRunner().invoke(main, ["bench", "report", str(tmp_path)])
    assert (
        done.exit_code == 1
        and "x.json: expected a run of bench quality, speed" in done.output
        and "Traceback" not in done.output
    )


def run_of_quality(build, date, recalled, suite="single", heads=()):
    """A run's JSON: a setting x:1 that loses half, and budgets."""
    answers = [{"kind": kind, "depth": depth, "want": ["7"], "got": str(got)} for kind, depth, got in recalled]
    common = {"kv_bytes": 2**20, "prefill_s": 1.0, "pass_s": 0.0}
    lost = {"kl": 0.25, "same_top": 0.5, "log_ppl": 0.0, "heads": heads}
    return {
        "kind": "quality",
        "asked": {"settings": ["stock:f16", "x:1"], "suite": suite},
        "build": build,
        "date": date,
        "records": {
            "text|stock:f16|100|0": {**common, "answers": answers},
            "text|x:1|100|0": {**common, **lost, "answers": answers},
        },
    }


def test_what_a_figure_shows():
    run = run_of_quality(
        "b", "2", [("number", 0.1, 7), ("name", 0.9, 8)], heads=[[0, 0, 10], [0, 1, 10], [2, 0, 30], [2, 1, 9]]
    )
    kl, facts, by_depth, budgets = report.quality_plots([run])
    (bars,) = kl.axes[0].containers
    assert np.allclose(bars.lines[0].get_xydata(), [[1, 0.25]])
    assert [tuple(c.lines[0].get_xydata()[0]) for c in facts.axes[0].containers] == [(1, 0.5), (1, 0.5)]
    assert by_depth.axes[0].images[0].get_array().tolist() == [[1, 0], [1, 0]] and [
        t.get_text() for t in by_depth.axes[0].get_xticklabels()
    ] == ["0.1", "0.9"]
    assert budgets.axes[0].images[0].get_array().tolist() == [[10, 30], [10, 9]] and [
        t.get_text() for t in budgets.axes[0].get_xticklabels()
    ] == ["0", "2"]
    *_, by_kind = report.quality_plots(
        [run_of_quality("b", "2", [("multikey", 0.1, 7), ("tracking", 0.9, 8)], "ruler", [[0, 0, 10], [0, 1, 9]])]
    )
    assert by_kind.axes[0].get_title() == "Facts by kind" and by_kind.axes[0].images[0].get_array().tolist() == [
        [1, 0],
        [1, 0],
    ]


def test_points_of_an_earlier_build_are_pale():
    old, new = (run_of_quality(build, date, [("number", 0.1, 7)]) for build, date in (("a", "1"), ("b", "2")))
    assert report.of_earlier_builds([old, new]) == set()
    new["asked"]["settings"].remove("x:1")
    del new["records"]["text|x:1|100|0"]
    assert report.of_earlier_builds([old, new]) == {"x:1"}
    peer = {"build": "c", "asked": {"settings": ["stock:f16", "kvpress:x:1"]}}
    old["asked"]["settings"], new["asked"]["settings"] = ["stock:f16", "x:1"], ["stock:f16", "semanticache:0.5"]
    assert report.of_earlier_builds([old, new, peer]) == {"x:1"}  # who measures others alone does not make ours old
    figure = report.quality_plots([old, new])[0]
    assert figure.axes[0].texts[0].get_alpha() == 0.45 and "pale" in figure.axes[0].get_xlabel()


def test_speed_has_its_spread():
    def record(prefill, decode):
        return {"prefill_s": prefill, "decode_s": decode, "kv_bytes": 2**20}

    rounds = {"stock:f16": ((4, 4), (4, 6), (4, 8)), "x:1": ((2, 2), (2, 2), (2, 2))}
    run = {
        "asked": {"settings": list(rounds)},
        "records": {f"speed|{s}|50|{i}": record(*times) for s, some in rounds.items() for i, times in enumerate(some)},
    }
    decoding, prefill = report.speed_plots([run])
    assert (
        decoding.axes[0].get_title() == "Decoding by memory, depth 50"
        and prefill.axes[0].get_title() == "Prefill by memory, depth 50"
    )
    bars = decoding.axes[0].containers[1]
    assert np.allclose(bars.lines[0].get_xydata(), [[1, 3]]) and np.allclose(
        bars.lines[2][0].get_segments(), [[[1, 2], [1, 4]]]
    )


def test_a_table_is_as_wide_as_the_terminal(capsys, monkeypatch):
    """What does not fit stands below, under the same rows."""
    monkeypatch.setenv("COLUMNS", "40")
    head = ["cache", *(f"column {i}" for i in range(6))]
    tables.print_table("title", head, [["semanticache:0.25", *(str(i * 111) for i in range(6))]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert sum("semanticache:0.25" in line for line in lines) > 1
    for i in range(6):
        assert sum(f"column {i}" in line for line in lines) == 1 and any(f" {i * 111} " in line for line in lines)
    assert (tables.count(1, "case"), tables.count(2, "case")) == ("1 case", "2 cases")
