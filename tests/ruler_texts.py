"""What the tests of RULER's prompts, of their scores and of its command share."""

from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
PLACES = ["north", "the old mill", "a river", "nowhere at all", "the sea and its islands", "unbelievable heights"]
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of {PLACES[i % 6]}. Has it an end? Yes!" for i in range(120))


@cache
def shipped():
    """The tokenizer of the shipped model."""
    return PreTrainedTokenizerFast.from_pretrained(TINY)
