"""Text to hide things in: sentences, words, and texts of an exact number of tokens, for any tokenizer."""

import bisect
import hashlib
import json
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import islice, product
from typing import Protocol

from pose.errors import ConfigError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A sentence ends in . ! or ?, closing quotes and brackets, and a space before what a sentence may begin with; or in the
# full-width forms of these.
_END = re.compile(r"""(?<=[.!?])["'”’)\]]* (?=["'“‘(\[]?[A-Z0-9])|(?<=[。！？])[”’」』）]* ?(?=.)""")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Rev|Hon|Capt|Col|Gen|Prof|No|vs|[A-Z])\.$")

LONGEST_SENTENCE = 600  # characters

LONGEST_TOKEN = 16  # characters, about
CLOSE = 16  # tokens that are left for the filling
AROUND = 64  # characters beside the filling that are tokenised with it
UNITS_PER_TOKEN = 16  # of a draft's size, at most: a tokenizer that has no tokens for the filling would never stop
SHORTENINGS = 6  # words of the filling that may be given up for others
MOST_OTHERS = 3  # words that may take their place
MOST_TRIES = 32  # choices of several of them
SMALLER = 12  # sizes below the largest that are tried
LAST_RESORTS = (
    ".",
    " .",
    ",",
    "...",
    " a",
    "a",
    " -",
    ";",
    "!",
    "\n",
)  # where no words have the right number of tokens
MOST_REPEATS = 8  # of one of them


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """The English words of the package wonderwords, sorted; kind is noun, adjective or verb.

    Raises:
        ConfigError: the package is missing.
    """
    try:
        lines = (resources.files("wonderwords") / "assets" / f"{kind}list.txt").read_text("utf-8").splitlines()
    except ModuleNotFoundError as error:
        raise ConfigError(
            "needle, needle_gain and ruler take their words from the package wonderwords: pip install wonderwords"
        ) from (error)
    return tuple(sorted({line.strip() for line in lines if line.strip()}))


@cache
def words_digest() -> str:
    """SHA-256 of all word lists."""
    lists = [word_list(kind) for kind in ("noun", "adjective", "verb")]
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by its punctuation and its paragraphs; line breaks become spaces.

    What is longer than LONGEST_SENTENCE is cut between words: a text may have no sentences.

    Raises:
        ConfigError: there is no text.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph, begin = " ".join(paragraph.split()), 0
        for end in _END.finditer(paragraph):
            sentence = paragraph[begin : end.end()].rstrip(" ")
            if not _ABBREVIATION.search(sentence):
                sentences.append(sentence)
                begin = end.end()
        sentences.append(paragraph[begin:])
    wrapped = (textwrap.wrap(sentence, LONGEST_SENTENCE, break_on_hyphens=False) for sentence in sentences)
    pieces = [piece for lines in wrapped for piece in lines]
    if not pieces:
        raise ConfigError("{group}.haystack is empty: give a text to hide needles in", group="eval")
    return pieces


def no_tokens() -> ConfigError:
    """The error for a haystack whose text a tokenizer drops."""
    return ConfigError("{group}.haystack has no text that this tokenizer has tokens for", group="eval")


class Draft(Protocol):
    """A text whose size can be chosen, with a place where words can be filled in.

    Attributes:
        smallest: the least size.
    """

    smallest: int

    def parts(self, size: int) -> tuple[str, str]:
        """The text before the filling, and that after it."""

    def words(self, size: int, num: int) -> Sequence[str]:
        """The first num words that go on from there."""

    def other_words(self, size: int) -> Sequence[str]:
        """Words that may stand in place of the last one."""

    def join(self, size: int, words: Sequence[str]) -> str:
        """Words as a filling; none give the empty text."""


class ExactTexts:
    """Makes texts of an exact number of tokens.

    Args:
        tokenizer: a transformers tokenizer.
        num_added: special tokens that will stand before the text, and are counted.
    """

    def __init__(self, tokenizer, num_added: int = 0):
        self.tokenizer, self.num_added = tokenizer, num_added

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def count(self, text: str) -> int:
        """Tokens of a text, with those that will stand before it."""
        return self.num_added + len(self.ids(text))

    def shortest(self, draft: Draft) -> int:
        """Tokens of the smallest text of a draft."""
        return self.count("".join(draft.parts(draft.smallest)))

    def fit(self, draft: Draft, length: int) -> str | None:
        """The text of a draft with exactly `length` tokens, all of it tokenised at once.

        First the size: the largest that fits, or one a few tokens below. Then the filling: the words that go on from
        there, the last of them exchanged where they do not have the tokens that are missing. Only some characters are
        tokenised for each filling; the whole text is when one is found, and what it differs by is taken into account.

        Returns:
            None where no text was found, as when the smallest is too long.
        """
        size, count = self._size(draft, length)
        if size >= draft.smallest + UNITS_PER_TOKEN * length:
            return None
        sizes = range(size, max(size - SMALLER, draft.smallest) - 1, -1)
        for fillings in (self._words, self._last_resorts):
            for smaller in sizes:
                before, after = draft.parts(smaller)
                wanted = length - (count if smaller == size else self.count(before + after))
                for _ in range(3):
                    filling = fillings(draft, smaller, before[-AROUND:], after[:AROUND], wanted)
                    if filling is None:
                        break
                    text = before + filling + after
                    off = length - self.count(text)
                    if off == 0:
                        return text
                    wanted += off
        return None

    def _size(self, draft: Draft, length: int) -> tuple[int, int]:
        """A size whose text has at most `length` tokens, at most CLOSE less or the largest such; and their number."""
        low, high = draft.smallest, None
        low_count = self.count("".join(draft.parts(low)))
        step, tries = 8, 0  # for the first guess of the tokens of one unit
        largest = low + UNITS_PER_TOKEN * length
        while length - low_count > CLOSE and (low < largest if high is None else high - low > 1):
            guess = min(low + step, largest if high is None else high - 1)
            count = self.count("".join(draft.parts(guess)))
            per_unit = max((count - low_count) / (guess - low), 1e-3)
            if count <= length:
                low, low_count = guess, count
            else:
                high = guess
            tries += 1
            step = int((length - low_count - CLOSE / 2) / per_unit)
            if high is not None and tries > 8:
                step = (high - low) // 2
            step = max(step, 1)
        return low, low_count

    def _words(self, draft: Draft, size: int, before: str, after: str, missing: int) -> str | None:
        """A filling of words with so many tokens between these texts: those that go on, or others at its end."""
        begun = self._begun(draft, size, before, after, missing)
        for words, cost in begun:
            if cost == missing:
                return draft.join(size, words)
        longest = LONGEST_TOKEN * (max(missing, 0) + CLOSE)
        others = [word for word in draft.other_words(size) if len(word) <= longest]
        for words, cost in begun:
            costs = self._costs(before, [draft.join(size, [*words, word]) for word in others], after)
            if missing in costs:
                return draft.join(size, [*words, others[costs.index(missing)]])
            kinds = dict(zip(costs[::-1], others[::-1], strict=True))  # one word for each number of tokens
            kinds = {each: word for each, word in kinds.items() if each <= missing}
            endings = (
                [kinds[each] for each in ending]
                for num in range(2, MOST_OTHERS + 1)
                for ending in product(kinds, repeat=num)
                if sum(each - cost for each in ending) == missing - cost
            )
            fillings = [draft.join(size, words + ending) for ending in islice(endings, MOST_TRIES)]
            costs = self._costs(before, fillings, after)
            if missing in costs:
                return fillings[costs.index(missing)]
        return None

    def _last_resorts(self, draft: Draft, size: int, before: str, after: str, missing: int) -> str | None:
        """A filling with so many tokens between these texts, of words, the beginning of one and other characters."""
        begun = self._begun(draft, size, before, after, missing)
        for text in [
            *(draft.join(size, words) for words, _ in begun),
            *self._pieces(draft, size, before, after, missing),
        ]:
            for repeats in range(1, MOST_REPEATS + 1):
                fillings = [text + a + b * repeats for a, b in product(("", *LAST_RESORTS), LAST_RESORTS)]
                costs = self._costs(before, [text, *fillings], after)
                if missing in costs:
                    return [text, *fillings][costs.index(missing)]
        return None

    def _pieces(self, draft: Draft, size: int, before: str, after: str, missing: int) -> list[str]:
        """Fillings of at most `missing` tokens, the longest first, that end within a word: where few words fit.

        Text without spaces has sentences for words.
        """
        word = next(iter(draft.words(size, 1)), "")
        longest = bisect.bisect_right(
            range(1, len(word)), missing,
            key=lambda num: self._costs(before, [draft.join(size, [word[:num]])], after)[0],
        )  # fmt: skip
        return [draft.join(size, [word[:num]]) for num in range(longest, max(longest - SHORTENINGS, 0), -1)]

    def _begun(self, draft: Draft, size: int, before: str, after: str, missing: int) -> list[tuple[list[str], int]]:
        """The words that go on from there, as many as have at most `missing` tokens, or fewer; and their tokens."""
        words, costs = list(draft.words(size, max(missing, 0))), [0]
        while len(costs) <= len(words) and costs[-1] <= missing + CLOSE:  # a word may be a sentence
            more = range(len(costs), min(2 * len(costs), len(words) + 1))
            costs += self._costs(before, [draft.join(size, words[:k]) for k in more], after)
        return [(words[:k], cost) for k, cost in enumerate(costs) if cost <= missing][: -SHORTENINGS - 1 : -1]

    def _costs(self, before: str, fillings: Sequence[str], after: str) -> list[int]:
        """The tokens that each filling adds between two texts."""
        texts = [before + filling + after for filling in ("", *fillings)]
        base, *counts = map(len, self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        return [count - base for count in counts]
