"""Generation against transformers: greedy tokens, the distribution that is sampled from, rows apart, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoders import DECODERS, VOCABULARY, random_rows, torch_logits
from families import edited, random_adapter
from tiny_bundle import write_bundle
from torch import nn

from sdct_export import SdctAdapter, export_merged, export_multi
from sdct_export.adapter.entries import Array
from sdct_export.errors import AdapterFormatError, ConfigError, SdctError, UnknownAdapterError
from sdct_export.runtime import MultiAdapterModel, decoding
from sdct_export.runtime import ort as ort_module
from sdct_export.runtime.decoding import collect
from sdct_export.runtime.generation import Sampling, choose
from sdct_export.runtime.prompts import read_defaults
from sdct_export.runtime.steps import SharedSteps
from sdct_export.runtime.text import TextStream

ROWS: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": -0.75}, {}]
PROMPTS = [row.tolist() for row in random_rows((9, 6, 3, 8, 1), seed=21)]


class Made:
    def __init__(self, name: str, target: str, folder: Path) -> None:
        family = DECODERS[name]
        self.model: nn.Module = family.model()
        self.adapters = {k: random_adapter(family, self.model, i) for i, k in enumerate("ab", 1)}
        self.bundle = export_multi(self.model, self.adapters, folder / "bundle", target=target)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("llama", "ort", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(made: Made) -> Iterator[MultiAdapterModel]:
    with MultiAdapterModel(made.bundle) as loaded:
        yield loaded


def greedy(model: nn.Module, prompt: Sequence[int], row: Mapping[str, float], adapters: Mapping[str, SdctAdapter], count: int, stop: int | None = None) -> list[int]:  # fmt: skip # noqa: E501
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole: Any = edited(model, row, adapters)
        made = whole.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=stop,
            pad_token_id=0,
        )  # fmt: skip
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def test_greedy_tokens_equal_transformers(made: Made, model: MultiAdapterModel) -> None:
    got = model.generate(PROMPTS, [row or None for row in ROWS], max_new_tokens=20, stop_tokens=[], logprobs=True)
    for prompt, row, one in zip(PROMPTS, ROWS, got, strict=True):
        assert list(one.tokens) == greedy(made.model, prompt, row, made.adapters, 20)
        assert (one.finish, one.text) == ("length", None)
        whole = np.array([*prompt, *one.tokens])
        logits = torch_logits(made.model, [whole], [row], made.adapters)[0][len(prompt) - 1 : -1]
        want = torch.log_softmax(torch.from_numpy(logits), -1).numpy()[np.arange(20), one.tokens]
        np.testing.assert_allclose(one.logprobs, want, atol=1e-4)


def margin(made: Made, tokens: Sequence[int], row: Mapping[str, float]) -> float:
    """How much more probable, in logits, transformers finds its next token than the second best."""
    logits = torch_logits(made.model, [np.array(tokens)], [row], made.adapters)[0][-1]
    first, second = np.sort(logits)[::-1][:2]
    return float(first - second)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "target", ["ort", *(pytest.param(target, marks=pytest.mark.slow) for target in ("standard", "tensorrt"))]
)
def test_greedy_tokens_of_every_family_equal_transformers(name: str, target: str, tmp_path: Path) -> None:
    """Over 64 steps; where two tokens are as probable to 1e-4 either may come, and what follows is not compared."""
    made, close = Made(name, target, tmp_path), 0
    with MultiAdapterModel(made.bundle) as model:
        got = model.generate(PROMPTS, [row or None for row in ROWS], max_new_tokens=64, stop_tokens=[])
    for prompt, row, one in zip(PROMPTS, ROWS, got, strict=True):
        want = greedy(made.model, prompt, row, made.adapters, 64)
        equal = next((i for i, pair in enumerate(zip(one.tokens, want, strict=True)) if pair[0] != pair[1]), 64)
        if equal < 64:
            close += 1
            assert margin(made, [*prompt, *want[:equal]], row) < 1e-4
    assert close <= 1  # of five rows: or nothing would have been compared


def test_a_row_ends_at_its_stop_token_and_others_go_on(made: Made, model: MultiAdapterModel) -> None:
    rows = [row or None for row in ROWS]
    free = model.generate(PROMPTS, rows, max_new_tokens=12, stop_tokens=[])
    stop = free[0].tokens[4]
    got = model.generate(PROMPTS, rows, max_new_tokens=12, stop_tokens=[stop])
    assert any(one.finish == "length" for one in got)
    for one, whole, prompt, row in zip(got, free, PROMPTS, ROWS, strict=True):
        ends = stop in whole.tokens
        assert one.finish == ("stop" if ends else "length")
        assert one.tokens == (whole.tokens[: whole.tokens.index(stop) + 1] if ends else whole.tokens)
        assert list(one.tokens) == greedy(made.model, prompt, row, made.adapters, 12, stop)


def test_a_row_does_not_depend_on_the_rows_beside_it(model: MultiAdapterModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.9, "top_p": 0.95, "stop_tokens": []}
    rows = [row or None for row in ROWS]
    together = model.generate(PROMPTS, rows, seed=7, **options)
    assert together == model.generate(PROMPTS, rows, seed=7, **options)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = model.generate([prompt], [rows[i]], seed=[7 + i], **options)
        assert alone.tokens == together[i].tokens
    others = model.generate(PROMPTS, rows, seed=8, **options)
    assert [one.tokens for one in others] != [one.tokens for one in together]
    same = model.generate([PROMPTS[0]] * 3, "a", seed=[1, 1, 2], **options)
    assert same[0].tokens == same[1].tokens != same[2].tokens


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_samples_are_of_the_distribution_that_transformers_has(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(scale=2.5, size=(4, 57)).astype(np.float32)
    history = rng.integers(0, 57, (4, 9))
    steps = transformers.LogitsProcessorList()
    if "repetition_penalty" in options:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    steps.append(transformers.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        steps.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(transformers.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(transformers.MinPLogitsWarper(options["min_p"]))
    scores = steps(torch.from_numpy(history), torch.from_numpy(logits).double())
    want = torch.softmax(scores, -1).numpy()
    count, sampling = 4000, Sampling(**options)
    uniform = (np.arange(count) + 0.5) / count  # an even sample of [0, 1): shares are off by 1 / count at most
    chosen = np.stack([choose(logits, [sampling] * 4, history, np.full(4, u)).tokens for u in uniform], 1)
    for row in range(4):
        shares = np.bincount(chosen[row], minlength=57) / count
        np.testing.assert_allclose(shares, want[row], atol=1.01 / count)
        assert set(chosen[row]) <= set(np.flatnonzero(want[row]))
    ends = [choose(logits, [sampling] * 4, history, np.full(4, u)).tokens for u in (0.0, 1 - 2**-53)]
    assert all((want[np.arange(4), tokens] > 0).all() for tokens in ends)


def test_greedy_takes_the_largest_after_the_penalty() -> None:
    logits = np.array([[1.0, 3.0, 2.9], [-1.0, -0.5, -3.0]], np.float32)
    seen, none = [np.array([1, 1])] * 2, [np.array([], np.int64)] * 2
    plain, penalty = Sampling(), Sampling(repetition_penalty=2.5)

    def tokens(samplings: list[Sampling], seen: Sequence[Array]) -> list[int]:
        found: list[int] = choose(logits, samplings, seen, np.zeros(2)).tokens.tolist()
        return found

    assert tokens([plain, plain], seen) == [1, 1]
    assert tokens([penalty, penalty], seen) == [2, 0]
    assert tokens([plain, penalty], seen) == [1, 0]
    assert tokens([penalty, penalty], none) == [1, 1]


@pytest.mark.parametrize("top_p", [5e-324, 1e-320, 1e-300, 1e-30])
def test_a_top_p_of_almost_nothing_is_the_most_probable_token(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(20, 77)).astype(np.float32)
    sampling = Sampling(temperature=0.7, top_p=top_p)
    found = choose(logits, [sampling] * 20, [np.array([], np.int64)] * 20, np.linspace(0, 0.999, 20))
    assert found.tokens.tolist() == logits.argmax(1).tolist()
    assert not found.wrong.any()


def test_a_base_whose_end_is_no_token_of_the_model_goes_on(made: Made, shown: Path) -> None:
    """Small models often keep the `eos_token_id` of a large one; who gives one himself is told."""
    (shown / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCABULARY + 7}))
    with MultiAdapterModel(shown) as model:
        (found,) = model.generate([[5, 6]], max_new_tokens=3)
    assert (len(found.tokens), found.finish) == (3, "length")


@pytest.fixture
def shown(made: Made, tmp_path: Path) -> Path:
    """The bundle with a tokenizer of words `w0 … w98`, where `w1` begins every text and `w2` ends one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in made.bundle.path.iterdir():
        (folder / file.name).symlink_to(file)
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_texts_in_and_out_and_defaults_of_the_base(made: Made, shown: Path) -> None:
    with MultiAdapterModel(shown) as model:
        ids = [[1, 5, 6], [1, 7]]
        (one, other) = model.generate(["w5 w6", [1, 7]], "a", max_new_tokens=6, stop_tokens=[])
        plain = model.generate(ids, "a", max_new_tokens=6, stop_tokens=[])
        assert [one.tokens, other.tokens] == [p.tokens for p in plain]
        assert one.text == " ".join(f"w{i}" for i in one.tokens)
        (ended,) = model.generate(["w5 w6"], "a", max_new_tokens=6, stop_tokens=[one.tokens[2]])
        assert ended.text == " ".join(f"w{i}" for i in ended.tokens[:-1])
        file = shown / "generation_config.json"
        file.unlink(missing_ok=True)
        settings = {"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": [one.tokens[1]]}
        file.write_text(json.dumps(settings))
        sampled = model.generate(ids, max_new_tokens=9, seed=3)
        again = model.generate(ids, max_new_tokens=9, seed=3, temperature=0.5, top_k=3, stop_tokens=[one.tokens[1]])
        assert sampled == again
        assert sampled != model.generate(ids, max_new_tokens=9, seed=3, temperature=0.0)
        for damage in ('{"eos_token_id": "x"}', '{"do_sample": true, "top_p": 7}', "["):
            file.write_text(damage)
            with pytest.raises(AdapterFormatError, match="export the bundle again"):
                model.generate(ids, max_new_tokens=1)


def test_stop_strings_end_rows_within_their_texts(shown: Path) -> None:
    """Each row its own; the token that completes one is among the tokens, and no other row notices."""
    prompts, rows = [[1, 5, 6], [1, 7], [1, 8, 9, 10], [1, 2]], ["a", None, "b", {"a": 0.5, "b": 0.5}]
    with MultiAdapterModel(shown) as model:
        free = model.generate(prompts, rows, max_new_tokens=16, stop_tokens=[])
        texts = [str(one.text) for one in free]
        stops = [[texts[0][7:12], "nothing"], None, texts[2].split(" ")[5], []]
        got = model.generate(prompts, rows, max_new_tokens=16, stop_tokens=[], stop=stops)
        assert got[1] == free[1]
        assert got[3] == free[3]
        for i, stop in ((0, texts[0][7:12]), (2, stops[2])):
            assert isinstance(stop, str)
            at = texts[i].index(stop)
            assert (got[i].text, got[i].finish) == (texts[i][:at], "stop")
            length = len(got[i].tokens)
            assert got[i].tokens == free[i].tokens[:length]
            whole = [" ".join(f"w{t}" for t in free[i].tokens[:n]) for n in (length - 1, length)]
            assert (stop in whole[0], stop in whole[1]) == (False, True)
        together = model.generate(prompts, rows, max_new_tokens=16, stop_tokens=[], stop=stops, slots=1)
        assert [one.text for one in together] == [one.text for one in got]
        file = shown / "generation_config.json"
        file.unlink(missing_ok=True)
        file.write_text(json.dumps({"stop_strings": [texts[0][7:12]], "max_new_tokens": 16}))
        (ended,) = model.generate(prompts[:1], "a", stop_tokens=[])
        assert ended == got[0]
        (free_again,) = model.generate(prompts[:1], "a", stop_tokens=[], stop=[])
        assert free_again == free[0]
        file.write_text(json.dumps({"max_length": 9}))
        assert [len(one.tokens) for one in model.generate(prompts, rows, stop_tokens=[])] == [6, 7, 5, 7]


def test_a_model_in_memory_brings_its_defaults(made: Made, tmp_path: Path) -> None:
    """What was set on it, whatever stands in the folder that it came from."""
    made.model.save_pretrained(tmp_path / "base")
    base: Any = DECODERS["llama"].model()
    base.config.name_or_path = str(tmp_path / "base")
    base.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=7, temperature=0.5, eos_token_id=[5, 2], max_new_tokens=9
    )
    defaults = read_defaults(export_merged(base, made.adapters["a"], tmp_path / "bundle"))
    assert defaults.sampling({}) == Sampling(temperature=0.5, top_k=7)
    assert (defaults.stops, defaults.max_new_tokens) == (frozenset({2, 5}), 9)


def test_streams_give_the_tokens_and_texts_of_generate(shown: Path) -> None:
    prompts, rows = [[1, 5, 6], [1, 7], [1, 8, 9, 10]], ["a", None, "b"]
    with MultiAdapterModel(shown) as model:
        free = model.generate(prompts, rows, max_new_tokens=12, stop_tokens=[])
        stop = str(free[0].text)[6:14]
        options: dict[str, Any] = {
            "max_new_tokens": 12, "stop": [[stop], None, []], "stop_tokens": [[], [free[1].tokens[3]], []],
        }  # fmt: skip
        want = model.generate(prompts, rows, logprobs=True, **options)
        assert [one.finish for one in want] == ["stop", "stop", "length"]
        events = [*model.stream(prompts, rows, logprobs=True, **options)]
        shown_texts = [""] * 3
        for event in events:
            assert event.text is not None
            shown_texts[event.request] += event.text
            assert str(free[event.request].text).startswith(shown_texts[event.request])  # never taken back
        got = collect(events, 3, logprobs=True)
        assert [(one.tokens, one.finish, one.text) for one in got] == [(o.tokens, o.finish, o.text) for o in want]
        assert sum(event.finish is not None for event in events) == 3
        assert len({event.request for event in events[:3]}) > 1  # side by side


def test_a_chat_goes_through_the_template(shown: Path) -> None:
    (shown / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}w3 {{ m.content }} {% endfor %}w4"})
    )
    with MultiAdapterModel(shown) as model:
        chat = [{"role": "user", "content": "w5"}, {"role": "user", "content": "w6"}]
        (got, other) = model.generate([chat, "w3 w5 w3 w6 w4"], "a", max_new_tokens=5)
        (want, beside) = model.generate([np.array([3, 5, 3, 6, 4]), [1, 3, 5, 3, 6, 4]], "a", max_new_tokens=5)
        assert (got, other) == (want, beside)


def test_a_tokenizer_that_fails_ends_the_call_with_one_error(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(TextStream):
        def __init__(self, *_: object) -> None:
            self.finished = False

        def push(self, token: int) -> str:
            raise AdapterFormatError("tokenizer.json cannot be read")

    with MultiAdapterModel(shown) as model:
        before = model.generate([[1, 5]], max_new_tokens=3)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "TextStream", Failing)
            with pytest.raises(AdapterFormatError, match=r"tokenizer\.json cannot be read"):
                model.generate([[1, 5], [1, 6]], max_new_tokens=3, stop="x")
            with pytest.raises(AdapterFormatError, match=r"tokenizer\.json cannot be read"):
                [*model.stream([[1, 5]], max_new_tokens=3)]
        assert model.generate([[1, 5]], max_new_tokens=3) == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": "text"}, "must be a list"),
        ({"prompts": ["text"]}, r"has no tokenizer\.json; pass token ids instead"),
        ({"prompts": [[1], []]}, "prompt 1 has no token"),
        ({"prompts": [[1, -2]]}, "token ids must not be negative"),
        ({"prompts": [[1.5]]}, "prompt 0 must be token ids"),
        ({"prompts": [[1], [[3], [3, 4]]]}, "prompt 1 must be token ids"),
        ({"prompts": [[2**63]]}, "prompt 0 holds 9223372036854775808"),
        ({"prompts": [[1], [VOCABULARY]]}, f"prompt 1: .* token ids of this model are below {VOCABULARY}"),
        ({"prompts": [[1], [2]], "temperature": [0.5, -1]}, "prompt 1: temperature must be a number"),
        ({"max_new_tokens": b"1"}, "max_new_tokens must be an integer from 1"),
        ({"temperature": 10**400}, "temperature must be a number from 0 on"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be a number above 0 on"),
        ({"stop_tokens": 5}, "stop_tokens must be token ids"),
        ({"stop_tokens": b"ab"}, "stop_tokens must be token ids"),
        ({"stop_tokens": [VOCABULARY]}, f"token ids of this model are below {VOCABULARY}"),
        ({"stop_tokens": [[VOCABULARY]]}, f"token ids of this model are below {VOCABULARY}"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1"),
        ({"temperature": -0.1}, "temperature must be a number from 0 on, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 0.0}, "top_p must be a number above 0 to 1"),
        ({"min_p": 2}, "min_p must be a number from 0 to 1"),
        ({"top_k": -1}, "top_k must be an integer from 0 on"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0 on"),
        ({"seed": -1}, "seed must be an integer from 0 on"),
        ({"seed": [1, 2]}, "or one for each of the 1 rows"),
        ({"stop_tokens": ["x"]}, "stop_tokens must be token ids"),
        ({"adapters": ["a", "b"]}, "adapters has 2 entries for a batch of 1"),
        ({"prompts": [""]}, "prompt 0 is empty"),
        ({"prompts": [{"role": "user", "content": "w1"}]}, "a chat is a list of messages of its own"),
        ({"prompts": [[{"role": "user", "content": "w1"}]]}, "has no chat template"),
        ({"prompts": [[{"role": "user"}]]}, "has no chat template"),
        ({"stop": ""}, "stop must be texts of at least one character"),
        ({"stop": 3}, "stop must be a text, texts, or such for each row"),
        ({"stop": [["a"], ["b"]]}, "stop has 2 entries for 1 rows"),
        ({"stop": "a"}, r"has no tokenizer\.json, which stop strings need; give stop tokens instead"),
        ({"slots": 0}, "slots must be a positive integer"),
        ({"max_length": 0}, "max_length must be an integer from 1"),
        ({"max_length": 40, "max_new_tokens": 39}, "are 41 in all, max_length allows at most 40"),
    ],
)
def test_requests_that_cannot_be_are_refused(model: MultiAdapterModel, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        model.generate(**{"prompts": [[1, 2]], **arguments})


def test_what_cannot_generate_says_so(
    made: Made, model: MultiAdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownAdapterError):
        model.generate([[1]], "nobody")
    plain = MultiAdapterModel(write_bundle(tmp_path / "plain", {}))
    with plain, pytest.raises(ConfigError, match="has no key-value cache, which generate needs"):
        plain.generate([[1]])

    def full(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ort_module.OrtBackend, "steps", full)
        with pytest.raises(ConfigError, match="no memory for the cache of 1 rows of 66 tokens"):
            model.generate([[1, 2]])
    with MultiAdapterModel(made.bundle, max_batch=2) as small, pytest.raises(ConfigError, match="has 3 rows"):
        small.generate([[1]] * 3)


def test_nan_is_refused_with_its_row_and_leaves_the_others_unharmed(
    model: MultiAdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = SharedSteps.decode, []

    def damaged(self: SharedSteps, *arguments: Any) -> Array:
        logits = decode(self, *arguments)
        calls.append(len(logits))
        if len(calls) == 2:
            logits[1, 5] = np.nan
        return logits

    before = model.generate(PROMPTS[:3], "a", max_new_tokens=5, stop_tokens=[])
    with monkeypatch.context() as patch:
        patch.setattr(SharedSteps, "decode", damaged)
        with pytest.raises(SdctError, match="row 1: the model gives NaN or infinite logits after 2 new tokens"):
            model.generate(PROMPTS[:3], "a", max_new_tokens=5, stop_tokens=[])
    assert model.generate(PROMPTS[:3], "a", max_new_tokens=5, stop_tokens=[]) == before
