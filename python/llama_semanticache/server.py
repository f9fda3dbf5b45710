"""llama-cpp-python's OpenAI-compatible server with a model of ours: needs the extra "server"."""

from __future__ import annotations

import importlib.util
import json
import socket
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, LibraryError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .llama import Llama

_NEEDED = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings", "yaml")


def check_installed() -> None:
    """Raises LibraryError if packages of the extra are missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LibraryError(
            f"a server: expected the packages of the extra, got none of {', '.join(missing)}; run "
            "pip install 'llama-semanticache[server]'"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, which nobody else gets while a model is loaded. Raises ArgumentError."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ArgumentError(
            f"--host {host} --port {port}: expected a free address of this machine, got: {error}; choose another port"
        ) from error
    return bound


class _NewerNames:
    """Middleware for what upstream's server does not know: `max_completion_tokens`, which it would ignore (the answer
    would go on until the context is full), and `json_schema`, the present form of a schema, which it would refuse.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            await self.app(scope, receive, send)
            return
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        waiting = [{"type": "http.request", "body": _renamed(body), "more_body": False}]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)


def _renamed(body: bytes) -> bytes:
    try:
        request = json.loads(body)
    except ValueError:
        return body  # upstream says what is wrong with it
    if not isinstance(request, dict):
        return body
    if (n := request.pop("max_completion_tokens", None)) is not None:
        request.setdefault("max_tokens", n)
    form = request.get("response_format")
    if isinstance(form, dict) and form.get("type") == "json_schema" and isinstance(form.get("json_schema"), dict):
        request["response_format"] = {"type": "json_object", "schema": form["json_schema"].get("schema", {})}
    return json.dumps(request).encode()


def create_app(llm: Llama, alias: str, api_key: str | None = None, interrupt: bool = False) -> FastAPI:
    """The app that serves one loaded model.

    Parameters
    ----------
    llm : Llama
        Compressed or not; the app closes it with its last request.
    alias : str
        Name of the model for clients.
    api_key : str, optional
        What clients have to send as a bearer token.
    interrupt : bool
        Whether a request ends the answer that is being streamed to another one. Otherwise it waits.

    Raises
    ------
    LibraryError
        Packages are missing.
    """
    check_installed()
    from llama_cpp.server import app as upstream
    from llama_cpp.server.model import LlamaProxy
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    class Loaded(LlamaProxy):
        """Upstream's holder of models, with one that is there already."""

        @staticmethod
        def load_llama_from_model_settings(_settings: ModelSettings) -> Llama:
            return llm

    settings = ServerSettings(api_key=api_key, interrupt_requests=interrupt)
    before = upstream.LlamaProxy  # create_app() makes its proxy of whatever has that name
    upstream.LlamaProxy = Loaded  # type: ignore[misc]
    try:
        app = upstream.create_app(
            server_settings=settings, model_settings=[ModelSettings(model=llm.model_path, model_alias=alias)]
        )
    finally:
        upstream.LlamaProxy = before  # type: ignore[misc]
    app.add_middleware(_NewerNames)
    return app
