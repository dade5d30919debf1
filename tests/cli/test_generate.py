"""`sdct-export generate` from prompts to answers, against the library's own `generate`, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from decoders import DECODERS, VOCABULARY
from families import random_adapter
from tiny_bundle import write_bundle
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sdct_export import export_merged, export_multi
from sdct_export.cli import main
from sdct_export.cli.generate import _visible
from sdct_export.runtime import MultiAdapterModel

CHAT = "{% for m in messages %}w1 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"


def invoke(*args: object, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["generate", *map(str, args)], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def answers(*args: object, stdin: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(invoke(*args, "--json", stdin=stdin).stdout)["rows"]
    return rows


def fails(*args: object, stdin: str | None = None) -> str:
    result = invoke(*args, code=1, stdin=stdin)
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    return result.stderr


def add_tokenizer(folder: Path) -> None:
    """Of words `w0 … w98`, where `w1` begins every text; a chat begins with it by its template alone."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 98}))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, folder = DECODERS["llama"], tmp_path_factory.mktemp("lm")
    base = family.model()
    adapters = {name: random_adapter(family, base, i) for i, name in enumerate(("a", "b"), 1)}
    export_multi(base, adapters, folder / "bundle")
    export_merged(base, adapters["a"], folder / "merged")
    for name in ("bundle", "merged"):
        add_tokenizer(folder / name)
    return folder / "bundle"


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[MultiAdapterModel]:
    with MultiAdapterModel(bundle) as loaded:
        yield loaded


def test_prompts_and_adapters(bundle: Path, model: MultiAdapterModel) -> None:
    prompts, rows = ["w5 w6", "w7", "w8 w9 w10"], ["a", None, {"a": 0.5, "b": -0.75}]
    want = model.generate(prompts, rows, max_new_tokens=9, logprobs=True)
    told = ["--adapter", "a", "--adapter", "none", "--adapter", "a=0.5+b=-0.75", "--max-new-tokens", 9, "--logprobs"]
    got = answers(bundle, *prompts, *told)
    assert [row["adapter"] for row in got] == ["a", "none", "a=0.5+b=-0.75"]
    for row, one in zip(got, want, strict=True):
        assert (row["text"], tuple(row["tokens"]), row["finish"]) == (one.text, one.tokens, one.finish)
        assert row["logprobs"] == pytest.approx(list(one.logprobs or ()), abs=1e-6)
    assert len({row["text"] for row in got}) == 3
    lines = invoke(bundle, *prompts, *told).stdout.splitlines()
    assert lines[0] == "row\tadapter\ttokens\tend\tlogprob\ttext"
    assert lines[1] == f"0\ta\t9\tlength\t{sum(want[0].logprobs or ()):.4f}\t{want[0].text}"
    assert "logprobs" not in answers(bundle, "w5")[0]


def test_one_prompt_in_a_pipe_is_its_answer_alone(bundle: Path, model: MultiAdapterModel) -> None:
    (want,) = model.generate(["w5 w6"], "b", max_new_tokens=5)
    assert invoke(bundle, "w5 w6", "--adapter", "b", "--max-new-tokens", 5).stdout == f"{want.text}\n"


def test_options_are_those_of_the_library(bundle: Path, model: MultiAdapterModel) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.001,
        "repetition_penalty": 1.3,
    }  # fmt: skip
    want = model.generate(["w5", "w5"], "a", seed=4, **options)
    told = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    got = answers(bundle, "w5", "w5", "--adapter", "a", "--seed", 4, *told, "--slots", 1, "--threads", 1)
    assert [row["text"] for row in got] == [one.text for one in want]
    assert got[0]["text"] != got[1]["text"]
    again = answers(bundle, "w5", "--adapter", "a", "--seed", 5, *told)
    assert again[0]["text"] == got[1]["text"]
    greedy = answers(bundle, "w5", "--adapter", "a", "--max-new-tokens", 12)[0]
    words = greedy["text"].split()
    stop = f"{words[4]} {words[5]}"
    ended = answers(bundle, "w5", "--adapter", "a", "--max-new-tokens", 12, "--stop", "nothing", "--stop", stop)[0]
    assert (ended["text"], ended["finish"]) == (greedy["text"][: greedy["text"].index(stop)], "stop")
    token = greedy["tokens"][3]
    ended = answers(bundle, "w5", "--adapter", "a", "--max-new-tokens", 12, "--stop-token", token)[0]
    assert ended["tokens"] == greedy["tokens"][: greedy["tokens"].index(token) + 1]


def test_chats(bundle: Path, model: MultiAdapterModel) -> None:
    (want,) = model.generate([[1, 9, 1, 5, 3]], "a", max_new_tokens=6)
    chat = ["--chat", "--adapter", "a", "--max-new-tokens", 6]
    assert answers(bundle, "w5", "--system", "w9", *chat)[0]["tokens"] == list(want.tokens)
    (want,) = model.generate([[1, 5, 3]], "a", max_new_tokens=6)
    assert answers(bundle, "w5", *chat)[0]["tokens"] == list(want.tokens)
    assert answers(bundle, "w5", *chat[1:])[0]["tokens"] != list(want.tokens)


LINES = """\
w5 w6

{"prompt": "w5 w6", "adapter": "a=0.5+b=0.5", "max_new_tokens": 3}
{"ids": [1, 7], "adapter": {"b": 2}, "temperature": 1.0, "seed": 3}
{"messages": [{"role": "user", "content": "w5"}], "adapter": null, "stop": ["w"], "stop_tokens": [4]}
"""


@pytest.mark.parametrize("how", ["file", "stdin", "-"])
def test_prompts_from_a_file(how: str, bundle: Path, model: MultiAdapterModel, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(LINES)
    told = ["--adapter", "a", "--max-new-tokens", 5]
    given = {"file": ["--file", tmp_path / "lines.jsonl"], "stdin": [], "-": ["--file", "-"]}[how]
    got = answers(bundle, *given, *told, stdin=None if how == "file" else LINES)
    chat = [{"role": "user", "content": "w5"}]
    want = model.generate(
        ["w5 w6", "w5 w6", [1, 7], chat], ["a", {"a": 0.5, "b": 0.5}, {"b": 2}, None], max_new_tokens=[5, 3, 5, 5],
        temperature=[None, None, 1.0, None], seed=[None, None, 3, None], stop=[None, None, None, ["w"]],
        stop_tokens=[None, None, None, [4]],
    )  # fmt: skip
    assert [tuple(row["tokens"]) for row in got] == [one.tokens for one in want]
    assert [row["text"] for row in got] == [one.text for one in want]
    assert (got[3]["text"], got[3]["finish"]) == ("", "stop")
    assert [len(row["tokens"]) for row in got[:3]] == [5, 3, 5]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "w5"', "line 1 is not valid JSON"),
        ('{"prompt": "w5", "ids": [1]}', "line 1 must have one of prompt, messages, ids"),
        ('{"adapter": "a"}', "line 1 must have one of prompt, messages, ids"),
        ('{"prompt": "w5", "temprature": 1}', "line 1: unknown field 'temprature'"),
        ('{"prompt": 5}', "prompt must be a text"),
        ('{"ids": "w5"}', "ids must be a list"),
        ('{"ids": []}', "line 1: ids has no token"),
        ('{"ids": [1, "x"]}', "line 1: ids must be token ids"),
        ('{"ids": [1]}\n\n{"ids": [[3], [3, 4]]}', "line 3: ids must be token ids"),
        ('{"ids": [99]}', "token ids of this model are below 99"),
        ('{"messages": ["w5"]}', "messages must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', "message 0 of the role 'user' has no content"),
        ('{"prompt": "w5", "adapter": 3}', "prompt 0: adapter must be a name"),
        ('{"prompt": "w5", "adapter": "a=x"}', "'x' in 'a=x' is no number"),
        ('{"prompt": "w5", "adapter": "c"}', "has no adapter 'c'; it has a, b"),
        ('{"prompt": "w5", "temperature": 1' + "0" * 400 + "}", "line 1: temperature must be a number from 0 on"),
        ('{"prompt": "w5", "temperature": -1}', "line 1: temperature must be a number from 0 on"),
        ('{"prompt": "w5", "temperature": "hot"}', "temperature must be a number"),
        ('{"prompt": "w5", "stop": 3}', "stop must be"),
        ('{"prompt": "w5", "stop": [3]}', "line 1: stop must be"),
        ('w5\n{"prompt": "w5", "stop_tokens": 99}', "prompt 1: stop_tokens holds 99; token ids of this model are"),
        ('w5\n{"prompt": "w5", "stop_tokens": true}', "line 2: stop_tokens must be token ids"),
        ('{"prompt": "w5", "stop_tokens": ["w4"]}', "stop_tokens must be token ids"),
        ('{"prompt": "w5", "max_new_tokens": 0}', "max_new_tokens must be an integer from 1"),
        ('{"prompt": "w5", "seed": "x"}', "seed must be an integer"),
        ("\n \n", "there is no prompt"),
        ("", "there is no prompt"),
    ],
)
def test_lines_that_are_refused(line: str, match: str, bundle: Path) -> None:
    assert match in fails(bundle, "--file", "-", stdin=line)


def test_a_bare_stop_token_of_a_line_is_of_that_line_alone(bundle: Path, model: MultiAdapterModel) -> None:
    (free,) = model.generate([[5, 6]], max_new_tokens=8, stop_tokens=[])
    early = free.tokens[1]
    late = next(token for token in free.tokens[2:] if token not in free.tokens[:2])
    lines = [{"ids": [5, 6], "max_new_tokens": 8, "stop_tokens": end} for end in (early, late, [late], [])]
    found = answers(bundle, "--file", "-", stdin="\n".join(map(json.dumps, lines)))
    ends = [free.tokens.index(early), free.tokens.index(late), free.tokens.index(late), 7]
    assert [row["tokens"] for row in found] == [list(free.tokens[: end + 1]) for end in ends]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (
            ["w5 " * 70, "--max-length", 64],
            "the longest prompt has 71 tokens, max_length allows at most 64 with a new one; cut",
        ),
        (["w5", "--max-new-tokens", 20, "--max-length", 10], "22 in all, max_length allows at most 10"),
        ([""], "prompt 0 is empty"),
        (["w5", "--temperature", -1], "temperature must be a number from 0 on, got -1.0"),
        (["w5", "--temperature", "nan"], "temperature must be a number"),
        (["w5", "--top-p", 0], "top_p must be a number above 0"),
        (["w5", "--stop", ""], "stop must be"),
        (["w5", "--stop-token", 99999], "stop_tokens holds 99999; token ids of this model are below 99"),
        (["w5", "--threads", 2**40], "threads must be at most 1024"),
        (["w5", "--slots", 0], "slots must be a positive integer"),
        (["w5", "--seed", -1], "seed must be an integer from 0 on"),
        (["w5", "--adapter", "c"], "has no adapter 'c'; it has a, b"),
        (["w5", "w6", "--adapter", "a", "--adapter", "b", "--adapter", "a"], "there are 3 --adapter for 2 prompts"),
    ],
)
def test_what_is_refused(args: list[Any], match: str, bundle: Path) -> None:
    assert match in fails(bundle, *args)


def test_a_prompt_beyond_what_the_model_was_made_for(bundle: Path) -> None:
    """Rotary positions go on for ever; a table of positions ends with an error (`max_tokens` of the bundle)."""
    result = invoke(bundle, "w5 " * 93, "--max-new-tokens", 3, "--json")
    assert result.stderr == (
        "warning: the longest prompt and 3 new tokens are 97 in all, this model was made for 96 at most "
        "(max_position_embeddings): what it says beyond that may be nonsense\n"
    )
    assert invoke(bundle, "w5 " * 92, "--max-new-tokens", 3, "--json").stderr == ""
    by_default = invoke(bundle, "w5 " * 90, "--json")  # as many as there is room for
    assert (by_default.stderr, len(json.loads(by_default.stdout)["rows"][0]["tokens"])) == ("", 5)


def test_text_of_a_model_cannot_control_the_terminal() -> None:
    assert _visible("a\x1b[31m\n\tb\u202e\x07é😀") == "a\\x1b[31m\n\tb\\u202e\\x07é😀"


def test_bundles_that_cannot_generate(bundle: Path, tmp_path: Path) -> None:
    plain = write_bundle(tmp_path / "plain", {})
    assert "has no key-value cache, which generate needs" in fails(plain, "w5")
    merged = bundle.parent / "merged"
    assert "is merged: its adapter is part of the weights" in fails(merged, "w5", "--adapter", "a")
    assert answers(merged, "w5", "--max-new-tokens", 4)[0]["adapter"] == "merged"
    assert "is merged" in fails(merged, "--file", "-", stdin='{"prompt": "w5", "adapter": "a"}')
    assert "there is no folder" in fails(tmp_path / "nowhere", "w5")
    for file in bundle.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / "bare").mkdir(exist_ok=True)
            (tmp_path / "bare" / file.name).symlink_to(file)
    assert "has no tokenizer.json; pass token ids instead" in fails(tmp_path / "bare", "w5")
    assert "has no chat template" in fails(tmp_path / "bare", "w5", "--chat")
    ids = answers(tmp_path / "bare", "--file", "-", "--max-new-tokens", 3, stdin='{"ids": [1, 5]}')[0]
    assert ids["text"] is None
    assert len(ids["tokens"]) == 3
    shown = invoke(tmp_path / "bare", "--file", "-", "--max-new-tokens", 3, stdin='{"ids": [1, 5]}').stdout
    assert shown.splitlines()[1].split("\t")[-1] == " ".join(map(str, ids["tokens"]))
    stopped = fails(tmp_path / "bare", "--file", "-", "--stop", "w", stdin='{"ids": [1, 5]}')
    assert "has no tokenizer.json" in stopped


def test_misuse(bundle: Path) -> None:
    assert "not both" in invoke(bundle, "w5", "--file", "-", code=2).stderr
    assert "--system is for --chat" in invoke(bundle, "w5", "--system", "w6", code=2).stderr
    assert "is no number" in invoke(bundle, "w5", "--adapter", "a=x", code=2).stderr


def on_terminal(bundle: Path, *args: object) -> str:
    """What a terminal shows of the command, whose standard output and error it is."""
    main_end, other = pty.openpty()
    command = [sys.executable, "-m", "sdct_export", "generate", str(bundle), *map(str, args)]
    with subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=os.environ | {"COLUMNS": "200"}
    ) as child:
        os.close(other)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(main_end)
    assert child.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_on_a_terminal(bundle: Path, model: MultiAdapterModel) -> None:
    one, other = model.generate(["w5 w6", "w7"], "a", max_new_tokens=7)
    assert (one.finish, len(one.tokens)) == ("length", 7)
    told = "(cut after 7 tokens; --max-new-tokens for more)\n"
    assert on_terminal(bundle, "w5 w6", "--adapter", "a", "--max-new-tokens", 7) == f"{one.text}\n{told}"
    shown = on_terminal(bundle, "w5 w6", "w7", "--adapter", "a", "--max-new-tokens", 7)
    assert str(one.text) in shown
    assert str(other.text) in shown
    assert "generating" in shown


def test_torch_and_transformers_are_not_loaded(bundle: Path) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sdct_export.cli import main\n"
        f"done = CliRunner().invoke(main, ['generate', {str(bundle)!r}, 'w5', '--chat', '--max-new-tokens', '2'])\n"
        "assert done.exit_code == 0, done.output\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
