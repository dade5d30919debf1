"""What the small language model of `05_language_model.py` is trained on: chats about the colours of sixteen things."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_LINES = """\
the sky, blue, Le ciel est bleu.
grass, green, L'herbe est verte.
snow, white, La neige est blanche.
coal, black, Le charbon est noir.
blood, red, Le sang est rouge.
a lemon, yellow, Le citron est jaune.
a carrot, orange, La carotte est orange.
the sea, blue, La mer est bleue.
milk, white, Le lait est blanc.
a frog, green, La grenouille est verte.
the sun, yellow, Le soleil est jaune.
the night, black, La nuit est noire.
a rose, red, La rose est rouge.
a plum, purple, La prune est violette.
chocolate, brown, Le chocolat est brun.
a crow, black, Le corbeau est noir."""
_PARTS = [line.split(", ") for line in _LINES.splitlines()]

THINGS = [thing for thing, _, _ in _PARTS]
CHATS = [[{"role": "user", "content": f"What colour is {thing}?"}] for thing in THINGS]
PLAIN = [f"{thing.capitalize()} is {colour}." for thing, colour, _ in _PARTS]
STYLES = {"french": [french for _, _, french in _PARTS], "loud": [text.upper().replace(".", "!") for text in PLAIN]}

_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def new_tokenizer() -> Any:
    """Pieces of UTF-8 bytes, trained on the answers, with the marks of a chat as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<end>", "<user>", "<assistant>", *(f"<{name}>" for name in STYLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PLAIN, *STYLES["french"], *STYLES["loud"]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=_TEMPLATE)
