"""Chats against transformers' `apply_chat_template`; templates of strangers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import transformers
from chat_templates import TEMPLATES
from tokenizers import Tokenizer
from tokenizers_of_texts import byte_level

from sdct_export.errors import AdapterFormatError, ConfigError
from sdct_export.runtime import chat as chat_module
from sdct_export.runtime.chat import ChatTemplate
from sdct_export.runtime.prompts import encode_prompts

CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hello,\n<b>wörld</b> & \"you\"  "}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Why? 😀"}],
    "turns": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm</think>\n\nb"},
        {"role": "user", "content": "c\n"},
    ],
    "not in turn": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    "tools": [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": {"é": [1, None]}}}
        ]},
        {"role": "tool", "content": "<no>"},
    ],
    "two calls": [{"role": "assistant", "tool_calls": [{}, {}]}],
    "blocks": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}],
    "thought": [
        {"role": "assistant", "content": "b", "thinking": "so"}, {"role": "user", "content": "c", "reasoning": "x"},
    ],
}  # fmt: skip


def saved(folder: Path, template: Any, **settings: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of transformers in `folder`, as a base has it."""
    from tokenizers import processors

    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **{"bos_token": "<s>", "eos_token": "</s>"} | settings
    )
    made.save_pretrained(folder)
    return made


def bundle(folder: Path) -> Any:
    return types.SimpleNamespace(path=folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Text, tokens and refusals; from the file beside the tokenizer, and from its settings."""
    tokenizer = saved(tmp_path / "file", TEMPLATES[name])
    assert (tmp_path / "file" / "chat_template.jinja").exists()
    saved(tmp_path / "settings", None)
    settings = tmp_path / "settings" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATES[name]}))
    rendered = 0
    for chat in CHATS.values():
        want, refusal = "", ""
        try:
            want = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            refusal = str(error)
        if refusal:
            for folder in ("file", "settings"):
                with pytest.raises((ConfigError, AdapterFormatError), match=re.escape(refusal)):
                    ChatTemplate(bundle(tmp_path / folder)).render(chat)
            continue
        rendered += 1
        assert ChatTemplate(bundle(tmp_path / "file")).render(chat) == want
        assert ChatTemplate(bundle(tmp_path / "settings")).render(chat) == want
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        (got,) = encode_prompts(bundle(tmp_path / "file"), [chat])
        assert got.tolist() == ids
    assert rendered >= 2


def test_a_chat_has_its_special_tokens_from_the_template_alone(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, "{{ bos_token }}{{ messages[0].content }}")
    text, chat = encode_prompts(bundle(tmp_path), ["hi", [{"role": "user", "content": "hi"}]])
    assert text.tolist() == chat.tolist() == tokenizer("hi")["input_ids"]
    assert chat[0] == 0 != chat[1]


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, None)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].role }}"}]
    file.write_text(json.dumps(settings | {"chat_template": several}))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = CHATS["one"]
    assert ChatTemplate(bundle(tmp_path)).render(chat) == "user"
    assert again.apply_chat_template(chat, tokenize=False) == "user"
    (tmp_path / "chat_template.jinja").write_text("of the file\n")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        ChatTemplate(bundle(tmp_path)).render(chat) == again.apply_chat_template(chat, tokenize=False) == "of the file"
    )
    (tmp_path / "chat_template.jinja").unlink()
    file.write_text(json.dumps(settings | {"chat_template": several[:1]}))
    with pytest.raises(ConfigError, match="no chat template called 'default', it has tool_use"):
        ChatTemplate(bundle(tmp_path))
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTemplate(bundle(tmp_path))
    assert tokenizer.chat_template is None


def test_special_tokens_are_those_of_the_files(tmp_path: Path) -> None:
    """In every form that they are written in; one that only a class of transformers knows is not left out silently."""
    saved(tmp_path, "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ mask_token }}")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())

    def both() -> str:
        want = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHATS["one"], tokenize=False)
        assert ChatTemplate(bundle(tmp_path)).render(CHATS["one"]) == want
        return str(want)

    assert both() == "<s>|</s>||"
    as_object = {"content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    file.write_text(json.dumps(settings | {"bos_token": as_object | {"__type": "AddedToken"}, "image_token": "<s>"}))
    assert both() == "<|end|>|</s>|<s>|"
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "added_tokens_decoder"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": as_object, "mask_token": "<s>"}))
    assert both() == "<s>|<|end|>||<s>"
    (tmp_path / "special_tokens_map.json").unlink()
    del settings["bos_token"]
    file.write_text(json.dumps(settings))
    assert both() == "|</s>||"
    file.write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer", "mask_token": None}))
    with pytest.raises(
        ConfigError, match=r"uses bos_token, which .*tokenizer_config.json does not give; write it there"
    ):
        ChatTemplate(bundle(tmp_path))


def refusing(tmp_path: Path, template: str) -> str:
    (tmp_path / "chat_template.jinja").write_text(template)
    started = time.process_time()
    with pytest.raises((AdapterFormatError, ConfigError)) as refused:
        ChatTemplate(bundle(tmp_path)).render(CHATS["one"])
    assert time.process_time() - started < 60  # no measure of speed: without bounds these do not end
    assert len(str(refused.value)) < 1500
    return str(refused.value)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 10 ** 1000000000 }}",
    "{{ 'a' * 10 ** 12 }}{{ [1] * 10 ** 12 }}",
    "{{ 10 ** 12 * 'a' }}",
    "{{ 'a'.ljust(10 ** 12) }}",
    "{{ 'a'|center(10 ** 12) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('b' * 100000).join('a' * 100000) }}",
    "{{ '%1000000000d' % 3 }}",
    "{{ '%(a)1000000000d'|format(a=3) }}",
    "{{ '{:1000000000}'.format(3) }}",
    "{{ '{:{}}'.format(3, 10 ** 12) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ [[1]]|tojson(indent=10 ** 12) }}",
    "{{ range(10 ** 12)|list }}",
    # lists that share their parts: small to keep, endless to compare, write or hash
    "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x|tojson }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
    "{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x] * 2 %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [[ns.x]|first, ns.x]|list %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns }}",
    # arguments by keyword
    "{{ lipsum(n=1, min=100000000, max=200000000) }}",
    "{{ 'a\nb'|indent(width=1500000000) }}",
    "{{ ('a\n' * 100000)|indent(width=100000) }}",
    "{{ [[1]]|tojson(indent='a' * 10000000) }}",
    "{{ ([1] * 100000)|tojson(separators=('a' * 100000, ':')) }}",
    "{{ 1.5|round(precision=1000000000) }}",
    # formats
    "{{ ('{0:9999}' * 100000).format(1) }}",
    "{{ '{0:{1[0]}}'.format(1, [1500000000]) }}",
    "{{ '{a:{b}}'.format(a=1, b=1500000000) }}",
    "{{ ('{}{:9999}' * 5000).format(1) }}",
    "{{ ('%(a)9999d' * 100000) % {'a': 1} }}",
    "{{ ('%(a)s' * 10000) % {'a': 'a' * 10000000} }}",
    "{{ ('{a}' * 10000).format(a='a' * 10000000) }}",
    "{{ ('{a.x}' * 10000).format(a=namespace(x='a' * 10000000)) }}",
    # lists of lists and texts, and what is kept of them
    "{{ ([[1] * 1000] * 20000)|sum(start=[])|length }}",
    "{{ ([('a' * 10000000)] * 150)|join }}",
    "{{ ([namespace(x='a' * 10000000)] * 150)|map(attribute='x')|join }}",
    "{{ ''.join(([namespace(x='a' * 10000000)] * 150)|map(attribute='x')) }}",
    "{% set s = [0] * 16000000 %}{% set a = namespace(x=()) %}{% for i in range(15) %}{% set a.x = (a.x, s[i:]) %}"
    "{% endfor %}",
    "{% set s = [0] * 1000000 %}" + "".join(f"{{% set s{i} = s[1:] %}}" for i in range(999)),
    "{% set x = 'a' * 10000000 %}{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "{% set y %}{% for i in range(99999) %}" + "a" * 100000 + "{% endfor %}{% endset %}",
    "{% macro f() %}{% for i in range(99999) %}" + "a" * 100000 + "{% endfor %}{% endmacro %}{% set y = f() %}",
    # operations that take long by themselves
    "{{ ('f' * 10000000)|int(base=16) // 3 }}",
    "{{ ('a' * 10000000).rfind('b' + 'a' * 5000000) }}",
    "{{ ('é' * 10000000).encode('punycode') }}",
    "{{ dict.fromkeys(range(0, 99999 * (2 ** 61 - 1), 2 ** 61 - 1))|length }}",
    "{{ {}.fromkeys(range(0, 99999 * (2 ** 61 - 1), 2 ** 61 - 1)|list)|length }}",
    "{{ {" + ", ".join(f"{i * (2**61 - 1)}: 1" for i in range(40000)) + "}|length }}",
    "{{ strftime_now('%c' * 1000000) }}",
    "{{ " + "(" * 190 + "1" + ")" * 190 + " }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_templates_without_end_are_refused(template: str, tmp_path: Path) -> None:
    saved(tmp_path, None)
    assert "mend the file, or export the bundle again" in refusing(tmp_path, template)


def test_a_filter_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved(tmp_path, None)
    assert "is no chat template (No filter named 'sum'.)" in refusing(tmp_path, "{{ [1]|sum }}")
    assert "fails on these messages ('lipsum' is undefined)" in refusing(tmp_path, "{{ lipsum(n=1) }}")


def test_steps_that_take_long_are_refused_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, None)
    monkeypatch.setattr(chat_module, "_SECONDS", 0.2)
    slow = (
        "{% set x = 'a' * 10000000 %}{% set y = 'a' * 10000000 %}"
        "{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}"
    )
    assert "it takes more than 0.2 seconds" in refusing(tmp_path, slow)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ ('%s' | attr('__class__')).mro() }}",
        "{{ '{0.__class__}'.format(1).nope.nope }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ self.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% include 'tokenizer.json' %}",
        "{% import 'os' as os %}",
        "{% extends messages %}",
        "{{ messages[0].nope.nope }}",
        "{{ 1 + 'a' }}",
        "{{ nope() }}",
        "{% for %}",
        "{{ a",
        "{% generation %}",
        "{" * 3000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
    ],
)
def test_templates_that_reach_out_or_fail_are_refused(template: str, tmp_path: Path) -> None:
    saved(tmp_path, None)
    assert "mend the file, or export the bundle again" in refusing(tmp_path, template)


def test_what_is_no_template_file(tmp_path: Path) -> None:
    saved(tmp_path, None)
    assert "it may have up to 1048576" in refusing(tmp_path, "a" * (1 << 20) + "b")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(AdapterFormatError, match="is not UTF-8"):
        ChatTemplate(bundle(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        ChatTemplate(bundle(tmp_path))
    (tmp_path / "chat_template.jinja").rmdir()
    for value, match in (
        (7, "must be a text"),
        ("x" * (1 << 21), "it may have up to"),
        ([3], "called 'default'"),
        ([{"name": [1], "template": "x"}], "names of chat_template must be texts"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises((AdapterFormatError, ConfigError), match=match):
            ChatTemplate(bundle(tmp_path))


def test_the_model_says_why_it_refuses_messages(tmp_path: Path) -> None:
    saved(tmp_path, TEMPLATES["gemma"])
    with pytest.raises(ConfigError, match="refuses these messages: System role not supported"):
        encode_prompts(bundle(tmp_path), [CHATS["system"]])


@pytest.mark.parametrize(
    ("chat", "match"),
    [
        ([{"content": "a"}], "message 0 must be an object with a role and a content"),
        ([{"role": "user"}], "message 0 of the role 'user' has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": 3}], "message 0 must be an object"),
        ([{"role": "", "content": "a"}], "message 0 must be an object"),
        ([{"role": "user", "content": "a"}, "b"], "message 1 must be an object"),
        ([{"role": "user", "content": "a", "x": {1, 2}}], "messages must hold texts, numbers"),
        ([{"role": "user", "content": "\ud800"}], "no UTF-8"),
    ],
)
def test_messages_that_are_none(chat: Any, match: str, tmp_path: Path) -> None:
    saved(tmp_path, TEMPLATES["chatml"])
    with pytest.raises(ConfigError, match=match):
        encode_prompts(bundle(tmp_path), [chat])


def test_a_long_chat_is_within_the_bounds(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, TEMPLATES["llama"])
    chat = [{"role": "user", "content": "wörds " * 300}, {"role": "assistant", "content": "b" * 900}] * 1000
    want = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(bundle(tmp_path)).render(chat) == want


def test_chats_need_no_transformers(tmp_path: Path) -> None:
    saved(tmp_path, TEMPLATES["chatml"])
    code = (
        "import sys, types\nfrom sdct_export.runtime.prompts import encode_prompts\n"
        f"from pathlib import Path\nbundle = types.SimpleNamespace(path=Path({str(tmp_path)!r}))\n"
        "assert 'jinja2' not in sys.modules\n"
        "assert len(encode_prompts(bundle, [[{'role': 'user', 'content': 'a'}]])[0]) > 3\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
