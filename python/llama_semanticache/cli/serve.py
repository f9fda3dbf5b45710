"""llama-semanticache serve: an OpenAI-compatible server."""

from __future__ import annotations

import click

from .common import LoadOptions, kv_line, llama_options, load_llama, model_argument, note


@click.command()
@model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: any that is free."
)
@click.option("--api-key", envvar="LLAMA_SEMANTICACHE_API_KEY", show_envvar=True, help="What clients have to send.")
@click.option("--alias", help="Name of the model for clients.  [default: MODEL's own]")
@click.option(
    "--interrupt", is_flag=True, help="A request ends the answer that is streamed to another one; else it waits."
)
@click.option("--chat-format", help="Chat format of llama-cpp-python instead of the model's, as for tools.")
@llama_options
def serve(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    alias: str | None,
    interrupt: bool,
    chat_format: str | None,
    load: LoadOptions,
) -> None:
    """Serve MODEL to clients of the OpenAI API.

        llama-semanticache serve smollm2-135m --n-ctx 8192

    Clients find it at http://HOST:PORT/v1. One request is answered at a time; the others wait. Needs the extra
    "server".
    """
    from .. import server

    # before a model is loaded
    server.check_installed()
    bound = server.bind(host, port)
    llm, model_file = load_llama(model, load, chat_format=chat_format)
    import uvicorn

    app = server.create_app(llm, alias or model_file.name, api_key, interrupt)
    note(kv_line(llm.kv_stats(), None), style="dim")
    note(f"http://{host}:{bound.getsockname()[1]}/v1" + ("" if api_key else " (no API key)"))
    config = uvicorn.Config(app, host=host, port=port, log_level="info" if load.verbose else "warning")
    uvicorn.Server(config).run([bound])
