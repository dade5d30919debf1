"""Chats as texts, by the template that comes with the bundle's tokenizer. Never imports torch or transformers.

A template is a stranger's program in the language of Jinja. It runs in Jinja's sandbox, as transformers runs it, with
nothing in reach but the messages; its size, its steps, its time and what it puts together are bounded.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.description import Bundle
from ..errors import AdapterFormatError, ConfigError
from ..files import read_input, read_json

Message = Mapping[str, Any]

_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_LARGEST_TEMPLATE = 1 << 20
_LARGEST_JSON = 16 << 20
_LARGEST_CHAT = 1 << 24  # characters
_STEPS = 1 << 21  # turns of loops, calls, and kilobytes put together
_SECONDS = 5.0  # of this thread's processor time, for steps that take long, looked at in every step
_CALL = 8  # of them for a call, which takes so much longer than a turn
_MOST_BITS = 1 << 12  # of an integer
_AGAIN = "mend the file, or export the bundle again"
# the tokens that a tokenizer of transformers has names for
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
# classes of transformers that take these from the files alone; others have some of their own
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_WIDE = re.compile(r"\d{5}|\*")  # in a format, what pads or asks for it
# steps that a template may still take, and the processor time at which it must have ended
_left: contextvars.ContextVar[list[float]] = contextvars.ContextVar("left")


class ChatTemplate:
    """How a bundle's tokenizer writes a chat: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.

    Rendering is that of transformers' `apply_chat_template(messages, add_generation_prompt=True)`.

    Args:
        bundle: whose files these are.

    Raises:
        ConfigError: the bundle has no chat template, or none that is called `default`; or the template uses a special
            token that no file names.
        AdapterFormatError: a file is damaged, or the template is none.
    """

    def __init__(self, bundle: Bundle) -> None:
        from jinja2 import meta

        settings = _read(bundle.path / _CONFIG)
        source, file = _source(bundle, settings)
        self._file = file
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            used = meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # of Jinja, or of Python about what Jinja makes of it
            raise AdapterFormatError(f"{file} is no chat template ({_reason(error)}); {_AGAIN}") from error
        self._tokens = _tokens(bundle, settings)
        if settings.get("tokenizer_class") not in _PLAIN_CLASSES:
            unknown = sorted(used.intersection(_TOKENS) - self._tokens.keys())
            if unknown:
                raise ConfigError(
                    f"{file} uses {unknown[0]}, which {bundle.path / _CONFIG} does not give; write it there, or null "
                    "where the model has none"
                )

    def render(self, messages: Sequence[Message]) -> str:
        """The text of `messages` (each with a `role` and a `content`), up to where the model goes on.

        It is to be encoded without special tokens, which it has already.

        Raises:
            ConfigError: these are no messages, or the template refuses them.
            AdapterFormatError: the template does not end within its bounds.
        """
        chat = check_messages(messages)
        token = _left.set([_STEPS, time.thread_time() + _SECONDS])
        tokens = {name: value for name, value in self._tokens.items() if value is not None}
        given = {**tokens, "messages": chat, "tools": None, "documents": None, "add_generation_prompt": True}
        parts, size = [], 0
        try:
            for part in self._template.generate(given):
                parts.append(part)
                size += len(part)
                if size > _LARGEST_CHAT:
                    raise _TooMuch(f"it writes more than {_LARGEST_CHAT} characters")
        except _TooMuch as error:
            raise AdapterFormatError(f"{self._file} does not end: {error}; {_AGAIN}") from error
        except _Refusal as error:
            raise ConfigError(f"the chat template of this model refuses these messages: {error}") from error
        except Exception as error:  # of Jinja, or of Python's operators on values of the wrong type
            raise AdapterFormatError(f"{self._file} fails on these messages ({_reason(error)}); {_AGAIN}") from error
        finally:
            _left.reset(token)
        return "".join(parts)


def is_chat(prompt: object) -> bool:
    """Whether a prompt is meant as messages, be they right or not."""
    return isinstance(prompt, Sequence) and any(isinstance(message, Mapping) for message in prompt)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """`messages` as plain data, without fields that are None. Raises `ConfigError` where they are none."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("a chat must be a list of messages, at least one")
    for i, message in enumerate(messages):
        good = isinstance(message, Mapping) and isinstance(message.get("role"), str) and message["role"]
        if not good or not isinstance(message.get("content", ""), str | list | None):
            raise ConfigError(
                f"message {i} must be an object with a role and a content, both text; got {str(message)[:200]!r}"
            )
        if message.get("content") is None and len([v for v in message.values() if v is not None]) < 2:
            raise ConfigError(f"message {i} of the role {message['role']!r} has no content")
    try:
        plain = json.loads(json.dumps([{k: v for k, v in message.items() if v is not None} for message in messages]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"messages must hold texts, numbers, lists and objects alone ({error})") from error
    return [_with_reasoning(message) for message in plain]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """What an assistant thought, under the names that templates read it by."""
    thought = next((message[name] for name in _REASONING if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


class _TooMuch(Exception):
    """The template takes more than it may."""


class _Refusal(Exception):
    """What a template says by `raise_exception`."""


def _source(bundle: Bundle, settings: Mapping[str, Any]) -> tuple[str, Path]:
    """The template and the file it stands in."""
    file = bundle.path / _FILE
    if os.path.lexists(file):
        data = read_input(file, _LARGEST_TEMPLATE, AdapterFormatError, _AGAIN)
        try:
            return data.decode("utf-8"), file
        except UnicodeDecodeError as error:
            raise AdapterFormatError(f"{file} is not UTF-8 ({error}); {_AGAIN}") from error
    file, found = bundle.path / _CONFIG, settings.get("chat_template")
    if found is None:
        raise ConfigError(
            f"{bundle.path} has no chat template ({_FILE}, or chat_template in {_CONFIG}): its model is none for "
            "chats; give the prompt as a text"
        )
    if isinstance(found, list):
        named = [one.get("name") for one in found if isinstance(one, dict)]
        if not all(isinstance(name, str) for name in named):
            raise AdapterFormatError(f"{file}: the names of chat_template must be texts; {_AGAIN}")
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(sorted(map(str, found))) or "none"
            raise ConfigError(f"{file} has no chat template called 'default', it has {names}; name one so")
        found = found["default"]
    if not isinstance(found, str):
        raise AdapterFormatError(f"{file}: chat_template must be a text, got {type(found).__name__}; {_AGAIN}")
    if len(found) > _LARGEST_TEMPLATE:
        raise AdapterFormatError(
            f"{file}: chat_template has {len(found)} characters, it may have up to {_LARGEST_TEMPLATE}; {_AGAIN}"
        )
    return found, file


def _tokens(bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The special tokens by name, as transformers reads them; None where a file says that there is none."""
    known = dict(settings)
    if "added_tokens_decoder" not in settings:
        known |= _read(bundle.path / _SPECIAL)
    more = known.get("extra_special_tokens")
    found: dict[str, str | None] = {}
    for name, value in (known | (more if isinstance(more, dict) else {})).items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and name.endswith("_token"):
            found[name] = text
        elif text is None and name in _TOKENS:
            found[name] = None
    return found


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, _LARGEST_JSON, AdapterFormatError, _AGAIN) if os.path.lexists(file) else {}


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def _spend(steps: int = 1) -> None:
    left = _left.get(None)
    if left is not None:
        left[0] -= steps
        if left[0] < 0:
            raise _TooMuch(f"it takes more than {_STEPS} steps")
        if time.thread_time() > left[1]:
            raise _TooMuch(f"it takes more than {_SECONDS:g} seconds")


def _weigh(size: int) -> None:
    """Refuse a text or list of this size, or count it."""
    if size > _LARGEST_CHAT:
        raise _TooMuch(f"it puts together more than {_LARGEST_CHAT} characters")
    _spend(1 + size // 1000)


@functools.cache
def _environment() -> Any:
    """Jinja's sandbox with what transformers adds to it: a template that renders there renders the same here."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}`, which marks what an assistant said, for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Counted(NodeTransformer):
        """Loops and `~` go through filters that count them."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "sdct_turns", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "sdct_joined", [], [], None, None, lineno=node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return Counted().visit(super()._parse(source, name, filename))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            _check_call(__obj, args)
            return super().call(__context, __obj, *args, **kwargs)

    class Attributes(Namespace):
        """Names with an underscore in front stay out of it."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            for name in dict(*args, **kwargs):
                _check_name(name)
            Namespace.__init__(self, *args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            Namespace.__setitem__(self, name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} is no name for a namespace")

    class Dict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    @jinja2.pass_context
    def turns(context: Any, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            _spend()
            yield value

    @jinja2.pass_context
    def joined(context: Any, values: Iterable[Any]) -> str:
        texts = [str(value) for value in values]
        _weigh(sum(map(len, texts)))
        return "".join(texts)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters = {name: _counted(function) for name, function in environment.filters.items()}
    environment.filters |= {"sdct_turns": turns, "sdct_joined": joined, "tojson": _to_json}
    environment.globals |= {
        "raise_exception": _refuse, "strftime_now": _now, "dict": Dict(), "namespace": Attributes,
    }  # fmt: skip
    return environment


def _counted(function: Any) -> Any:
    @functools.wraps(function)  # with the marks that say what comes before its arguments
    def counted(*args: Any, **kwargs: Any) -> Any:
        _check_call(function, args)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _weigh(len(result))
        return result

    return counted


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse what would make a number or text of any size."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
        if operator in ("*", "**") and bits > _MOST_BITS:
            raise _TooMuch("its numbers grow beyond bounds")
        return
    if operator == "%":
        _check_format(left)
    sizes = [len(side) if isinstance(side, str | bytes | list | tuple) else 0 for side in (left, right)]
    if operator == "+":
        _weigh(sum(sizes))
    elif operator == "*":
        times = next((side for side in (left, right) if isinstance(side, int)), 1)
        _weigh(sum(sizes) * max(times, 0))


def _check_format(text: object) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise _TooMuch("it pads beyond bounds")


def _check_call(function: Any, args: Sequence[Any]) -> None:
    """Count a call, and refuse one whose arguments could make a text beyond bounds of a small one."""
    size, name = 1, getattr(function, "__name__", "")
    values = (getattr(function, "__self__", None), *args)
    if name in ("format", "format_map", "do_format"):
        for value in values:
            _check_format(value)
    for value in values if name not in ("range", "safe_range") else ():
        if isinstance(value, str | bytes | list | tuple):
            size *= max(len(value), 1)
        elif isinstance(value, int):
            size *= max(abs(value), 1)
    if size > 16 * _LARGEST_CHAT:
        raise _TooMuch("it pads or repeats beyond bounds")
    _spend(_CALL)


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if isinstance(indent, int) and indent > 100:
        raise _TooMuch("it pads beyond bounds")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _weigh(len(text))
    return text
