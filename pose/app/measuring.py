"""From a composed config to what is measured, after a training and while it runs."""

import logging
from dataclasses import replace

from omegaconf import DictConfig

from pose.app.documents import find_documents
from pose.app.schema import to_options
from pose.data.heldout import SetAside
from pose.errors import ConfigError, PoseError, TooShortError
from pose.evaluation.options import EvalOptions
from pose.evaluation.suite import Suite, default_lengths
from pose.training.callbacks import Export, Throughput
from pose.training.options import WatchOptions
from pose.training.watch import Watch, check_best

log = logging.getLogger(__name__)


def build_suite(
    options: EvalOptions,
    tokenizer,
    window: int,
    target_len: int,
    cache_dir: str,
    vocab_size: int | None = None,
    set_aside: SetAside | None = None,
) -> Suite | None:
    """The tasks of the group `eval`, ready to run; None where there are none.

    Args:
        options: of the group; changed in place: what is null is filled in.
        tokenizer: of the model.
        window, target_len: of the model, in tokens: the lengths, where none are given.
        cache_dir: of the token caches.
        vocab_size: rows of the model's embedding.
        set_aside: documents of the training data that are kept for evaluation, where no others are named.
    """
    if not options.tasks:
        return None
    if options.lengths is None:
        options.lengths = list(default_lengths(window, target_len))
    options.haystack = find_documents("{group}.haystack", options.haystack)
    documents = set_aside if options.documents is None else find_documents("{group}.documents", options.documents)
    return Suite(options, tokenizer, documents, cache_dir, target_len, vocab_size, window)


def build_watch(
    cfg: DictConfig,
    tokenizer,
    window: int,
    target_len: int,
    cache_dir: str,
    vocab_size: int,
    set_aside: SetAside | None,
    *,
    export: Export,
    throughput: Throughput,
) -> Watch | None:
    """What is measured while the model trains, by the group `watch`; None where that is nothing.

    Raises:
        ConfigError: `best` is a metric that is not measured; a value that `EvalOptions` does not accept.
    """
    try:
        options = to_options(cfg.watch, WatchOptions)
        if options.every_n_steps is None:
            return None
        lengths = sorted({window, target_len} if options.lengths is None else set(options.lengths))
        options.lengths = lengths
        suite = build_suite(options, tokenizer, window, target_len, cache_dir, vocab_size, set_aside)
        if suite is None:
            raise ConfigError("watch.tasks is empty, and watch.every_n_steps is given: choose perplexity, passkey, ...")
        check_best(options, suite)
        short = None
        has_documents = options.documents is not None or set_aside is not None
        if options.max_short_increase is not None and has_documents and cfg.model.path is not None:
            # on the documents that the suite has
            enough = max(max(lengths) if "perplexity" in options.tasks else window, options.min_tokens or 0)
            only = replace(
                options, tasks=["perplexity"], prefix=None, lengths=[window], tail=None, stride=None,
                min_tokens=enough, sliding_tokens=None,
            )  # fmt: skip
            try:
                short = build_suite(only, tokenizer, window, target_len, cache_dir, vocab_size, set_aside)
            except TooShortError:
                log.warning(
                    f"watch.max_short_increase: short texts are not watched, since no document has "
                    f"{max(enough, window)} tokens (the model's own window is {window})"
                )
    except PoseError as error:
        raise error.under("watch") from error
    return Watch(
        suite, options.every_n_steps, before=options.before, short=short, max_short_increase=options.max_short_increase,
        best=options.best, export=export, throughput=throughput,
    )  # fmt: skip
