"""llama-semanticache serve, as the clients of others see it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import langchain_openai
import openai
import pytest

from conftest import SMALL

KEY = "a-key"
SIZES = ("n_ctx", "kv_ratio", "kv_stage", "kv_window")
ARGUMENTS = [word for name in SIZES for word in (f"--{name.replace('_', '-')}", str(SMALL[name]))]
LONG = "Ada went to the harbour. " * 30  # 750 tokens of a tiny model, several passes


@contextmanager
def serving(model: str, *words: str) -> Iterator[str]:
    """Address of a server of its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_semanticache", "serve", model, "--port", str(port), "--kv-profile", "none"]
    server = subprocess.Popen(
        [*command, "--threads", "1", *ARGUMENTS, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    address = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.fail(server.communicate()[0])
            try:
                request = urllib.request.Request(f"{address}/models", headers={"Authorization": f"Bearer {KEY}"})
                urllib.request.urlopen(request, timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def address(tiny) -> Iterator[str]:
    with serving(tiny("llama"), "--api-key", KEY, "--alias", "tiny") as address:
        yield address


@pytest.fixture
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)


def test_an_answer_and_its_stream_are_the_same(client):
    ask = dict(model="tiny", messages=[{"role": "user", "content": LONG}], max_tokens=12, temperature=0)
    answer = client.chat.completions.create(**ask)
    assert answer.usage.prompt_tokens > 700 and answer.usage.completion_tokens == 12
    text = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True))
    assert text == answer.choices[0].message.content != ""
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_wrong_key_is_refused(address):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="another", max_retries=0).completions.create(model="tiny", prompt="a")


def test_a_prompt_that_is_too_long_is_an_error_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"1024 tokens, however you requested \d{4} tokens") as error:
        client.completions.create(model="tiny", prompt=LONG * 3, max_tokens=4)
    assert error.value.status_code == 400
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2


SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["here", "there"]}, "open": {"type": "boolean"}},
    "required": ["place", "open"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "where", "schema": SCHEMA, "strict": True}},
    ],
    ids=["json_object", "json_schema"],
)
def test_an_answer_of_a_schema(client, form):
    ask = dict(model="tiny", messages=[{"role": "user", "content": LONG}], temperature=0, response_format=form)
    answer = client.chat.completions.create(**ask)
    got = json.loads(answer.choices[0].message.content)
    assert got["place"] in ("here", "there") and got["open"] in (True, False) and len(got) == 2
    streamed = client.chat.completions.create(**ask, stream=True)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in streamed)) == got


TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}


def test_tools(tiny):
    """As docs/command-line.md says, with a chat format for tools; a random model calls one only where it must."""
    with serving(tiny("llama"), "--chat-format", "chatml-function-calling") as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        ask = dict(
            model="tiny",
            messages=[{"role": "user", "content": "Is it open?"}],
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "look"}},
            temperature=0,
        )
        (call,) = client.chat.completions.create(**ask).choices[0].message.tool_calls
        assert call.function.name == "look" and set(json.loads(call.function.arguments)) == {"place", "open"}
        deltas = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
        text = "".join(d.tool_calls[0].function.arguments or "" for d in deltas if d.tool_calls)
        assert json.loads(text) == json.loads(call.function.arguments)
        model = langchain_openai.ChatOpenAI(base_url=address, api_key="none", model="tiny", temperature=0)
        (chained,) = model.bind_tools([TOOL], tool_choice="look").invoke("Is it open?").tool_calls
        assert chained["name"] == "look" and set(chained["args"]) == {"place", "open"}


def test_langchain_gives_an_answer_of_a_schema(address):
    model = langchain_openai.ChatOpenAI(base_url=address, api_key=KEY, model="tiny", temperature=0)
    answer = model.with_structured_output({"title": "where", **SCHEMA}, method="json_schema").invoke(LONG)
    assert answer["place"] in ("here", "there") and answer["open"] in (True, False)


def test_a_client_that_goes_away_leaves_the_server_to_the_next(client):
    stream = client.completions.create(model="tiny", prompt=LONG, max_tokens=250, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    after = client.completions.create(model="tiny", prompt="Ada went", max_tokens=8, temperature=0)
    again = client.completions.create(model="tiny", prompt="Ada went", max_tokens=8, temperature=0)
    assert after.choices[0].text == again.choices[0].text and after.usage.completion_tokens == 8


def test_requests_at_the_same_time_wait_for_each_other(client):
    ask = dict(model="tiny", max_tokens=8, temperature=0)
    # nothing in common at their beginning, which would be there from another one, compressed or not
    prompts = ["Ada went", "Boris saw the bridge", f"Clara: {LONG}"]
    alone = [client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts]
    together: list[str | None] = [None] * len(prompts)

    def request(i: int) -> None:
        together[i] = client.completions.create(prompt=prompts[i], **ask).choices[0].text

    threads = [threading.Thread(target=request, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_langchain(address):
    model = langchain_openai.ChatOpenAI(base_url=address, api_key=KEY, model="tiny", temperature=0, max_tokens=8)
    answer = model.invoke("Ada went")
    assert answer.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in model.stream("Ada went")) == answer.content


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'fastapi' else find(name, *more)\n"
        "from llama_semanticache.cli import main\n"
        "main(['serve', 'smollm2-135m'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "none of fastapi; run pip install 'llama-semanticache[server]'" in done.stderr.replace("\n", " ")


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["serve", str(tmp_path / "no-model.gguf"), "--port", str(port)]
        done = subprocess.run([sys.executable, "-m", "llama_semanticache", *words], capture_output=True, text=True)
    assert done.returncode == 1 and f"--port {port}: expected a free address" in done.stderr


def test_the_server_listens_to_this_machine_alone(address):
    """127.0.0.1 unless told otherwise: another address of the machine is refused."""
    port = int(Path(address).parts[1].rsplit(":", 1)[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        try:
            outside.connect(("192.0.2.1", 9))  # nothing is sent: it tells which address would send
        except OSError:
            pytest.skip("this machine has no network")
        host = outside.getsockname()[0]
    if host.startswith("127."):
        pytest.skip("this machine has no other address")
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(2)
        other.connect((host, port))
