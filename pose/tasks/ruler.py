"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654) as prompts for base models, of an exact length.

docs/RULER.md sets every parameter beside the public definition. The prompt ends with RULER's answer prefix. A prompt is
a pure function of (seed, task, length, trial); keys, answers and depths are those of (seed, task, trial), so that
lengths are compared on the same questions, and a prompt that fits into a length fits into all longer ones.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pose.errors import ConfigError
from pose.tasks.haystack import NOISE, ExactTexts, no_tokens, split_sentences, word_list

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
DEPTHS = tuple(float(d) / 100 for d in np.round(np.linspace(0, 100, 40)))

VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num} variables are assgined the "
    "value {value}, they are:",
)
VT_CHAINS, VT_HOPS, VT_LETTERS, VT_EXAMPLE_LETTERS = 1, 4, 5, 3
VT_EXAMPLE_TOKENS, VT_EXAMPLE_STEP = 500, 5  # its tokens, answer and generation included; noises are added by five

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
CWE_COMMON = 10  # words that are asked for


class Repeats(NamedTuple):
    """How often words stand in a list of `cwe`."""

    common: int
    uncommon: int
    example_words: int
    example_common: int
    example_uncommon: int


CWE_LONG, CWE_SHORT, CWE_LONG_FROM = Repeats(30, 3, 40, 10, 3), Repeats(6, 1, 20, 3, 1), 4096

FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
FWE_LETTERS, FWE_ALPHA, FWE_TOKENS_PER_WORD = 6, 2.0, 50
ZETA_2 = np.pi**2 / 6  # the Riemann zeta function at FWE_ALPHA


class Needles(NamedTuple):
    """What a needle task hides, and in what.

    Attributes:
        haystack: repeat (one sentence, again and again), essay (text), needle (other needles).
        keys, values: words, numbers or uuids.
        num_keys, num_values, num_queries: keys, values of each key, keys that are asked for.
    """

    haystack: str
    keys: str = "word"
    values: str = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuid"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuid", values="uuid"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}
TASKS = (*NEEDLES, "vt", "cwe", "fwe")
TOKENS_TO_GENERATE = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120, "fwe": 50}


class RulerPrompt(NamedTuple):
    """A prompt and what it asks for.

    Attributes:
        text: ends with the answer prefix.
        answers: all of them, in the order of the question.
        depths: of the needles in the haystack, in [0, 1], in order; empty for tasks without needles.
    """

    text: str
    answers: list[str]
    depths: list[float]


class RulerPrompts:
    """Makes the prompts of one task, for any tokenizer.

    Args:
        task: one of TASKS.
        tokenizer: a transformers tokenizer.
        haystack: the text that needles of the essay kind lie in; begun again where it is too short.
        depths: see `sample`.
        num_added: special tokens that stand before a prompt, and are counted in its length.
        key: of the config that names the task, for errors.

    Raises:
        ConfigError: an unknown task, or a haystack without text, or without any that the tokenizer knows.
    """

    def __init__(
        self,
        task: str,
        tokenizer,
        haystack: str,
        *,
        depths: Sequence[float] | None = None,
        num_added: int = 0,
        key: str = "task",
    ):
        if task not in TASKS:
            reason = " (qa_1 and qa_2 need SQuAD and HotpotQA, and are not made here)" if task.startswith("qa") else ""
            raise ConfigError(
                f"{key}: ruler has no task {task!r}{reason}, choose from {', '.join(TASKS)}", group="eval"
            )
        self.task, self.depths, self.texts = task, depths, ExactTexts(tokenizer, num_added)
        self.essay = split_sentences(haystack) if getattr(NEEDLES.get(task), "haystack", None) == "essay" else []
        if self.essay and not any(map(self.texts.ids, self.essay)):
            raise no_tokens()

    def sample(self, seed: int, length: int, trial: int) -> RulerPrompt:
        """The prompt of a trial, of exactly `length` tokens.

        Needles lie before the sentence at `depth` times the number of sentences, rounded down. Without depths they are
        drawn as RULER does. A trial with one needle that is asked for takes its depth from the given ones in turn, and
        needles beside it are drawn; several that are asked for lie at a sorted sample of the given depths.

        Args:
            seed, length, trial: all that the prompt depends on, besides the arguments of the class.

        Raises:
            ConfigError: the length is too short; names task, length, and the shortest for this trial.
        """
        draft = self._draft(seed, length, trial)
        text = self.texts.fit(draft, length)
        if text is None:
            if self._fits(seed, length, (trial,)):
                raise ConfigError(
                    f"no prompt of ruler/{self.task} with exactly {length} tokens was found with this tokenizer (trial "
                    f"{trial}): give another length"
                )
            raise self._too_short(length, self._shortest(seed, length, (trial,)))
        return RulerPrompt(text, draft.answers, getattr(draft, "depths", []))

    def check(self, seed: int, length: int, num: int):
        """Makes sure that trials 0 to num - 1 fit into a length, without making them.

        Raises:
            ConfigError: one does not; names task, length, and the shortest that is possible for all.
        """
        if not self._fits(seed, length, range(num)):
            raise self._too_short(length, self._shortest(seed, length, range(num)))

    def _too_short(self, length: int, shortest: int) -> ConfigError:
        return ConfigError(
            f"a prompt of ruler/{self.task} with {length} tokens is not possible: with this tokenizer the shortest has "
            f"{shortest}"
        )

    def _fits(self, seed: int, length: int, trials: Sequence[int]) -> bool:
        return all(self.texts.shortest(self._draft(seed, length, trial)) <= length for trial in trials)

    def _shortest(self, seed: int, length: int, trials: Sequence[int]) -> int:
        """The length from which on, one by one downwards, the prompts of these trials fit."""
        while not self._fits(seed, length, trials):
            length = max(length + 1, *(self.texts.shortest(self._draft(seed, length, trial)) for trial in trials))
        while self._fits(seed, length - 1, trials):
            length -= 1
        return length

    def _draft(self, seed: int, length: int, trial: int):
        key = (seed, trial, *self.task.encode())
        if self.task == "vt":
            return VariableTracking(key, length, self.texts)
        if self.task == "cwe":
            return CommonWords(key, length, self.texts)
        if self.task == "fwe":
            return FrequentWords(key, length)
        return NeedleDraft(key, NEEDLES[self.task], self.essay, self._depths_of(key, trial))

    def _depths_of(self, key: tuple, trial: int) -> list[float] | None:
        """The depths of the needles that are asked for; None draws them."""
        if not self.depths:
            return None
        asked = NEEDLES[self.task].num_values * NEEDLES[self.task].num_queries
        if asked == 1:
            return [self.depths[trial % len(self.depths)]]
        rng = np.random.default_rng((*key, 1))
        drawn = rng.choice(self.depths, asked, replace=len(self.depths) < asked)
        return sorted(float(depth) for depth in drawn)


class NeedleDraft:
    """Needles in a haystack whose size is a number of words (essay) or of sentences."""

    smallest = 1

    def __init__(self, key: tuple, needles: Needles, essay: list[str], asked_depths: list[float] | None):
        self.rng, self.needles, self.essay = np.random.default_rng(key), needles, essay
        self.distractors: list[str] = []
        keys = distinct(lambda: self._draw(needles.keys), needles.num_keys)
        values = distinct(lambda: self._draw(needles.values), needles.num_keys * needles.num_values)
        pairs = [(keys[i // needles.num_values], value) for i, value in enumerate(values)]
        self.queries = [keys[i] for i in self.rng.permutation(needles.num_keys)[: needles.num_queries]]
        self.answers = [value for query in self.queries for name, value in pairs if name == query]
        self.hidden = [self._sentence(*pairs[i]) for i in self.rng.permutation(len(pairs))]
        self.keys = set(keys)
        self.depths = self._depths(asked_depths)
        if asked_depths is not None and len(self.answers) == 1:  # the needle that is asked for goes to the given depth
            answer = next(i for i, needle in enumerate(self.hidden) if f" {self.answers[0]}." in needle)
            place = self.depths.index(asked_depths[0])
            self.hidden[answer], self.hidden[place] = self.hidden[place], self.hidden[answer]
        self.distractor_rng = np.random.default_rng((*key, 2))
        kind, several = needles.values, len(self.answers) > 1
        query = ", ".join(self.queries[:-1]) + ", and " + self.queries[-1] if len(self.queries) > 1 else self.queries[0]
        form = {"kind": f"{kind}s" if several else kind, "query": query}
        self.head, question, prefix = (part.format(**form) for part in (NIAH if several else NIAH_ONE))
        self.tail = question + prefix
        self.sep = " " if needles.haystack == "essay" else "\n"
        self.num_words = [len(sentence.split(" ")) for sentence in essay]

    def _depths(self, asked: list[float] | None) -> list[float]:
        """Of all needles, sorted."""
        num = len(self.hidden)
        if asked is not None and len(asked) == num:
            return asked
        if self.needles.haystack == "essay":
            drawn = [DEPTHS[i] for i in self.rng.permutation(len(DEPTHS))[: num - len(asked or [])]]
        else:
            drawn = list(self.rng.random(num - len(asked or [])))
        return sorted([float(depth) for depth in drawn] + (asked or []))

    def _draw(self, kind: str, rng: np.random.Generator | None = None) -> str:
        rng = rng or self.rng
        if kind == "number":
            return str(rng.integers(1_000_000, 10_000_000))
        if kind == "uuid":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        return needle_word(rng)

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.needles.values, key=key, value=value)

    def parts(self, size: int) -> tuple[str, str]:
        sentences = self._haystack(size)
        places = [int(len(sentences) * depth) for depth in self.depths]
        before, done = [], 0
        for place, needle in zip(places, self.hidden, strict=True):
            if place == len(sentences):
                break
            before += [*sentences[done:place], needle]
            done = place
        after = self.hidden[sum(place < len(sentences) for place in places) :]
        text = self.head + self.sep.join(before + sentences[done:])
        return text, "".join(self.sep + needle for needle in after) + self.tail

    def _haystack(self, size: int) -> list[str]:
        if self.needles.haystack == "repeat":
            return [NOISE] * size
        if self.needles.haystack == "needle":
            rng, needles = self.distractor_rng, self.needles
            while len(self.distractors) < size:
                key = self._draw(needles.keys, rng)
                value = self._draw(needles.values, rng)
                if key not in self.keys and value not in self.answers:
                    self.distractors.append(self._sentence(key, value))
            return self.distractors[:size]
        sentences = []
        while size > 0:
            for sentence, num in zip(self.essay, self.num_words, strict=True):
                sentences.append(sentence if num <= size else " ".join(sentence.split(" ")[:size]))
                size -= num
                if size <= 0:
                    break
        return sentences

    def words(self, size: int, num: int) -> list[str]:
        if self.needles.haystack != "essay":
            return _cycle(NOISE.split(" "), num)
        text = " ".join(self._haystack(size + num)).split(" ")
        return text[size:]

    def other_words(self, size: int) -> list[str]:
        if self.needles.haystack != "essay":
            return list(dict.fromkeys(NOISE.split(" ")))
        return list(dict.fromkeys(word for sentence in self.essay[:40] for word in sentence.split(" ")))[:200]

    def join(self, size: int, words: Sequence[str]) -> str:
        return self.sep + " ".join(words) if words else ""


class VariableTracking:
    """An example, and a chain of variable assignments in noise; the size is the number of lines of noise."""

    smallest = 1

    def __init__(self, key: tuple, length: int, texts: ExactTexts):
        self.key, rng = key, np.random.default_rng(key)
        names = distinct(lambda: _letters(rng, VT_EXAMPLE_LETTERS, "A"), VT_HOPS + 1)
        example = _Chain((*key, 1), names, str(rng.integers(10_000, 99_999)))
        self.answers = distinct(lambda: _letters(rng, VT_LETTERS, "A"), VT_HOPS + 1)
        self.chain = _Chain((*key, 2), self.answers, str(rng.integers(10_000, 99_999)))
        self.example = self._example(example, min(VT_EXAMPLE_TOKENS, length // 2), texts)

    def _example(self, chain: "_Chain", budget: int, texts: ExactTexts) -> str:
        budget += texts.num_added - TOKENS_TO_GENERATE["vt"]
        text, num = "", 1
        while True:
            larger = "".join(chain.text(num)) + " " + " ".join(chain.names) + "\n\n\n\n"
            if text and (texts.count(larger) > budget or num > budget):  # num: noise may have no tokens
                return text
            text, num = larger, num - num % VT_EXAMPLE_STEP + VT_EXAMPLE_STEP

    def parts(self, size: int) -> tuple[str, str]:
        before, after = self.chain.text(size)
        return self.example + before, after

    def words(self, size: int, num: int) -> list[str]:
        return _cycle(NOISE.split(" "), num)

    def other_words(self, size: int) -> list[str]:
        return list(dict.fromkeys(NOISE.split(" ")))

    def join(self, size: int, words: Sequence[str]) -> str:
        return " " + " ".join(words) if words else ""


@dataclass
class _Chain:
    """Variables, each assigned the one before it, the first a value."""

    key: tuple
    names: list[str]
    value: str

    def text(self, num_noises: int) -> tuple[str, str]:
        """The task up to the end of the noise, and the question with the answer prefix."""
        lines = [f"VAR {self.names[0]} = {self.value}"]
        lines += [f"VAR {name} = VAR {other} " for other, name in zip(self.names, self.names[1:], strict=False)]
        sentences = [NOISE + "\n"] * num_noises
        if num_noises <= len(lines):
            sentences = [part + "." for part in NOISE.split(". ")] * num_noises
            sentences = [part.replace("..", ".\n") for part in sentences]
        rng = np.random.default_rng((*self.key, num_noises))
        places = sorted(rng.choice(len(sentences), len(lines), replace=len(sentences) < len(lines)))
        for i, (place, line) in enumerate(zip(places, lines, strict=True)):
            sentences.insert(int(place) + i, line)
        form = {"value": self.value, "num": len(self.names)}
        return VT[0] + " ".join(sentences), (VT[1] + VT[2]).format(**form)


class CommonWords:
    """An example, and a numbered list of words, ten of them more often; the size is the number of different words."""

    smallest = CWE_COMMON

    def __init__(self, key: tuple, length: int, texts: ExactTexts):
        self.key, self.rng = key, np.random.default_rng(key)
        words = sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)})
        self.supply = [words[i] for i in self.rng.permutation(len(words))]
        self._use(CWE_LONG)
        if length < CWE_LONG_FROM or texts.shortest(self) > length:
            self._use(CWE_SHORT)

    def _use(self, repeats: Repeats):
        self.repeats, num = repeats, repeats.example_words
        self.first = num  # word of the supply in the list; those before are the example's
        self.answers = self.supply[num : num + CWE_COMMON]
        common = self.supply[:CWE_COMMON]
        example = self._list(common, self.supply[CWE_COMMON:num], repeats.example_common, repeats.example_uncommon, 0)
        answer = _numbered(common)
        self.head = CWE[0] + _numbered(example) + CWE[1] + CWE[2] + " " + answer + "\n" + CWE[0]

    def _list(self, common: list[str], uncommon: list[str], often: int, seldom: int, salt: int) -> list[str]:
        entries = common * often + uncommon * seldom
        rng = np.random.default_rng((*self.key, salt, len(entries)))
        return [entries[i] for i in rng.permutation(len(entries))]

    def _words(self, end: int) -> list[str]:
        """The supply up to a word. Where the English words are used up, an adjective and a noun are one."""
        known = set(self.supply) if len(self.supply) < end else set()
        while len(self.supply) < end:
            word = needle_word(self.rng)
            if word not in known:
                known.add(word)
                self.supply.append(word)
        return self.supply[:end]

    def _num_entries(self, size: int) -> int:
        return CWE_COMMON * self.repeats.common + (size - CWE_COMMON) * self.repeats.uncommon

    def parts(self, size: int) -> tuple[str, str]:
        uncommon = self._words(self.first + size)[self.first + CWE_COMMON :]
        entries = self._list(self.answers, uncommon, self.repeats.common, self.repeats.uncommon, 1)
        return self.head + _numbered(entries), CWE[1] + CWE[2]

    def words(self, size: int, num: int) -> list[str]:
        return self._words(self.first + size + num)[self.first + size :]

    def other_words(self, size: int) -> list[str]:
        return self.words(size, 200)

    def join(self, size: int, words: Sequence[str]) -> str:
        return " " + _numbered(words, self._num_entries(size) + 1) if words else ""


class FrequentWords:
    """Coded words by a zeta law, the most frequent one written as dots; the size is the number of words of the law."""

    smallest = 27  # the fourth word then stands there once, and the fifth not at all

    def __init__(self, key: tuple, length: int):
        self.key, rng = key, np.random.default_rng(key)
        self.vocabulary = ["...", *distinct(lambda: _letters(rng, FWE_LETTERS, "a"), self.num_codes(length))]
        self.answers = self.vocabulary[1:4]
        self.shares = np.arange(1, len(self.vocabulary) + 1) ** -FWE_ALPHA / ZETA_2

    @staticmethod
    def num_codes(length: int) -> int:
        """Different coded words, without the dots."""
        return max(length // FWE_TOKENS_PER_WORD, 4) - 1

    def counts(self, size: int) -> np.ndarray:
        """How often each word stands in the text: never the third answer as seldom as the next word."""
        while True:
            counts = (size * self.shares).astype(int)
            if len(counts) == 4 or counts[3] > counts[4]:
                return counts
            size -= 1

    def parts(self, size: int) -> tuple[str, str]:
        words = [word for word, count in zip(self.vocabulary, self.counts(size), strict=True) for _ in range(count)]
        order = np.random.default_rng((*self.key, len(words))).permutation(len(words))
        return FWE[0] + " ".join(words[i] for i in order), FWE[1] + FWE[2]

    def words(self, size: int, num: int) -> list[str]:
        return ["..."] * num

    def other_words(self, size: int) -> list[str]:
        return ["." * n for n in range(1, 13)]

    def join(self, size: int, words: Sequence[str]) -> str:
        return "".join(f" {word}" for word in words)


def needle_word(rng: np.random.Generator) -> str:
    """An adjective and a noun, such as `small-river`."""
    return "-".join(kind[rng.integers(len(kind))] for kind in (word_list("adjective"), word_list("noun")))


def distinct(draw, num: int) -> list[str]:
    """The first num different texts that `draw` gives."""
    found: dict[str, None] = {}
    while len(found) < num:
        found[draw()] = None
    return list(found)


def _letters(rng: np.random.Generator, num: int, first: str) -> str:
    return "".join(chr(ord(first) + i) for i in rng.integers(26, size=num))


def _numbered(words: Sequence[str], first: int = 1) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, first))


def _cycle(words: Sequence[str], num: int) -> list[str]:
    return [words[i % len(words)] for i in range(num)]
