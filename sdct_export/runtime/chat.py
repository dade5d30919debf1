"""Chats as texts, by the template that comes with the bundle's tokenizer. Never imports torch or transformers.

A template is a stranger's program in the language of Jinja. It runs in Jinja's sandbox, as transformers runs it, with
nothing in reach but the messages and the filters that chats need; its size, its steps, its time and all that it puts
together are bounded. No list is larger, written out, than a chat may be, so no single operation on one takes long.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import itertools
import json
import os
import re
import sys
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
_DEEPEST = 100  # lists in lists
_STEPS = 1 << 21  # turns of loops, calls, and half kilobytes put together: a gigabyte at most
_ELEMENT = 8  # characters that an element of a list is worth
_NEW = 64  # bytes of an element that was made for the list
_SECONDS = 5.0  # of this thread's processor time, for steps that take long, looked at in every step
_CALL = 8  # of them for a call, which takes so much longer than a turn
_MOST_BITS = 1 << 12  # of an integer
_MOST_KEYS = 1 << 12  # of a dict in the template; all of them can have one hash
_AGAIN = "mend the file, or export the bundle again"
# the tokens that a tokenizer of transformers has names for
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
# classes of transformers that take these from the files alone; others have some of their own
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
# what a template may use: of what Jinja has, what writing a chat can need and a small input does not make long
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "truncate",
    "unique", "upper",
)  # fmt: skip
_GLOBALS = ("dict", "namespace", "range")
_NO_METHODS = ("encode", "decode", "to_bytes", "from_bytes", "maketrans", "translate")  # some codecs take very long
# what these return can be as long as the product of what they are given, or take as long
_GROWING = (
    "replace", "do_replace", "join", "sync_do_join", "do_indent", "ljust", "rjust", "center", "zfill", "expandtabs",
    "rfind", "rindex", "rsplit", "rpartition",
)  # fmt: skip
_LONGEST_FORMAT = 1 << 16
_WIDEST_FORMAT = 1 << 12  # all of its numbers together
_DIRECTIVE = re.compile(r"%(?:\([^)]*\))?[#0 +-]*(\*|\d*)(?:\.(\*|\d*))?")
_PATH = re.compile(r"\{[^{}:!]*[.\[]|\{[^{}]*\{")  # a field that reaches into its value, or whose width is a field
_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
# steps that a template may still take, and the processor time at which it must have ended
_left: contextvars.ContextVar[list[float]] = contextvars.ContextVar("left")
# lists that were measured last, by id: the list (nothing changes it), its size and its depth
_measured: contextvars.ContextVar[dict[int, tuple[Any, int, int]]] = contextvars.ContextVar("measured")


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
            with _bounded():  # Jinja works out what is constant
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
        tokens = {name: value for name, value in self._tokens.items() if value is not None}
        given = {**tokens, "messages": chat, "tools": None, "documents": None, "add_generation_prompt": True}
        parts, size = [], 0
        try:
            with _bounded():
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


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    left, measured = _left.set([_STEPS, time.thread_time() + _SECONDS]), _measured.set({})
    try:
        yield
    finally:
        _left.reset(left)
        _measured.reset(measured)


def _weigh(size: int, memory: int = 0) -> None:
    """Refuse a text or list of this size in characters, or count it and the memory that it takes."""
    if size > _LARGEST_CHAT:
        raise _TooMuch(f"it puts together more than {_LARGEST_CHAT} characters")
    _spend(1 + max(size, memory) // 512)


def _measure(value: Any, depth: int = 0) -> tuple[int, int]:
    """Characters in `value`, as often as it is written when `value` is printed, and how deep its lists are."""
    if isinstance(value, str):
        return len(value), 0
    if isinstance(value, int):
        return value.bit_length() // 3, 0
    if isinstance(value, range):
        return _measure((value.start, value.stop, value.step))
    if not isinstance(value, _CONTAINERS):  # None, a float; a macro, whose name is written
        return len(value.name) if type(value).__name__ == "Macro" else 0, 0
    known = _measured.get({}).get(id(value))
    if known is not None and known[0] is value:
        return known[1:]
    size, deepest = _ELEMENT * len(value), 0
    for one in itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value:
        if depth >= _DEEPEST or size > _LARGEST_CHAT:
            break
        more, deep = _measure(one, depth + 1)
        size, deepest = size + more, max(deepest, deep)
    if depth + deepest >= _DEEPEST:
        raise _TooMuch(f"it nests lists more than {_DEEPEST} deep")
    if size > _LARGEST_CHAT:
        raise _TooMuch(f"it puts together a list of more than {_LARGEST_CHAT} characters")
    return size, deepest + 1


def _built(value: Any, element: int = _ELEMENT, measured: tuple[int, int] | None = None) -> Any:
    """`value` itself, which has just been put together, if it is within bounds: so are comparing and printing it.

    Its memory is counted, an element of a list at `element` bytes.
    """
    if isinstance(value, str):
        _weigh(len(value), sys.getsizeof(value))
    elif isinstance(value, int) and value.bit_length() > 4 * _MOST_BITS:
        raise _TooMuch("its numbers grow beyond bounds")
    elif isinstance(value, _CONTAINERS):
        measured = measured or _measure(value)
        memory = _measured.get({})
        if measured[0] >= 1000:  # others are measured again as quickly
            memory.pop(id(value), None)
            if len(memory) >= 64:
                del memory[next(iter(memory))]  # the oldest
            memory[id(value)] = (value, *measured)
        _spend(1 + element * len(value) // 512)
    return value


def _watched(values: Iterable[Any]) -> Iterator[Any]:
    """`values` as they are asked for, up to the bounds of a list of them."""
    size = 0
    for value in values:
        size += _ELEMENT + _measure(value)[0]
        if size > _LARGEST_CHAT:
            raise _TooMuch(f"it puts together more than {_LARGEST_CHAT} characters")
        _spend()
        yield value


@functools.cache
def _environment() -> Any:
    """Jinja's sandbox with what transformers adds to it: a template that renders there renders the same here."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext
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
        """Loops, texts, `~`, lists and slices go through filters that count them."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "sdct_turns", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "sdct_joined", [], [], None, None, lineno=node.lineno)

        def _count(self, node: Any) -> Any:
            return nodes.Filter(node, "sdct_built", [], [], None, None, lineno=node.lineno)

        def visit_List(self, node: Any) -> Any:
            self.generic_visit(node)
            written = getattr(node, "ctx", "load") == "store" or (
                len(node.items) <= 16 and all(isinstance(one, nodes.Const) for one in node.items)
            )
            return node if written else self._count(node)

        visit_Tuple = visit_List

        def visit_Dict(self, node: Any) -> Any:
            if len(node.items) > _MOST_KEYS:
                raise _TooMuch(f"it writes a dict of more than {_MOST_KEYS} keys")
            return self.visit_List(node)

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            sliced = isinstance(node.arg, nodes.Slice)
            return nodes.Filter(node, "sdct_slice", [], [], None, None, lineno=node.lineno) if sliced else node

        def visit_TemplateData(self, node: Any) -> Any:
            return self._count(nodes.Const(node.data, lineno=node.lineno))

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return Counted().visit(super()._parse(source, name, filename))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            measured = _check_operation(operator, left, right)
            return _built(super().call_binop(context, operator, left, right), measured=measured)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            _check_call(__obj, (*args, *kwargs.values()))
            args = tuple(watch(value) for value in args)
            keyed = isinstance(__obj, Dict) or getattr(__obj, "__name__", "") == "fromkeys"
            if keyed and args and isinstance(args[0], list | tuple | range):
                args = (_watched(args[0]), *args[1:])  # keys of one hash take long, all together
            return _built(super().call(__context, __obj, *args, **kwargs), _NEW)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

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

        def __repr__(self) -> str:  # namespaces can hold one another, in circles too
            raise jinja2.exceptions.SecurityError("a namespace cannot be printed")

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
        _weigh(sum(map(len, texts)), sum(map(sys.getsizeof, texts)))
        return "".join(texts)

    @jinja2.pass_context
    def built(context: Any, value: Any) -> Any:
        return _built(value)

    @jinja2.pass_context
    def part(context: Any, value: Any) -> Any:
        """A slice, which is no larger than what it is of: only its memory is counted."""
        if isinstance(value, str):
            _weigh(len(value), sys.getsizeof(value))
        elif isinstance(value, _CONTAINERS):
            _weigh(_ELEMENT * len(value))
        return value

    def printed(value: Any) -> Any:
        _weigh(_measure(value)[0])
        return value

    def watch(value: Any) -> Any:
        return _watched(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value

    def counted(function: Any) -> Any:
        @functools.wraps(function)  # with the marks that say what comes before its arguments
        def run(*args: Any, **kwargs: Any) -> Any:
            _check_call(function, (*args, *kwargs.values()))
            return _built(function(*map(watch, args), **kwargs), _NEW)

        return run

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=printed
    )
    environment.filters = {name: counted(environment.filters[name]) for name in _FILTERS}
    environment.filters |= {
        "sdct_turns": turns, "sdct_joined": joined, "sdct_built": built, "sdct_slice": part, "tojson": _to_json,
    }  # fmt: skip
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals |= {
        "raise_exception": _refuse, "strftime_now": _now, "dict": Dict(), "namespace": Attributes,
    }  # fmt: skip
    return environment


def _check_operation(operator: str, left: Any, right: Any) -> tuple[int, int] | None:
    """Refuse what would make a number or text of any size. Of what makes a list, what `_measure` will say of it."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
        if operator in ("*", "**") and bits > _MOST_BITS:
            raise _TooMuch("its numbers grow beyond bounds")
    elif operator == "%" and isinstance(left, str):
        _check_directives(left, right)
    elif operator in ("+", "*"):
        sides = [_measure(side) for side in (left, right) if not isinstance(side, int)]
        size, depth = sum(side[0] for side in sides), max(side[1] for side in sides)
        if operator == "*":
            size *= max(next((side for side in (left, right) if isinstance(side, int)), 1), 0)
        if size > _LARGEST_CHAT:
            raise _TooMuch(f"it puts together more than {_LARGEST_CHAT} characters")
        return size, depth
    return None


def _check_directives(text: str, values: Any) -> None:
    """Refuse a format with `%` whose result could be long."""
    directives = _DIRECTIVE.findall(text) if len(text) <= _LONGEST_FORMAT else [("*", "")]
    _check_format(len(directives), [width for pair in directives for width in pair if width], values)


def _check_fields(text: str, values: Any) -> None:
    """Refuse a format with `{}` whose result could be long."""
    plain = text[: _LONGEST_FORMAT + 1].replace("{{", "").replace("}}", "")
    odd = len(text) > _LONGEST_FORMAT or _PATH.search(plain)
    fields = re.findall(r"\{[^{}]*?:([^{}]*)", plain)
    widths = ["*"] if odd else re.findall(r"\d+", " ".join(fields))
    _check_format(plain.count("{"), widths, values)


def _check_format(fields: int, widths: Sequence[str], values: Any) -> None:
    wide = any(width == "*" or len(width) > 4 for width in widths) or sum(map(int, widths)) > _WIDEST_FORMAT
    if wide or fields * _measure(values)[0] > 16 * _LARGEST_CHAT:
        raise _TooMuch("its formats are long, wide, or reach into values")


def _check_call(function: Any, values: Sequence[Any]) -> None:
    """Count a call, and refuse one whose arguments could make a text beyond bounds of a small one."""
    name = getattr(function, "__name__", "")
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    if name in ("format", "format_map") and isinstance(owner, str):
        _check_fields(owner, values)
    elif name == "do_format":
        _check_directives(str(values[0]), values[1:])
    elif name == "do_round" and any(isinstance(value, int) and abs(value) > 300 for value in values[1:]):
        raise _TooMuch("it rounds to too many places")
    elif name in _GROWING:
        size = 1
        for value in (owner, *values):
            size *= max(abs(value) if isinstance(value, int) else _measure(value)[0], 1)
            if size > 16 * _LARGEST_CHAT:
                raise _TooMuch("it pads or repeats beyond bounds")
    _spend(_CALL)


def _refuse(message: object) -> None:
    raise _Refusal(str(message)[:1000])


def _now(pattern: str) -> str:
    if len(pattern) > 1000:
        raise _TooMuch("its formats are long, wide, or reach into values")
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    size, depth = _measure(value)
    width = indent if isinstance(indent, int) else _measure(indent)[0]
    between = max(width, 0) * depth + _measure(separators)[0] + 1
    if size // _ELEMENT * between > 16 * _LARGEST_CHAT or between > 1 << 12:
        raise _TooMuch("it pads beyond bounds")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _weigh(len(text), sys.getsizeof(text))
    return text
