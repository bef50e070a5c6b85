"""Evaluation against the plain way of it, side by side: python -m benchmarks.evaluation sweep|sliding|passkey|long

sweep: truncated perplexity at several lengths, one forward pass of a window, against a pass for each length (the same
windows, the same tokens), in this package's code and in the plain one. sliding: sliding windows, batched, logits for
scored tokens alone, a pass for all lengths. The plain way is stock transformers, one window at a time, full logits and
log_softmax. passkey: prompts teacher-forced in batches, against decoding with a cache, in the same batches and by
`generate` one at a time. long: time and peak memory of one document of a random model with a long window (--whole: in
one plain pass).
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import report, spread
from pose.app.runtime import quiet_libraries
from pose.data.documents import read_documents
from pose.evaluation import perplexity
from pose.evaluation.passkey import Passkey, found, written
from pose.evaluation.scoring import Scorer, peak_memory_gib
from pose.files import locate
from pose.modeling.load import build_model, load_config, load_tokenizer
from pose.tasks.passkey import PasskeyPrompts

RANDOM = LlamaConfig(  # the width and the vocabulary of SmolLM2-135M, with 4 of its 30 layers
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
BOOK = "assets/corpora/books.heldout.jsonl.gz"


def side_by_side(ways: dict[str, Callable], repeats: int) -> tuple[dict, dict]:
    """Seconds of each way, and how many times as long as the first the others take, in pairs taken in turn.

    Raises:
        AssertionError: the results differ by more than 1e-5.
    """
    results = {name: way() for name, way in ways.items()}  # also warms up
    first, *others = ways
    for name in others:
        np.testing.assert_allclose(results[name], results[first], rtol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    ratios = {name: spread([a / b for a, b in zip(seconds[name], seconds[first], strict=True)]) for name in others}
    return {name: spread(values) for name, values in seconds.items()}, ratios


def in_words(ratios: dict) -> str:
    return "; ".join(f"{name} {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for name, r in ratios.items())


def plain_nll(model, window: np.ndarray, num_scored: int) -> float:
    """The sum of the losses of a window's last tokens, from all its logits."""
    tokens = torch.from_numpy(window.astype(np.int64))
    with torch.inference_mode():
        log_p = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    losses = -log_p[:-1].gather(1, tokens[1:, None])[:, 0]
    return float(losses[-num_scored:].double().sum())


def sweep(args, scorer: Scorer, stock, document: np.ndarray) -> tuple[dict, dict]:
    token_bytes = np.ones(scorer.model.config.vocab_size, np.int64)
    options = {"token_bytes": token_bytes, "windows": args.windows, "tail": None, "bin": 256}

    def ours(by_length: bool):
        scorer.by_length = by_length
        sums = perplexity.truncated(scorer, document, args.lengths, **options)
        return [sums[f"ppl@{n}"][0] for n in args.lengths]

    def plain():
        starts = perplexity.spread(len(document) - max(args.lengths), args.windows)
        return [sum(plain_nll(stock, document[s : s + n], n - 1) for s in starts) for n in args.lengths]

    ways = {"one pass": lambda: ours(False), "a pass per length": lambda: ours(True), "plain": plain}
    return side_by_side(ways, args.repeats)


def sliding(args, scorer: Scorer, stock, document: np.ndarray) -> tuple[dict, dict]:
    def ours():
        sums = perplexity.sliding(scorer, document, args.lengths, stride=args.stride)
        return [sums[f"sliding_ppl@{n}"][0] for n in args.lengths]

    def plain_length(n: int) -> float:
        total, scored = 0.0, 1
        for start in range(0, len(document), args.stride):
            end = min(start + n, len(document))
            total += plain_nll(stock, document[start:end], end - scored)
            scored = end
            if end == len(document):
                break
        return total

    return side_by_side({"ours": ours, "plain": lambda: [plain_length(n) for n in args.lengths]}, args.repeats)


def passkey(args, scorer: Scorer, stock, tokenizer) -> tuple[dict, dict, int]:
    task = Passkey(PasskeyPrompts(tokenizer), args.lengths, trials=args.trials, seed=0)
    prompts = [task.drawn(n) for n in args.lengths]

    def verdicts(ways) -> list[bool]:
        return [verdict for drawn in prompts for verdict in ways(scorer, tokenizer, drawn)]

    def one_at_a_time() -> list[bool]:
        """The number that `generate` writes is the key."""
        results = []
        for prompt in (prompt for drawn in prompts for prompt in drawn):
            tokens = torch.from_numpy(prompt.input_ids[: -prompt.num_answer])[None]
            options = {"max_new_tokens": prompt.num_answer + 1, "do_sample": False, "pad_token_id": 0}
            text = tokenizer.decode(stock.generate(tokens, **options)[0, tokens.shape[1] :]).lstrip(" ")
            results.append(text.startswith(prompt.key) and not text[len(prompt.key) :][:1].isdigit())
        return results

    ways = {
        "teacher-forced": lambda: verdicts(found),
        "decoded in batches": lambda: verdicts(written),
        "decoded one at a time": one_at_a_time,
    }
    return *side_by_side(ways, args.repeats), sum(verdicts(found))


def long(args):
    """One window of the longest length, all lengths scored."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=args.kv_heads, max_position_embeddings=max(args.lengths),
    )  # fmt: skip
    scorer = Scorer(build_model(config, None), args.batch_tokens)
    if args.whole:
        scorer.chunk_len = max(args.lengths)
    document = np.random.default_rng(0).integers(0, 4096, max(args.lengths))
    before, start = peak_memory_gib(scorer.device), time.perf_counter()
    task = perplexity.Perplexity(
        [document], ["random"], args.lengths, token_bytes=np.ones(4096, int), windows=1, tail=None
    )
    metrics = task.summarise({unit: task.measure(scorer, unit) for unit in task.units()})
    minutes = (time.perf_counter() - start) / 60
    results = {"minutes": minutes, "peak_gib": peak_memory_gib(scorer.device), "before_gib": before}
    results |= {name: e.value for name, e in metrics.items() if name.startswith("ppl")}
    report(
        f"long: {len(document):,} tokens in {minutes:.1f} min, {results['peak_gib']:.2f} GiB at most, of which "
        f"{before:.2f} were there before",
        "evaluation",
        vars(args),
        results,
    )


DEFAULT_LENGTHS = {
    "sweep": [256, 512, 768, 1024, 1280, 1536, 1792, 2048],
    "sliding": [256, 512, 1024, 2048],
    "passkey": [256, 2048],
    "long": [32768, 131072],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(DEFAULT_LENGTHS))
    parser.add_argument(
        "--model",
        default="assets/tiny",
        help="folder; random: a grouped-query model of 4 layers with a vocabulary of 49,152",
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, help="in one forward pass (1024 on a CPU)")
    parser.add_argument("--tokens", type=int, default=6144, help="of the book, for sweep and sliding")
    parser.add_argument("--windows", type=int, default=2, help="sweep: per length")
    parser.add_argument("--stride", type=int, default=128, help="sliding: tokens")
    parser.add_argument("--trials", type=int, default=16, help="passkey: prompts per length")
    parser.add_argument("--kv-heads", type=int, default=2, help="long: key-value heads, of 4 heads")
    parser.add_argument("--whole", action="store_true", help="long: no chunks")
    args = parser.parse_args()
    args.lengths = args.lengths or DEFAULT_LENGTHS[args.part]
    quiet_libraries()
    if args.part == "long":
        long(args)
        return
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        folder = locate("assets/tiny" if args.model == "random" else args.model)
        if args.model == "random":
            torch.manual_seed(0)
            model = build_model(RANDOM, None)
            stock = AutoModelForCausalLM.from_config(RANDOM).eval()
            stock.load_state_dict(model.state_dict())
        else:
            model = build_model(load_config(folder), folder)
            stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        scorer = Scorer(model, args.batch_tokens)
        tokenizer = load_tokenizer(folder)
        text = next(iter(read_documents(locate(BOOK)))).text
        document = np.array(tokenizer(text, verbose=False).input_ids[: args.tokens])
        if args.part == "passkey":
            seconds, ratios, num_found = passkey(args, scorer, stock, tokenizer)
            equal = f"the verdicts ({num_found} of {args.trials * len(args.lengths)} keys found) are equal"
        else:
            seconds, ratios = {"sweep": sweep, "sliding": sliding}[args.part](args, scorer, stock, document)
            equal = "the losses are equal to 1e-5"
    first = next(iter(seconds))
    report(
        f"{args.part}: {first} takes {seconds[first]['median']:.2f} s; times as long: {in_words(ratios)}; {equal}; "
        f"median and range of {args.repeats} repeats",
        "evaluation",
        vars(args),
        {"seconds": seconds, "ratios": ratios},
    )


if __name__ == "__main__":
    main()
