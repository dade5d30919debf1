"""`sdct-export generate`. Never imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import print_json, print_table, printable
from .run import _format_adapters, _parse_adapters

if TYPE_CHECKING:
    from ..runtime import Generation, MultiAdapterModel

_LARGEST_FILE = 256 << 20
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OPTIONS = ("max_new_tokens", *_SAMPLING, "seed", "stop", "stop_tokens")
_PROMPTS = ("prompt", "messages", "ids")  # what a line of a file may hold, one of them


@click.command(
    epilog="""\b
Examples:
  sdct-export generate bundle/ "It is hereby agreed" --adapter legal
  sdct-export generate bundle/ "What is a lien?" --chat --adapter legal=0.5+medical=0.5 --temperature 0.7 --seed 1
  sdct-export generate bundle/ one two --adapter legal --adapter none --stop "." --json
  sdct-export generate bundle/ --file prompts.jsonl --max-new-tokens 200 --json"""
)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--file",
    type=click.File("r", encoding="utf-8"),
    help="A prompt a line, or a JSON object a line: prompt, messages or ids, and if need be adapter and options such "
    "as max_new_tokens, temperature, seed, stop. - for standard input, which is also read where no prompt is given.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="NAME, none, or a blend such as a=0.5+b=0.5; once for all prompts or once per prompt. [default: none]",
)
@click.option("--chat", is_flag=True, help="A prompt is what a user says: it goes through the chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: what stands before it as the system's message.")
@click.option("--max-new-tokens", type=int, help="Most tokens of an answer. [default: the base's, else 64]")
@click.option("--temperature", type=float, help="0 for the most probable tokens. [default: as the base says, else 0]")
@click.option("--top-k", type=int, help="Only the so many most probable tokens.")
@click.option("--top-p", type=float, help="Only the most probable tokens, of this probability together.")
@click.option("--min-p", type=float, help="Only tokens this probable, measured by the most probable one.")
@click.option("--repetition-penalty", type=float, help="Above 1 for fewer repetitions.")
@click.option("--seed", type=int, help="For the same answers again; prompt i draws from SEED + i.")
@click.option("--stop", "stops", metavar="TEXT", multiple=True, help="A text that ends an answer; repeat it for more.")
@click.option(
    "--stop-token", "stop_tokens", metavar="ID", type=int, multiple=True, help="A token that ends an answer, in place "
    "of the base's; repeat it for more."
)  # fmt: skip
@click.option("--logprobs", is_flag=True, help="Say how probable the tokens were: the logarithms.")
@click.option("--slots", type=int, help="Most prompts that run side by side. [default: 32]")
@click.option("--max-length", type=int, help="Most tokens of a prompt and its answer; longer ones are refused.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=int, help="Threads within an operator. [default: the runtime's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print texts, tokens and ends as JSON on standard output.")
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    file: Any,
    adapters: tuple[str, ...],
    chat: bool,
    system: str | None,
    stops: tuple[str, ...],
    stop_tokens: tuple[int, ...],
    logprobs: bool,
    slots: int | None,
    max_length: int | None,
    device: str,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Go on from prompts with a language model that was exported with its cache.

    One prompt on a terminal is answered while you watch; else answers come when all are there.
    """
    if prompts and file is not None:
        raise click.UsageError("give prompts or --file, not both")
    if system is not None and not chat:
        raise click.UsageError("--system is for --chat")
    if not prompts and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("give a prompt, --file, or prompts on standard input")
        file = click.open_file("-", encoding="utf-8")
    rows = [_parse_adapters(item) for item in adapters]
    from ..bundle.description import Bundle
    from ..errors import ConfigError
    from ..runtime import MultiAdapterModel

    described = Bundle.load(bundle)
    merged = described.kind == "merged"
    lines = [{"prompt": prompt} for prompt in prompts] if file is None else _read_lines(file)
    if not lines:
        raise ConfigError("there is no prompt; give one, or a file with one a line")
    if len(rows) not in (0, 1, len(lines)):
        raise ConfigError(
            f"there are {len(rows)} --adapter for {len(lines)} prompts; give one for all, or one for each"
        )
    rows = rows * len(lines) if len(rows) == 1 else rows or [None] * len(lines)
    rows = [_adapters_of(line, row, i) for i, (line, row) in enumerate(zip(lines, rows, strict=True))]
    if merged and (adapters or any("adapter" in line for line in lines)):
        raise ConfigError(f"{bundle} is merged: its adapter is part of the weights, so leave --adapter out")
    for name in {name for row in rows for name in row or {}} - set(described.adapters):
        known = ", ".join(sorted(described.adapters)) or "none"
        raise ConfigError(f"{bundle} has no adapter {name!r}; it has {known} (a blend is a=0.5+b=0.5)")

    given: dict[str, Any] = {**sampling, "stop": list(stops) or None, "stop_tokens": list(stop_tokens) or None}
    if (seed := given["seed"]) is not None:
        given["seed"] = [seed + i for i in range(len(lines))]
    options: dict[str, Any] = {
        name: [
            line.get(name, given[name][i] if name == "seed" and seed is not None else given[name])
            for i, line in enumerate(lines)
        ]
        for name in _OPTIONS
    }
    # a list of texts, or of ids, would mean every row
    options["stop"] = [[own] if isinstance(own, str) else own for own in options["stop"]]
    options["stop_tokens"] = [own if own is None or isinstance(own, list) else [own] for own in options["stop_tokens"]]
    options |= {"logprobs": logprobs, "max_length": max_length, "slots": slots}
    asked = [_prompt(line, chat, system) for line in lines]
    model = MultiAdapterModel(described, device=device, max_batch=None, threads=threads)
    shown = sys.stdout is not None and sys.stdout.isatty() and len(lines) == 1 and not as_json and not logprobs
    found = _watched(model, asked, rows, options, shown)
    if shown:
        return
    names = ["merged" if merged else _format_adapters(row) for row in rows]
    if as_json:
        told: list[dict[str, object]] = [
            {"adapter": name, "text": one.text, "finish": one.finish, "tokens": list(one.tokens)}
            | ({"logprobs": list(one.logprobs or ())} if logprobs else {})
            for name, one in zip(names, found, strict=True)
        ]
        print_json({"rows": told})
    elif len(found) == 1 and not logprobs and found[0].text is not None:
        click.echo(found[0].text)
        _say_where_cut(found[0].finish, len(found[0].tokens))
    else:
        columns = ["row", "adapter", "tokens", "end", *(["logprob"] if logprobs else []), "text"]
        table = [
            (
                i,
                name,
                len(one.tokens),
                one.finish,
                *([f"{sum(one.logprobs or ()):.4f}"] if logprobs else []),
                _text(one),
            )
            for i, (name, one) in enumerate(zip(names, found, strict=True))
        ]
        print_table(columns, table, right=range(2, 3))


def _say_where_cut(finish: str | None, count: int) -> None:
    """On a terminal: that a text goes on, which nobody can see in it."""
    if finish == "length" and sys.stderr is not None and sys.stderr.isatty():
        click.echo(f"(cut after {count} tokens; --max-new-tokens for more)", err=True)


def _watched(
    model: MultiAdapterModel, prompts: Sequence[Any], rows: Sequence[Any], options: Mapping[str, Any], shown: bool
) -> list[Generation]:
    """The answers; on a terminal with their text as it comes, or with how far they are."""
    watching = bool(sys.stderr and sys.stderr.isatty()) and len(prompts) > 1
    adapters = None if model.bundle.kind == "merged" else rows
    if not shown and not watching:
        return model.generate(prompts, adapters, **options)
    from ..runtime.decoding import collect

    stream = model.stream(prompts, adapters, **options)
    if shown:
        bare, count, finish = False, 0, None  # bare: a bundle without a tokenizer
        for event in stream:
            count, finish = count + (event.token is not None), event.finish
            bare = event.text is None
            text = f"{event.token} " if bare and event.token is not None else event.text or ""
            click.echo(_visible(text), nl=False)
        click.echo()
        _say_where_cut(finish, count)
        return []
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]} tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(prompts), tokens=0)
        seen = []
        for event in stream:
            seen.append(event)
            progress.update(task, advance=event.finish is not None, tokens=len(seen))
    return collect(seen, len(prompts), logprobs=options["logprobs"])


def _prompt(line: Mapping[str, Any], chat: bool, system: str | None) -> Any:
    (name,) = line.keys() & set(_PROMPTS)
    if name != "prompt" or not chat:
        return line[name]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": line["prompt"]}]


def _read_lines(file: Any) -> list[dict[str, Any]]:
    """The lines of a file that say something, as objects."""
    from ..errors import ConfigError

    lines: list[dict[str, Any]] = []
    name = getattr(file, "name", "standard input")
    try:
        text = file.read(_LARGEST_FILE + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 ({error}); write it in UTF-8") from error
    if len(text) > _LARGEST_FILE:
        raise ConfigError(f"{name} has more than {_LARGEST_FILE} characters; split it")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            lines.append({"prompt": line})
            continue
        try:
            read = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{name}, line {number} is not valid JSON ({error}); a prompt that begins with a brace is written "
                '{"prompt": "..."}'
            ) from error
        lines.append(_checked(read, f"{name}, line {number}"))
    return lines


def _checked(line: dict[str, Any], where: str) -> dict[str, Any]:
    from ..errors import ConfigError

    known = (*_PROMPTS, "adapter", *_OPTIONS)
    for field in line:
        if field not in known:
            raise ConfigError(f"{where}: unknown field {field!r}; there are {', '.join(known)}")
    if len(line.keys() & set(_PROMPTS)) != 1:
        raise ConfigError(f"{where} must have one of {', '.join(_PROMPTS)}")
    for field, kind, what in (("prompt", str, "a text"), ("messages", list, "a list"), ("ids", list, "a list")):
        if not isinstance(line.get(field, kind()), kind):
            raise ConfigError(f"{where}: {field} must be {what}, got {line[field]!r}")
    if isinstance(line.get("messages"), list) and not all(isinstance(one, dict) for one in line["messages"]):
        raise ConfigError(f"{where}: messages must be a list of objects with a role and a content")
    try:
        _check_values(line)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return line


def _check_values(line: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where an option of a line has no such value, whatever the model; null says nothing."""
    from ..runtime.generation import Sampling, check_count, check_ids, check_seed, check_stops
    from ..runtime.text import check_stop_strings

    given = {name: value for name, value in line.items() if value is not None}
    if "ids" in given:
        check_ids(given["ids"], "ids")
    Sampling(**{name: given[name] for name in _SAMPLING if name in given})
    check_seed(given.get("seed"))
    check_count(given.get("max_new_tokens", 1))
    stops, ends = given.get("stop"), given.get("stop_tokens", [])
    check_stop_strings(stops if stops is None or isinstance(stops, str) else [stops], 1)
    check_stops(ends if isinstance(ends, list) else [ends])


def _adapters_of(line: Mapping[str, Any], row: dict[str, float] | None, number: int) -> dict[str, float] | None:
    """What a line says of its adapters, else what was said for it on the command line."""
    from ..errors import ConfigError

    if "adapter" not in line:
        return row
    told = line["adapter"]
    if told is None or isinstance(told, dict):
        return told
    if not isinstance(told, str):
        raise ConfigError(f"prompt {number}: adapter must be a name, null, or names with scales; got {told!r}")
    try:
        return _parse_adapters(told)
    except click.BadParameter as error:
        raise ConfigError(f"prompt {number}: {error.message}") from error


def _text(one: Generation) -> str:
    return " ".join(map(str, one.tokens)) if one.text is None else one.text


def _visible(text: str) -> str:
    """`text` of a model, safe to show: of what controls a terminal only ends of lines and tabs."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)
