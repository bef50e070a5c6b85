"""The model as lm-evaluation-harness asks it: its own class for transformers' models, with batches sized in tokens.

What this adds to lm-eval's HFLM: a batch holds as many questions as fit, logits exist for the scored tokens alone, long
requests run in chunks, log-probabilities are fp32, requests that are cut are counted, and a tokenizer may have neither
BOS nor EOS.

Shapes: B requests, N tokens in the longest, K tokens kept, V vocabulary.
"""

import copy
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import GenerationConfig

from pose.data.tokenizer import beyond_vocabulary
from pose.errors import ConfigError, WindowError
from pose.evaluation.generation import end_ids
from pose.evaluation.scoring import Scorer
from pose.modeling.layers import cache_is_exact
from pose.modeling.long import hidden_states

SAMPLING = ("temperature", "top_p", "top_k")  # keys of generation_kwargs without effect on greedy decoding


class ScorerLM(HFLM):
    """A model of `pose.modeling.load.build_model` as lm-eval's `hf` model.

    Args:
        scorer: of the model; its batch_tokens are the tokens of a forward pass, padding included.
        tokenizer: the model's; a copy is used, since lm-eval gives it a padding token.
        max_length: tokens in a request; what is longer loses its beginning, and is counted.
        task: for errors.
        terminal: where the bar is shown, if it is one; None is sys.stderr.

    Attributes:
        num_requests: asked so far: for a multiple-choice question one for each choice.
        num_truncated: of them, longer than max_length.
    """

    def __init__(self, scorer: Scorer, tokenizer, max_length: int, task: str, terminal=None):
        super().__init__(
            scorer.model, backend="causal", tokenizer=copy.deepcopy(tokenizer), max_length=max_length,
            batch_size="auto", softmax_dtype=torch.float32,
        )  # fmt: skip
        self.scorer, self.task, self.terminal = scorer, task, terminal or sys.stderr
        self.num_requests = self.num_truncated = 0
        self._kept: int | None = None
        self._largest_id = max(self.tokenizer.get_vocab().values(), default=0)
        self._rows = scorer.model.get_input_embeddings().weight.shape[0]

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
        """As HFLM's, which asks for the text of its prefix token."""
        if self.prefix_token_id is not None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens = self.tokenizer.encode(string, **given)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_decode(self, tokens, skip_special_tokens=True):
        """As HFLM's; None, which lm-eval passes as EOS for a tokenizer without one, decodes to the empty text."""
        return "" if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def loglikelihood(self, requests, disable_tqdm=False):
        """As HFLM's, with one bar.

        Raises:
            ConfigError: a text has nothing before it, and the tokenizer neither BOS nor EOS; names the task.
            DataError: a token has no row in the model's embedding; names task, token, id and rows.
        """
        if any(not request.args[0] for request in requests):
            self._require_prefix()
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """As HFLM's. Raises as `loglikelihood`."""
        self._require_prefix()
        if self._largest_id >= self._rows:  # HFLM computes one text before it reads the next
            for request in requests:
                self._check_ids(self.tok_encode(request.args[0]))
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _require_prefix(self):
        if self.prefix_token_id is None:
            raise ConfigError(
                f"harness/{self.task} scores texts from their first token on, after a BOS or EOS, and this tokenizer "
                "has neither"
            )

    def generate_until(self, requests, disable_tqdm=False):
        """As HFLM's, one request at a time: padding on the left would shift the positions.

        Raises:
            ConfigError: the answer alone fills the window; names the task.
            DataError: as `loglikelihood`.
        """
        for context, options in (request.args for request in requests):
            new_tokens = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if new_tokens >= self.max_length:
                raise WindowError(
                    f"harness/{self.task} writes up to {new_tokens} tokens, and the window is {self.max_length}: it "
                    "needs a model with a longer one"
                )
            tokens = self.tok_encode(context)
            if not tokens:
                raise ConfigError(f"harness/{self.task} has an empty prompt, and this tokenizer puts no BOS before it")
            self._check_ids(tokens)
            self._count(len(tokens) + new_tokens)
        with redirect_stderr(self.terminal):
            return super().generate_until(requests, disable_tqdm or not self.terminal.isatty())

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        requests = [(texts, context or self._prefix(), answer) for texts, context, answer in requests]
        for _, context, continuation in requests:
            if not continuation:
                raise ConfigError(f"harness/{self.task} has an empty answer, of which nothing can be scored")
            if len(continuation) > self.max_length:
                raise WindowError(
                    f"harness/{self.task} has an answer of {len(continuation)} tokens, and the window is "
                    f"{self.max_length}: it needs a model with a longer one"
                )
            self._check_ids(context, continuation)
            self._count(len(context) + len(continuation) - 1)
        self._kept, self._batch_end, self._batch_size = None, 0, 0
        with redirect_stderr(self.terminal):
            return super()._loglikelihood_tokens(requests, not self.terminal.isatty(), override_bs)

    def _prefix(self) -> list[int]:
        """What stands before a text whose context has no tokens, such as a space."""
        self._require_prefix()
        return [self.prefix_token_id]

    def _check_ids(self, *texts: Sequence[int]):
        """Raises a DataError where the embedding has no row for a token: before anything is computed."""
        if self._largest_id < self._rows:
            return
        largest = max(max(tokens, default=0) for tokens in texts)
        if largest >= self._rows:
            raise beyond_vocabulary(self.tokenizer, largest, self._rows, f"a question of harness/{self.task}")

    def _count(self, num_tokens: int):
        self.num_requests += 1
        self.num_truncated += num_tokens > self.max_length

    def _detect_batch_size(self, requests=None, pos=0):
        return 1  # generation, and the windows of whole texts, which are of max_length

    def _batch_scheduler(self, pos, n_reordered_requests):
        """How many requests go into the batch that begins at `pos`; lm-eval asks again for each request of it.

        They come longest first. Frequencies that depend on the length would take that of the padding: there a batch
        holds requests of one length.
        """
        if pos == self._batch_end:
            _, context, answer = n_reordered_requests[pos]
            longest = min(len(context) + len(answer) - 1, self.max_length)
            num = max(self.scorer.batch_tokens // longest, 1)
            batch = n_reordered_requests[pos : pos + num]
            sizes = [min(len(context) + len(answer) - 1, self.max_length) for _, context, answer in batch]
            if self.scorer.by_length:
                num = sizes.count(longest)
            self._batch_size, self._batch_end = num, pos + num
            scored = zip(sizes[:num], batch[:num], strict=True)
            self._kept = max(sizes[0] - size + len(answer) for size, (_, _, answer) in scored)
        return self._batch_size

    def _model_call(self, inps, attn_mask=None, labels=None):
        """Logits [B, K, V] of the last tokens, the padding of shorter requests among them.

        HFLM takes what is missing from the padded length for missing at the beginning.
        """
        with torch.no_grad():
            states = torch.cat(list(hidden_states(self.model, inps, self.scorer.chunk_len)), 1)
            return self.scorer.head(states if self._kept is None else states[:, -self._kept :])

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        """As HFLM's, with the settings of the task and none of the checkpoint's; a cache only where it is exact."""
        if not generation_kwargs.get("do_sample"):
            generation_kwargs = {k: v for k, v in generation_kwargs.items() if k not in SAMPLING} | {"do_sample": False}
        ends = end_ids(self.model, self.tokenizer)  # before the checkpoint's generation config is replaced
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            return self.model.generate(
                context,
                max_length=max_length,
                stopping_criteria=stop_sequences_criteria(
                    self.tokenizer, [text for text in stop if text], context.shape[1], context.shape[0]
                ),
                use_cache=cache_is_exact(self.model.config),
                eos_token_id=ends or None,
                pad_token_id=self.tokenizer.pad_token_id,
                **generation_kwargs,
            )
        finally:
            self.model.generation_config = own
