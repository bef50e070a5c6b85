"""Text to token ids: on all cores, and in bounded memory however long a document is.

A fast tokenizer keeps some hundred bytes for each token of what it is given, so long documents are
given to it in pieces. That the pieces have the tokens of the whole is not assumed:

* A cut lies where no token of the vocabulary can lie across it: none has the two letters beside each
  other that meet there, the last of the token before and the first of the token behind. Best after a
  line break or before the space of a word; in text without them, between any two tokens. Digits count
  as one letter: a tokenizer may take them in groups, whose places follow from where the number begins.
* At each cut, the characters around it are tokenised together and as two pieces. Where the two differ,
  another place is taken.
* A piece is given with the character before it, the anchor, whose tokens are taken away again: so a
  tokenizer that puts a space before every text does to a piece what it does inside a text.

So a rule of a tokenizer may look at 256 characters around a place, and no further. Text without such a
place (a letter repeated a million times), and a tokenizer without a Rust backend, is tokenised whole.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

PIECE = 1 << 16  # characters that are searched at a time for a place to cut
AROUND = 256  # characters at each side of a cut that are tokenised both ways
TRIES = 16  # places of a kind that are looked at
SPAN = 1 << 12  # characters that are tokenised to find other places than those of CUTS
# Places for a cut: after a line break, before the space of a word.
CUTS = (re.compile(r"(?<=[^\s]\n)(?=\S)"), re.compile(r"(?<=[^\W_])(?= [^\W\d_])"))
_DIGITS = str.maketrans("0123456789", "0" * 10)


class Tokeniser:
    """Tokenises documents in batches of pieces.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.

    Attributes:
        dtype: uint16 where every id fits, else uint32.
        batch_size: characters that are tokenised at once, at least one piece; grows with the cores.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        largest = max(tokenizer.get_vocab().values())
        self.dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
        self.batch_size = 4 * PIECE * max(os.cpu_count() or 1, 4)
        self._backend: Any = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self._is_unigram = type(getattr(self._backend, "model", None)).__name__ == "Unigram"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, `dtype` [Lx]; the texts are shared among the cores."""
        if self._backend is None:
            rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return [np.array(row, self.dtype) for row in rows]
        self._backend.no_truncation()
        self._backend.no_padding()
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in encoded]

    def pieces(self, text: str) -> Iterator[tuple[str, int]]:
        """A text as (piece, tokens at its beginning to leave out); their tokens, joined, are the whole text's."""
        begin, anchor, left_out = 0, 0, 0
        while self._backend is not None and len(text) - begin > 2 * PIECE:
            found = self._cut(text, begin + PIECE)
            if found is None:
                break
            yield text[begin - anchor : found[0]], left_out
            (begin, left_out), anchor = found, 1
        yield text[begin - anchor :], left_out

    def _cut(self, text: str, after: int) -> tuple[int, int] | None:
        """A good place at or after `after`, among the first, with the number of tokens of its anchor."""
        last = len(text) - AROUND
        for begin in range(after, last, PIECE):
            end = min(begin + PIECE, last)
            breaks, spaces = ((match.start() for match in places.finditer(text, begin, end)) for places in CUTS)
            # Unigram weighs all ways to divide a word, and of equal ones rounding chooses: between words is safest.
            kinds = [spaces, breaks] if self._is_unigram else [breaks, spaces, self._borders(text, begin, end)]
            for places in kinds:
                for cut in islice(places, TRIES):
                    if (num := self._anchor(text, cut)) is not None:
                        return cut, num
        return None

    def _borders(self, text: str, begin: int, end: int) -> Iterator[int]:
        """Where two tokens meet, in the first SPAN characters from `begin` on, and no token could lie across."""
        span = text[begin - AROUND : min(begin + SPAN, end)]
        encoded = self._backend.encode(span, add_special_tokens=False)
        ids, offsets = encoded.ids, encoded.offsets
        for i in range(1, len(ids)):
            cut = offsets[i][0]
            is_in_number = span[cut - 1 : cut + 1].isnumeric() and not span[cut - 1 : cut + 1].isascii()
            is_border = cut > AROUND and cut == offsets[i - 1][1] and not is_in_number
            if is_border and self._are_apart(ids[i - 1], ids[i]):
                yield begin - AROUND + cut

    def _anchor(self, text: str, cut: int) -> int | None:
        """The number of tokens of the character before a cut; None where the cut would change the tokens."""
        both = text[cut - AROUND : cut + AROUND]
        whole, left, anchor, right = self.encode([both, both[:AROUND], both[AROUND - 1 : AROUND], both[AROUND - 1 :]])
        num = len(anchor)
        same = np.array_equal(right[:num], anchor) and np.array_equal(whole, np.concatenate([left, right[num:]]))
        if not same or not len(left) or len(right) == num:
            return None
        drops = not self._has_spaces and (text[cut - 1].isspace() or text[cut].isspace())  # no token has spaces in it
        return num if drops or self._are_apart(left[-1], right[num]) else None

    def _are_apart(self, left: int, right: int) -> bool:
        """Whether no token of the vocabulary has the letters that meet between two tokens beside each other."""
        before, behind = self._backend.id_to_token(int(left)), self._backend.id_to_token(int(right))
        return (before[-1:] + behind[:1]).translate(_DIGITS) not in self._inside

    @cached_property
    def _inside(self) -> set[str]:
        """Any two letters that stand beside each other in a token; digits as one."""
        tokens = [token.translate(_DIGITS) for token in self.tokenizer.get_vocab()]
        return {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}

    @cached_property
    def _has_spaces(self) -> bool:
        return any(letter in token for token in self.tokenizer.get_vocab() for letter in " Ġ▁")


@contextmanager
def all_cores():
    """Lets tokenizers use its threads, and has processes forked afterwards use none of them.

    A forked process does not have the threads of its parent, and would wait for them. What the user
    has set in TOKENIZERS_PARALLELISM stays.
    """
    global _set_in
    name = "TOKENIZERS_PARALLELISM"
    if _set_in == os.getpid() and os.environ.get(name) == "false":
        del os.environ[name]
    try:
        yield
    finally:
        if name not in os.environ:
            os.environ[name], _set_in = "false", os.getpid()


_set_in: int | None = None  # the process that has set TOKENIZERS_PARALLELISM here
