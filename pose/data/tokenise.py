"""Text to token ids: on all cores, and in bounded memory however long a document is.

A fast tokenizer keeps some hundred bytes for each token of what it is given, so long documents are
given to it in pieces. That the pieces have the tokens of the whole is not assumed:

* A cut lies where no token of the vocabulary can lie across it: before a space or after a line break,
  for vocabularies in which no token has a letter before that space, or anything after that line break.
* At each cut, the characters around it are tokenised together and as two pieces. Where the two differ,
  another place is taken.
* A piece is given with the character before it, the anchor, whose tokens are taken away again: so a
  tokenizer that puts a space before every text does to a piece what it does inside a text.

So a rule of a tokenizer may look at 256 characters around a place, and no further. Text without such a
place, and a tokenizer without a Rust backend, is tokenised whole.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

PIECE = 1 << 16  # characters
AROUND = 256  # characters at each side of a cut that are tokenised both ways
TRIES = 16  # places for a cut that are looked at for each piece
# Places for a cut, and what a token that reaches across such a place looks like.
CUTS = (
    (re.compile(r"(?<=[^\s]\n)(?=\S)"), re.compile(r"\n\S")),
    (re.compile(r"(?<=[^\W_])(?= [^\W\d_])"), re.compile(r"\S \S")),
)
_BYTES_OF_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"})


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
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self._cuts = None

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
        """The first good place at or after `after`, with the number of tokens of its anchor."""
        for places in self._kinds():
            tries = 0
            for match in places.finditer(text, after):
                cut, tries = match.start(), tries + 1
                if cut > len(text) - AROUND or tries > TRIES:
                    break
                both = text[cut - AROUND : cut + AROUND]
                whole, left, anchor, right = self.encode(
                    [both, both[:AROUND], both[AROUND - 1 : AROUND], both[AROUND - 1 :]]
                )
                n = len(anchor)
                if np.array_equal(right[:n], anchor) and np.array_equal(whole, np.concatenate([left, right[n:]])):
                    return cut, n
        return None

    def _kinds(self) -> list[re.Pattern]:
        if self._cuts is None:
            tokens = [token.translate(_BYTES_OF_SPACES) for token in self.tokenizer.get_vocab()]
            self._cuts = [cut for cut, across in CUTS if not any(across.search(token) for token in tokens)]
        return self._cuts


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
