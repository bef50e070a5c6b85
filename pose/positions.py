"""Which tokens of a document an example shows, and which position ids they get.

A sampler is a small frozen dataclass. ``sample(rng, document_len)`` is pure: the same generator
state gives the same example, and nothing is read or written.

Symbols follow the paper (PoSE, ICLR 2024, arXiv 2309.10400):
    L   train_len, tokens in a training example (the paper's Lc)
    T   target_len, the window to extend to (Lt); position ids are in [0, T)
    Lx  document_len, tokens in the document x that the example is drawn from
    N   num_chunks
    U{a..b} is uniform over the integers from a to b, both included; x[a:b] leaves b out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from pose.errors import ConfigError, require_choice, require_int, require_number


class Layout(NamedTuple):
    """One example, as indices only.

    Attributes:
        position_ids: int64 [L], strictly increasing, in [0, T).
        content_ids: int64 [L], the index in the document of each token, in [0, Lx).
        weights: float32 [L], above 0: how much each token counts in the loss of the example, beside the others of it;
            None: all alike. Only samplers that say so (`weighs_tokens`) give some.
    """

    position_ids: np.ndarray
    content_ids: np.ndarray
    weights: np.ndarray | None = None


def skip_before_question(position_ids: np.ndarray, is_answer: np.ndarray, question_len: int) -> np.ndarray:
    """The ids of a retrieval example with all that they skip put in one place: before the question of its first answer.

    Args:
        position_ids: int64 [L], as drawn.
        is_answer: bool [L], not all False.
        question_len: tokens of a question, which an answer follows.

    Returns:
        int64 [L], with the same first and last id: what is asked for stands before the skip, its questions behind it.
    """
    index = np.arange(len(position_ids))
    first = max(int(np.argmax(is_answer)) - question_len, 1)
    skipped = position_ids[-1] - position_ids[0] - index[-1]
    return position_ids[0] + index + np.where(index < first, 0, skipped)


@dataclass(frozen=True)
class PositionSampler(ABC):
    """What every sampler has in common.

    Args:
        train_len: tokens in a training example.
        target_len: the window to extend to, in tokens.
        curriculum: a target that grows over the run (`phases`): (share of the run at which a phase ends, its target in
            tokens), before the rest with target_len; None has none.

    Raises:
        ConfigError: a length is not an int of at least 2, or target_len < train_len; phases that are not in order.
    """

    train_len: int
    target_len: int
    curriculum: Sequence[tuple[float, int]] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        require_int("{group}.train_len", self.train_len, at_least=2, group="pose")  # one token predicts nothing
        require_int("{group}.target_len", self.target_len, at_least=2, group="pose")
        if self.target_len < self.train_len:
            raise ConfigError(
                f"{{group}}.target_len={self.target_len} is below {{group}}.train_len={self.train_len}: "
                "give a target of at least the training length",
                group="pose",
            )
        if self.curriculum is not None:
            object.__setattr__(self, "curriculum", self._checked_curriculum())

    def _checked_curriculum(self) -> tuple[tuple[float, int], ...] | None:
        """As tuples; None where it is empty."""
        if isinstance(self.curriculum, str) or not isinstance(self.curriculum, Sequence):
            raise ConfigError(
                f"{{group}}.curriculum={self.curriculum!r} is not accepted: give [[end, target], ...]", group="pose"
            )
        begin, least = 0.0, self.train_len
        for phase in self.curriculum:
            is_pair = isinstance(phase, Sequence) and not isinstance(phase, str) and len(phase) == 2
            end, target_len = phase if is_pair else (0, 0)
            is_phase = type(end) in (int, float) and type(target_len) is int
            if not is_phase or not begin < end < 1 or not least <= target_len <= self.target_len:
                raise ConfigError(
                    f"{{group}}.curriculum has the phase {list(phase) if is_pair else phase!r}: give [end, target], "
                    f"the end a share of the run above {begin:g} and below 1, the target at least {least} and at "
                    f"most {{group}}.target_len={self.target_len} tokens",
                    group="pose",
                )
            begin, least = end, target_len
        return tuple((end, target_len) for end, target_len in self.curriculum) or None

    @property
    def phases(self) -> "list[tuple[float, PositionSampler]]":
        """The phases of the curriculum: the share of the run at which each ends, and what draws its examples.

        Raises:
            ConfigError: this sampler does not take the target of a phase.
        """
        found = []
        for end, target_len in self.curriculum or ():
            where = f"{{group}}.curriculum has the phase {[end, target_len]}, and {self.name}"
            try:
                sampler = self.resized(self.train_len, target_len)
            except ConfigError as error:
                raise ConfigError(f"{where} does not take its target: {error}", group="pose") from error
            if sampler.example_len != self.example_len:
                raise ConfigError(
                    f"{where} draws examples as long as the target: data.curriculum is what makes them grow",
                    group="pose",
                )
            found.append((end, sampler))
        return found

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    @property
    def example_len(self) -> int:
        """Tokens in one example."""
        return self.train_len

    @property
    def min_document_len(self) -> int:
        """The shortest document, in tokens, that this sampler can draw from."""
        return self.example_len

    @property
    def uses_breaks(self) -> bool:
        """Whether `sample` looks at `breaks`."""
        return False

    @property
    def skips(self) -> bool:
        """Whether it draws other ids than 0, 1, 2, ..."""
        return self.target_len > self.example_len

    @property
    def changes_distances(self) -> bool:
        """Whether some tokens are other distances apart than they stand, which is all that RoPE sees of ids."""
        return self.skips

    @property
    def weighs_tokens(self) -> bool:
        """Whether a Layout may have weights."""
        return False

    def resized(self, train_len: int, target_len: int) -> "PositionSampler":
        """The same sampler for other lengths, without a curriculum."""
        return replace(self, train_len=train_len, target_len=target_len, curriculum=None)

    def sample(self, rng: np.random.Generator, document_len: int, breaks: np.ndarray | None = None) -> Layout:
        """Draws one example.

        Args:
            rng: the only source of randomness.
            document_len: Lx, tokens in the document.
            breaks: int64, sorted: the indices in the document at which a new sentence begins. Samplers
                that use them (`uses_breaks`) make sentences up where they are not given.

        Returns:
            A Layout of int64 arrays [example_len].

        Raises:
            ValueError: document_len < min_document_len.
        """
        if document_len < self.min_document_len:
            raise ValueError(
                f"a document of {document_len} tokens is too short for {self.name}, which needs {self.min_document_len}"
            )
        return self._sample(rng, document_len, breaks) if self.uses_breaks else self._sample(rng, document_len)

    def positions_of_answers(self, position_ids: np.ndarray, is_answer: np.ndarray, question_len: int) -> np.ndarray:
        """The position ids of an example whose answers alone are scored, such as of a retrieval task.

        Args:
            position_ids: int64 [L], drawn by `sample`.
            is_answer: bool [L], not all False.
            question_len: tokens of a question, which an answer follows.

        Returns:
            int64 [L]: as drawn, but for a sampler whose skip has to stand before the answers.
        """
        return position_ids

    @abstractmethod
    def _sample(self, *args: Any, **kwargs: Any) -> Layout:
        """Of rng and document_len, and of breaks where they are used: as `sample`."""


@dataclass(frozen=True)
class PoSE(PositionSampler):
    """Positional skip-wise training, equations 3 to 5 of the paper.

    Chunk lengths are drawn one after the other, each leaving at least one token for every later
    chunk (the law of the paper's Figure 6: N=2 has l_0 ~ U{1..L-1}). Then, with st_i the tokens
    before chunk i,

        u_0 = 0, u_i ~ U{u_{i-1}..T-L}     positions of chunk i: u_i + st_i + (0..l_i-1)
        v_0 = 0, v_i ~ U{v_{i-1}..Lx-L}    text of chunk i:      x[v_i + st_i : v_i + st_i + l_i]

    Args:
        num_chunks: N >= 1. N = 1 keeps plain contiguous positions; N = L puts one token in a chunk.
        content: the v_i: "random" (equation 5), "contiguous" (v_i = 0) or "aligned" (v_i = u_i).

    Raises:
        ConfigError: num_chunks is not in [1, train_len], or content is unknown.
    """

    num_chunks: int = 2
    content: Literal["random", "contiguous", "aligned"] = "random"

    def __post_init__(self):
        super().__post_init__()
        _require_chunks(self.num_chunks, self.train_len)
        require_choice("{group}.content", self.content, ("random", "contiguous", "aligned"), group="pose")

    @property
    def min_document_len(self) -> int:
        return self.target_len if self.content == "aligned" else self.train_len

    @property
    def skips(self) -> bool:
        return super().skips and self.num_chunks > 1

    def _sample(self, rng, document_len):
        lengths, u = self._chunks(rng)
        if self.content == "random":
            v = _nondecreasing(rng, self.num_chunks, document_len - self.train_len)
        elif self.content == "contiguous":
            v = np.zeros_like(u)
        else:
            v = u
        index = np.arange(self.train_len)
        return Layout(index + np.repeat(u, lengths), index + np.repeat(v, lengths))

    def _chunks(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """The lengths l_i and the skips u_i of the chunks; int64 [N] each."""
        lengths = np.empty(self.num_chunks, np.int64)
        left = self.train_len
        for i in range(self.num_chunks - 1):
            lengths[i] = rng.integers(1, left - (self.num_chunks - 1 - i), endpoint=True)
            left -= lengths[i]
        lengths[-1] = left
        return lengths, _nondecreasing(rng, self.num_chunks, self.target_len - self.train_len)


@dataclass(frozen=True)
class Stratified(PoSE):
    """This project's own: PoSE whose chunks show every distance up to T-1 about equally often.

    With two chunks the last L distances are starved: a single pair of tokens is T-1 apart, and only when u_1 = T-L.
    More chunks, drawn one after the other, crowd near T-L. Here

    - a long chunk of h ~ U{ceil(L/4)..floor(3L/4)} tokens faces N-1 short ones of equal length. Two chunks cover as
      many distances as they have tokens together, so these pairs cover about (N-2) h + L of them;
    - the short chunks are spread over the target, one in each of N-1 equal strata:
      u_i = min(floor((i-1 + x_i) (T-L+h+1) / (N-1)), T-L), x_i ~ U[0, 1), i = 1..N-1;
    - the strata reach h beyond T-L, and what falls there is clipped to T-L, so that the example ends at T-1. This
      weight is what the distances near T-1 lack;
    - half of the examples are mirrored, the long chunk last (skips u_{N-1} - u_i, in reverse): the same distances,
      with many queries for few far keys in place of few queries for many.

    Args:
        num_chunks: N in [2, train_len].
        content: as for `PoSE`.

    Raises:
        ConfigError: num_chunks is not in [2, train_len], or content is unknown.
    """

    num_chunks: int = 3

    def __post_init__(self):
        super().__post_init__()
        require_int("{group}.num_chunks", self.num_chunks, at_least=2, group="pose")

    def _chunks(self, rng):
        L, num_short, last = self.train_len, self.num_chunks - 1, self.target_len - self.train_len
        longest = L - num_short
        h = int(rng.integers(min(-(-L // 4), longest), min(max(3 * L // 4, 1), longest), endpoint=True))
        lengths = np.array([h, *np.diff(np.arange(self.num_chunks) * (L - h) // num_short)])
        strata = (np.arange(num_short) + rng.random(num_short)) / num_short
        u = np.array([0, *np.minimum((strata * (last + h + 1)).astype(np.int64), last)])
        return (lengths, u) if rng.random() < 0.5 else (lengths[::-1], (u[-1] - u)[::-1])


@dataclass(frozen=True)
class Full(PositionSampler):
    """Full-length training, the expensive baseline: examples of target_len tokens, ids 0..T-1."""

    @property
    def example_len(self) -> int:
        return self.target_len

    def _sample(self, rng, document_len):
        index = np.arange(self.target_len)
        return Layout(index, index.copy())


@dataclass(frozen=True)
class ShortPI(PositionSampler):
    """The control that asks what the skips bring: the rescaled RoPE, but contiguous ids 0..L-1."""

    @property
    def skips(self) -> bool:
        return False

    def _sample(self, rng, document_len):
        index = np.arange(self.train_len)
        return Layout(index, index.copy())


@dataclass(frozen=True)
class RandPos(PositionSampler):
    """Randomised positions (Ruoss et al. 2023, arXiv 2305.16843).

    The ids are a sorted sample of L from {0..T-1} without replacement; the text is contiguous.
    """

    def _sample(self, rng, document_len):
        positions = rng.choice(self.target_len, self.train_len, replace=False, shuffle=False)
        return Layout(np.sort(positions).astype(np.int64), np.arange(self.train_len))


@dataclass(frozen=True)
class Released(PositionSampler):
    """What the released code of PoSE draws, which is not quite the paper (dwzhu-pku/PoSE, src/train_pose.py).

    Two chunks, of which the first is never more than half. Documents are cut to 5 L tokens. With

        r ~ U{1..floor((L+1)/2)}     tokens in the first chunk
        e ~ U{L..min(Lx, 5L)}        where the second chunk's text ends
        s ~ U{0..T-L}                by how much its positions are shifted

    the positions are 0..r-1 and s + (r..L-1), the text is x[0:r] and x[e-(L-r):e]. Documents shorter than L,
    which the original takes as they are, are left out here.
    """

    def _sample(self, rng, document_len):
        L = self.train_len
        r = rng.integers(1, (L + 1) // 2, endpoint=True)
        e = rng.integers(L, min(document_len, 5 * L), endpoint=True)
        s = rng.integers(0, self.target_len - L, endpoint=True)
        positions, content = np.arange(L), np.arange(L)
        positions[r:] += s
        content[r:] += e - L
        return Layout(positions, content)


@dataclass(frozen=True)
class EqualChunks(PositionSampler):
    """Equal chunks that share a budget of skips, as axolotl's `use_pose` draws them.

    The budget is B = T - L; each chunk but the first takes delta ~ U{0..B} of what is left of it, and its positions
    are shifted by all that has been taken so far. The text is contiguous. Source: axolotl-ai-cloud/axolotl,
    `add_pose_position_ids`, which puts the remainder of L / N into the last chunk; here chunk lengths differ by at
    most one token.

    Args:
        num_chunks: N in [1, train_len].

    Raises:
        ConfigError: num_chunks is not in [1, train_len].
    """

    num_chunks: int = 8

    def __post_init__(self):
        super().__post_init__()
        _require_chunks(self.num_chunks, self.train_len)

    @property
    def skips(self) -> bool:
        return super().skips and self.num_chunks > 1

    def _sample(self, rng, document_len):
        index = np.arange(self.train_len)
        # A share U{0..B} of what is left, added to what is taken, is a draw from {taken..T-L}.
        u = _nondecreasing(rng, self.num_chunks, self.target_len - self.train_len)
        starts = np.arange(self.num_chunks + 1) * self.train_len // self.num_chunks
        return Layout(index + np.repeat(u, np.diff(starts)), index)


@dataclass(frozen=True)
class Cream(PositionSampler):
    """CREAM: a head, a tail, and a middle between them that prefers the middle (Wu et al. 2024, arXiv 2406.07138).

    The law of the authors' code (bigai-nlco/CREAM, src/train.py), f = T / L:

        h       floor(L/3) or 4f, each with probability 1/2: tokens of the head, and of the tail
        m       L - 2h: tokens of the middle
        alpha   floor of a normal draw of mean 1 + f and deviation sigma, clipped to [2, 2f]
        e       ~ U{floor(h + (m-1) alpha/2) .. floor(alpha L/2) - h - 1}: the last position of the middle

    The positions are 0..h-1, e-m+1..e, T-h..T-1. The text has the same places in the document, the tail its last h
    tokens; in a document that ends too early for it the middle is what comes before the tail.

    Two things are more general than the original, and the same wherever it is defined: T need not be a multiple of
    L, and 4f is at most L/3, so that a middle is left. The coin is thrown for each example.

    Args:
        sigma: deviation of the normal draw, in half windows of L tokens.

    Raises:
        ConfigError: sigma is not a positive number.
    """

    sigma: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        require_number("{group}.sigma", self.sigma, above=0, group="pose")

    def _sample(self, rng, document_len):
        L, T, f = self.train_len, self.target_len, self.target_len / self.train_len
        h = L // 3 if rng.random() < 0.5 else min(int(4 * f), L // 3)
        m = L - 2 * h
        alpha = int(np.clip(rng.normal(1 + f, self.sigma), 2, 2 * f))
        e = rng.integers(h + (m - 1) * alpha // 2, alpha * L // 2 - h - 1, endpoint=True)
        positions, content = np.arange(L), np.arange(L)
        for ids, end, last in ((positions, T, e), (content, document_len, min(e, document_len - h - 1))):
            ids[h : h + m] += last - (h + m - 1)
            ids[h + m :] += end - L
        return Layout(positions, content)


@dataclass(frozen=True)
class SentenceSkip(PositionSampler):
    """LongRecipe's skips between sentences (Hu et al. 2024, arXiv 2409.00509).

    The example's S sentences get S distinct slots of T - L + S, uniformly. An empty slot is one position, so sentence
    i is shifted by (its slot) - i: the shifts never go down, and every such sequence of S shifts in {0..T-L} is
    equally likely. The first sentence and a head of r ~ U{1..floor((L+1)/2)} tokens keep their ids.

    Kept from the code (zhiyuanhubj/LongRecipe, preprocess_token_PI/FSProcessor.py and utils/preprocess_data.py): the
    law above. Not kept: its list of LLaMA-3's token ids that end a sentence (the tokenizer of the run says which),
    and its selection of tokens by how a long-context model judges them; the text is contiguous.

    Args:
        sentence_len: tokens in a sentence, on average, where the text does not say: each token then begins a new one
            with probability 1 / sentence_len.

    Raises:
        ConfigError: sentence_len is not a positive int.
    """

    sentence_len: int = 20

    @property
    def uses_breaks(self) -> bool:
        return True

    def __post_init__(self):
        super().__post_init__()
        require_int("{group}.sentence_len", self.sentence_len, at_least=1, group="pose")

    def _sample(self, rng, document_len, breaks=None):
        L, high = self.train_len, self.target_len - self.train_len
        if breaks is None:
            breaks = 1 + np.flatnonzero(rng.random(L - 1) < 1 / self.sentence_len)
        else:
            breaks = breaks[np.searchsorted(breaks, 1) : np.searchsorted(breaks, L)]
        num_sentences = len(breaks) + 1
        slots = rng.choice(high + num_sentences, num_sentences, replace=False, shuffle=False)
        skips = np.sort(slots) - np.arange(num_sentences)
        skips[0] = 0
        index = np.arange(L)
        positions = index + np.repeat(skips, np.diff(breaks, prepend=0, append=L))
        head = rng.integers(1, (L + 1) // 2, endpoint=True)
        positions[:head] = index[:head]
        return Layout(positions.astype(np.int64), index)


@dataclass(frozen=True)
class SingleShift(PositionSampler):
    """The control that changes no relative distance: all ids are shifted by one u ~ U{0..T-L}; contiguous text."""

    @property
    def changes_distances(self) -> bool:
        return False

    def _sample(self, rng, document_len):
        index = np.arange(self.train_len)
        return Layout(index + rng.integers(0, self.target_len - self.train_len, endpoint=True), index)


@dataclass(frozen=True)
class EndAnchor(PositionSampler):
    """EndPrompt: plain ids, then a short cue at the very end of the target (Tian et al. 2026, arXiv 2605.14589).

    Every example has the positions 0..L-b-1 and T-b..T-1, with b the length of the cue: the text before the cue stays
    whole, and each token of the cue meets all of it from afar. What is predicted there are the b - 1 tokens after the
    first, which is itself predicted at L-b-1. In the loss of an example a token of the cue counts
    cue_weight, every other one 1. The text is x[0:L-b] and x[Lx-b:Lx]: the document's beginning, and its last b tokens.

    In the paper the cue is a fixed prompt, with which every text is made to end. Documents that end with a prompt of b
    tokens, taken whole (data.window_len=null), give the paper's examples; without, the cue is text that a model cannot
    know by heart. Of the authors' code (clx1415926/EndPrompt) fine_tune_suffix.py has these positions, its text is the
    first L tokens of a document; finetune_suffix_random.py has this text, and draws where the cue begins from L-b..T-b.
    Both weigh all tokens alike, as cue_weight=1 does.

    Of a retrieval task's example the cue is its first question and all that follows, whatever b is: answers are asked
    for from afar, and all weigh the same.

    Args:
        cue_len: b in [2, train_len - 1], tokens. Of a cue of one nothing is predicted from afar.
        cue_weight: in (0, 1]. Causal attention lets nothing but the cue's own loss see far, so 0 would train on plain
            short text.

    Raises:
        ConfigError: cue_len is not in [2, train_len - 1], or cue_weight not in (0, 1].
    """

    cue_len: int = 20
    cue_weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require_int("{group}.cue_len", self.cue_len, at_least=2, group="pose")
        if self.cue_len >= self.train_len:
            raise ConfigError(
                f"{{group}}.cue_len={self.cue_len} leaves no text before the cue in {{group}}.train_len="
                f"{self.train_len} tokens: give fewer",
                group="pose",
            )
        require_number("{group}.cue_weight", self.cue_weight, above=0, at_most=1, group="pose")

    @property
    def weighs_tokens(self) -> bool:
        return self.cue_weight != 1

    def positions_of_answers(self, position_ids, is_answer, question_len):
        return skip_before_question(position_ids, is_answer, question_len)

    def _sample(self, rng, document_len):
        before = self.train_len - self.cue_len
        positions, content = np.arange(self.train_len), np.arange(self.train_len)
        positions[before:] += self.target_len - self.train_len
        content[before:] += document_len - self.train_len
        if not self.weighs_tokens:
            return Layout(positions, content)
        weights = np.ones(self.train_len, np.float32)
        weights[before:] = self.cue_weight
        return Layout(positions, content, weights)


@dataclass(frozen=True)
class Mix(PositionSampler):
    """With probability plain_share plain contiguous ids 0..L-1 of contiguous text, else what another sampler draws.

    Args:
        sampler: the other one, of the same lengths.
        plain_share: in [0, 1].

    Raises:
        ConfigError: the other sampler has other lengths, or plain_share is not in [0, 1].
    """

    sampler: PositionSampler
    plain_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        require_number("{group}.plain_share", self.plain_share, at_least=0, at_most=1, group="pose")
        if not isinstance(self.sampler, PositionSampler):
            raise ConfigError(
                f"{{group}}.sampler={self.sampler!r} is not accepted: give another choice of the group pose",
                group="pose",
            )
        if self.sampler.curriculum is not None:
            raise ConfigError("{group}.sampler.curriculum is not accepted: give {group}.curriculum", group="pose")
        for name in ("train_len", "target_len"):
            inner, outer = getattr(self.sampler, name), getattr(self, name)
            if inner != outer:
                raise ConfigError(
                    f"{{group}}.sampler.{name}={inner} is not {{group}}.{name}={outer}: give the same", group="pose"
                )
        if self.sampler.example_len != self.train_len:
            raise ConfigError(
                f"{{group}}.sampler={self.sampler.name} draws examples of {self.sampler.example_len} tokens, plain "
                f"ones have {self.train_len}: choose a sampler whose examples have {{group}}.train_len tokens",
                group="pose",
            )

    @property
    def name(self) -> str:
        return f"Mix({self.sampler.name})"

    @property
    def min_document_len(self) -> int:
        return self.sampler.min_document_len

    @property
    def skips(self) -> bool:
        return self.sampler.skips and self.plain_share < 1

    @property
    def changes_distances(self) -> bool:
        return self.sampler.changes_distances and self.plain_share < 1

    @property
    def uses_breaks(self) -> bool:
        return self.sampler.uses_breaks

    @property
    def weighs_tokens(self) -> bool:
        return self.sampler.weighs_tokens

    def resized(self, train_len: int, target_len: int) -> "Mix":
        inner = self.sampler.resized(train_len, target_len)
        return replace(self, train_len=train_len, target_len=target_len, sampler=inner, curriculum=None)

    def positions_of_answers(self, position_ids, is_answer, question_len):
        is_plain = np.array_equal(position_ids, np.arange(len(position_ids)))
        return position_ids if is_plain else self.sampler.positions_of_answers(position_ids, is_answer, question_len)

    def _sample(self, rng, document_len, breaks=None):
        if rng.random() < self.plain_share:
            index = np.arange(self.train_len)
            return Layout(index, index.copy())
        return self.sampler.sample(rng, document_len, breaks)


def _nondecreasing(rng: np.random.Generator, num: int, high: int) -> np.ndarray:
    """0 = w_0 <= w_1 <= ... with w_i ~ U{w_{i-1}..high}; int64 [num] (equations 4 and 5)."""
    w = np.zeros(num, np.int64)
    for i in range(1, num):
        w[i] = rng.integers(w[i - 1], high, endpoint=True)
    return w


def _require_chunks(num_chunks, train_len: int):
    require_int("{group}.num_chunks", num_chunks, at_least=1, group="pose")
    if num_chunks > train_len:
        raise ConfigError(
            f"{{group}}.num_chunks={num_chunks} is more than {{group}}.train_len={train_len}: a chunk holds at "
            "least one token",
            group="pose",
        )
