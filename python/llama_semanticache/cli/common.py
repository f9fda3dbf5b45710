"""What the commands share: options, loading, error reports, the line about the KV cache."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import AUTO, METHODS, OURS, ROW_TYPES, STAGE_TYPES, KVConfig
from ..errors import ArgumentError, SemanticCacheError
from ..models import open_model

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..llama import KVStats, Llama
    from ..model_file import ModelFile

DEFAULT_N_CTX = 8192
_VERBOSE = "llama_semanticache.verbose"


class ErrorGroup(click.Group):
    """Reports an error of ours, llama_cpp's or the system's as 'Error: ...' with exit status 1, with a traceback only
    under --verbose, and warnings as 'Warning: ...'. What is a command of a group in this one is answered with its
    whole name.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        for name, inner in self.commands.items() if args[0] not in self.commands else ():
            if isinstance(inner, click.Group) and args[0] in inner.list_commands(ctx):
                raise click.UsageError(f"No such command {args[0]!r}. Did you mean '{name} {args[0]}'?", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = lambda message, *_, **__: note(f"Warning: {message}", "yellow")
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.exceptions.Abort, BrokenPipeError):
            raise  # click's own business
        except (SemanticCacheError, OSError, RuntimeError, ValueError) as error:
            if ctx.meta.get(_VERBOSE):
                raise
            where = (
                ""
                if isinstance(error, SemanticCacheError)
                else f" ({type(error).__name__}; run again with --verbose to see more)"
            )
            raise click.ClickException(f"{in_options(str(error))}{where}") from error


@dataclass(frozen=True)
class LoadOptions:
    """Options of every command that loads a model; see `llama_options`."""

    n_ctx: int | None
    kv_compress: str | None
    kv_ratio: float | None
    kv_stage: int
    kv_window: int
    kv_sink: int
    kv_type_k: str
    kv_type_v: str
    kv_type_stage: str
    kv_profile: str | None
    kv_budget: str | None
    n_gpu_layers: int
    threads: int | None
    verbose: bool

    def kv_settings(self) -> dict[str, Any]:
        """Arguments of `Llama` that make its cache what it is."""
        if self.kv_compress is None:
            return {"kv_compress": None}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name.startswith("kv_")}


@dataclass(frozen=True)
class SamplingOptions:
    """Options of every command that generates text; see `sampling_options`."""

    max_tokens: int | None
    temp: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    stop: tuple[str, ...]
    seed: int | None

    def arguments(self) -> dict[str, Any]:
        """Arguments of create_completion and create_chat_completion."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temp,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "stop": list(self.stop),
            "seed": self.seed,
        }

    def changed(self, name: str, text: str) -> SamplingOptions:
        """With one option as `text` says, as it would be on the command line; its default if `text` is empty.

        Raises
        ------
        ArgumentError
            No option has this name, or the text is no value of it.
        """
        field = sampling_field(name)
        kind, default, _ = _SAMPLE[field]
        try:
            value: Any = kind.convert(text, None, None) if text else default
        except click.BadParameter as error:
            raise ArgumentError(f"{name}: {error.message}") from error
        change: dict[str, Any] = {field: (value,) if field == "stop" and text else value}
        return replace(self, **change)


def sampling_field(name: str) -> str:
    """Field of SamplingOptions that a user calls so. Raises ArgumentError."""
    field = name.removeprefix("--").replace("-", "_")
    field = "temp" if field == "temperature" else field  # llama_cpp's own name
    if field not in _SAMPLE:
        raise ArgumentError(f"expected one of {', '.join(n.replace('_', '-') for n in _SAMPLE)}, got {name!r}")
    return field


def in_options(text: str) -> str:
    """A message with arguments of `Llama`, as options of the command line: "n_ctx", kv_profile=None."""

    def option(match: re.Match[str]) -> str:
        value = match["value"]
        return f"--{match['name'].replace('_', '-')}" + (f" {value.strip(chr(34)).lower()}" if value else "")

    names = "|".join(field.name for field in fields(LoadOptions) if "_" in field.name)
    return re.sub(rf'(?<![\w-])(?P<name>{names})\b(?:=(?P<value>"?[\w.]+"?))?', option, text)


def _set_verbose(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    ctx.meta[_VERBOSE] = value
    return value


def _none_if(word: str) -> Callable[[click.Context, click.Parameter, str], str | None]:
    return lambda _ctx, _param, value: None if value == word else value


def _check_profile(_ctx: click.Context, _param: click.Parameter, value: str) -> str | None:
    if value == "none":
        return None
    if value != "auto" and not Path(value).expanduser().is_file():
        raise click.BadParameter(f"expected 'auto', 'none' or the path of a profile, got {value!r}")
    return value if value == "auto" else str(Path(value).expanduser())


traceback_option = click.option(
    "--verbose", is_flag=True, expose_value=False, callback=_set_verbose, help="Show a traceback if something fails."
)


class _Model(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A model; the shell completes its name, or the path of a file."""

    name = "model"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from .. import hub
        from ..models import manifest

        names = [*manifest(), *(str(file.name) for file in hub.fetched())]
        files = CompletionItem(incomplete, type="file")  # first: it makes the shell forget what came before
        return [files, *(CompletionItem(name) for name in names if name.startswith(incomplete))]


model_argument = click.argument("model", type=_Model())

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_HELP = {
    "kv_ratio": "Rows kept, as a share of the context.  [default: 0.25, or 1 for models of few heads]",
    "kv_stage": "Newest tokens that are held one by one until the next pass.",
    "kv_window": "Newest tokens that a pass leaves alone.",
    "kv_sink": "First tokens, which are never merged or dropped.",
    "kv_type_k": "How K of the older tokens is stored; auto: iq4_nl where heads allow it.",
    "kv_type_v": "How V of the older tokens is stored; auto: iq4_nl where heads allow it.",
    "kv_type_stage": "How the newest tokens are stored; auto: q8_0 where heads allow it.",
}
_TYPES = {
    "kv_ratio": click.FloatRange(0, 1, min_open=True),
    "kv_stage": click.IntRange(min=1),
    "kv_window": click.IntRange(min=1),
    "kv_sink": click.IntRange(min=0),
    "kv_type_k": click.Choice(ROW_TYPES),
    "kv_type_v": click.Choice(ROW_TYPES),
    "kv_type_stage": click.Choice(STAGE_TYPES),
}


def _kv_option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    option = f"--{name.replace('_', '-')}"
    return click.option(option, type=_TYPES[name], default=getattr(KVConfig, name), show_default=True, help=_HELP[name])


_SIZES = [_kv_option(name) for name in _HELP]


def kv_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options that say how large a compressed cache is."""
    for option in reversed(_SIZES):
        function = option(function)
    return function


_LOAD: tuple[Callable[..., Any], ...] = (
    click.option(
        "--n-ctx",
        type=click.IntRange(min=1),
        help=f"Context size, tokens.  [default: what the model was trained for, at most {DEFAULT_N_CTX}]",
    ),
    click.option(
        "--kv-compress",
        type=click.Choice([*METHODS, AUTO, "none"]),
        default=OURS,
        show_default=True,
        callback=_none_if("none"),
        help=f"How the KV cache is compressed; {AUTO}: by {OURS} where the model allows it.",
    ),
    *_SIZES,
    click.option(
        "--kv-profile",
        default=KVConfig.kv_profile,
        show_default=True,
        metavar="auto|none|FILE",
        callback=_check_profile,
        help="Budget of each head: measured once per model, equal, or from a file.",
    ),
    click.option(
        "--kv-budget",
        default=KVConfig.kv_budget,
        metavar="SIZE",
        help="Bytes of the whole KV cache, as in 512MiB, instead of --kv-ratio.",
    ),
    click.option(
        "--n-gpu-layers",
        type=click.IntRange(min=-1),
        default=0,
        show_default=True,
        help="Layers that lie on a card, weights and cache, -1: all.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: llama.cpp's choice]"),
    click.option(
        "--verbose",
        is_flag=True,
        callback=_set_verbose,
        help="Show llama.cpp's log, and a traceback if something fails.",
    ),
)

# Type, default, help. The defaults are llama_cpp's.
_SAMPLE: dict[str, tuple[click.ParamType[Any], Any, str]] = {
    "max_tokens": (click.IntRange(min=1), None, "Longest answer, tokens.  [default: until the context is full]"),
    "temp": (click.FloatRange(min=0), 0.2, "Temperature; 0 takes the likeliest token."),
    "top_p": (click.FloatRange(0, 1), 0.95, "Choose among the likeliest tokens that make up this probability."),
    "top_k": (click.IntRange(min=0), 40, "Choose among so many of the likeliest tokens; 0: all."),
    "min_p": (click.FloatRange(0, 1), 0.05, "Leave out tokens less likely than this share of the likeliest."),
    "repeat_penalty": (click.FloatRange(min=0, min_open=True), 1.0, "Above 1: tokens that were there are less likely."),
    "stop": (click.STRING, (), "Text at which an answer ends; repeatable."),
    "seed": (click.IntRange(0, 2**32 - 1), None, "Makes an answer repeatable.  [default: random]"),
}
_SAMPLING = tuple(
    click.option(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=default,
        multiple=name == "stop",
        show_default=default not in (None, ()),
        help=text,
    )
    for name, (kind, default, text) in _SAMPLE.items()
)


def _group_options(
    options: Iterable[Callable[..., Any]], kind: type[LoadOptions] | type[SamplingOptions], argument: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that adds `options` to a command and hands their values over as one `argument` of type `kind`."""
    names = [field.name for field in fields(kind)]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(**values: Any) -> Any:
            values[argument] = kind(**{name: values.pop(name) for name in names})
            return function(**values)

        for option in reversed(list(options)):
            wrapper = option(wrapper)
        return wrapper

    return decorate


llama_options = _group_options(_LOAD, LoadOptions, "load")
sampling_options = _group_options(_SAMPLING, SamplingOptions, "sampling")


def note(text: str, style: str = "") -> None:
    """Write a line for the reader, not for a pipe: to stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style=style)


def load_llama(model: str, load: LoadOptions, **more: Any) -> tuple[Llama, ModelFile]:
    """Load MODEL with the options of the command line, and more arguments of `Llama`.

    Raises
    ------
    SemanticCacheError, ValueError, RuntimeError
        See `Llama`.
    """
    model_file = open_model(model)
    n_ctx = load.n_ctx
    if n_ctx is None:
        n_ctx = min(DEFAULT_N_CTX, model_file.shape.n_ctx_train or DEFAULT_N_CTX)

    from .. import Llama, profile
    from ..memory import within_budget

    options: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_gpu_layers": load.n_gpu_layers,
        "n_threads": load.threads,
        "n_threads_batch": load.threads,
        "verbose": load.verbose,
        **more,
    }
    n_ctx_train = model_file.shape.n_ctx_train
    if n_ctx_train and n_ctx > n_ctx_train:
        note(f"Warning: {model_file.name} was trained for {n_ctx_train:,} tokens, --n-ctx is {n_ctx:,}", "yellow")
    # Llama does this too, but silently unless llama.cpp's log is wanted
    config = KVConfig(**load.kv_settings())
    if config.kv_compress == AUTO:
        return Llama(model_file, **{**options, "verbose": load.verbose or None}, **load.kv_settings()), model_file
    if config.kv_compress is not None and not model_file.shape.refused:
        config.check()
        config.check_n_ctx(n_ctx)
        config = within_budget(config, model_file.shape, n_ctx, on_card=load.n_gpu_layers != 0)
    profile.ensure(model_file, verbose=True, n_threads=load.threads, config=config)
    return Llama(model_file, **options, **load.kv_settings()), model_file


def kv_line(stats: KVStats, tokens_per_s: float | None) -> str:
    """One line about the cache: tokens seen, rows, size, gain, speed."""
    parts = [f"{stats.n_tokens:,} tokens seen"]
    if stats.kv_compress is None:
        parts += [
            f"uncompressed: {stats.why_uncompressed}" if stats.why_uncompressed else "uncompressed",
            f"KV {stats.total_bytes / 2**20:.1f} MiB",
        ]
    else:
        used, allocated = (n / stats.n_head_kv for n in (stats.rows_used, stats.rows_allocated))
        parts.append(f"{used:,.0f} of {allocated:,.0f} rows per head")
        size = f"KV {stats.total_bytes / 2**20:.1f} MiB"
        if stats.rows_used:
            parts.append(f"{size}, {stats.compression_factor:.1f}x smaller than f16")
        else:
            parts += [size, "nothing compressed yet"]
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:.1f} tokens/s")
    return " | ".join(parts)


def stats_dict(stats: KVStats) -> dict[str, Any]:
    """All fields and properties of the statistics, for JSON and tables."""
    from dataclasses import asdict

    return {**asdict(stats), "total_bytes": stats.total_bytes, "compression_factor": stats.compression_factor}
