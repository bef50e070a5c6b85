"""Evaluation against the plain way of it, side by side: python -m benchmarks.evaluation [sweep|sliding|passkey|long]

sweep: truncated perplexity at several lengths, one forward pass of a window, against a pass for each length (the same
windows, the same tokens), in this package's code and in the plain one. sliding: sliding windows, batched, logits for
scored tokens alone, a pass for all lengths. The plain way is stock transformers, one window at a time, full logits and
log_softmax. passkey: prompts teacher-forced in batches, against decoding with a cache, in the same batches and by
`generate` one at a time. Without a part: these three. long: time and peak memory of one document of a random model with
a long window (--whole: in one plain pass).
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import Options, in_turn, ratio, report, spread, table, timed, whole, words
from pose.files import locate

LENGTHS = {
    "sweep": [256, 512, 768, 1024, 1280, 1536, 1792, 2048],
    "sliding": [256, 512, 1024, 2048],
    "passkey": [256, 2048],
    "long": [32768, 131072],
}
QUICK_LENGTHS = {"sweep": [256, 512, 768, 1024], "sliding": [256, 512], "passkey": [256], "long": [1024, 4096]}


def options() -> argparse.Namespace:
    """What was asked for; `parts` are those to measure."""
    parser = Options("evaluation", __doc__, quick={"repeats": 2, "tokens": 2048, "trials": 8})
    parser.add_argument("part", nargs="?", choices=list(LENGTHS))
    parser.add_argument(
        "--model",
        default="assets/tiny",
        help="folder; random: a grouped-query model of 4 layers with a vocabulary of 49,152",
    )
    parser.add_argument("--lengths", type=whole(32), nargs="+", help="tokens; of one part (shorter with --quick)")
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument("--batch-tokens", type=whole(1), help="in one forward pass (1024 on a CPU)")
    parser.add_argument("--tokens", type=whole(2), default=6144, help="of the book, for sweep and sliding")
    parser.add_argument("--windows", type=whole(1), default=2, help="sweep: per length")
    parser.add_argument("--stride", type=whole(1), default=128, help="sliding: tokens")
    parser.add_argument("--trials", type=whole(1), default=16, help="passkey: prompts per length")
    parser.add_argument("--kv-heads", type=int, default=2, choices=[1, 2, 4], help="long: key-value heads, of 4 heads")
    parser.add_argument("--whole", action="store_true", help="long: no chunks")
    args = parser.read()
    args.parts = ["sweep", "sliding", "passkey"] if args.part is None else [args.part]
    if args.lengths and args.part is None:
        parser.error("--lengths is of one part: name it")
    by_part = QUICK_LENGTHS if args.quick else LENGTHS
    args.lengths = {part: args.lengths or by_part[part] for part in args.parts}
    if args.tokens < max(args.lengths.get("sweep", [0])):
        parser.error(f"--tokens {args.tokens} is below the longest of --lengths, {max(args.lengths['sweep'])}")
    if args.model != "random" and not Path(locate(args.model)).is_dir():
        parser.error(f"--model {args.model}: no such folder")
    return args


if __name__ == "__main__":
    options()

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pose.app.runtime import quiet_libraries
from pose.data.documents import read_documents
from pose.evaluation import perplexity
from pose.evaluation.passkey import Passkey, found, written
from pose.evaluation.scoring import Scorer, peak_memory_gib
from pose.modeling.load import build_model, load_config, load_tokenizer
from pose.tasks.passkey import PasskeyPrompts

RANDOM = LlamaConfig(  # the width and the vocabulary of SmolLM2-135M, with 4 of its 30 layers
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
BOOK = "assets/corpora/books.heldout.jsonl.gz"


def side_by_side(ways: dict[str, Callable], repeats: int) -> tuple[dict, dict]:
    """Seconds of each way, and how many times as long as the first the others take, in turn.

    Raises:
        AssertionError: the results differ by more than 1e-5.
    """
    results = {name: way() for name, way in ways.items()}  # also warms up
    first, *others = ways
    for name in others:
        np.testing.assert_allclose(results[name], results[first], rtol=1e-5)
    seconds = in_turn({name: timed(way) for name, way in ways.items()}, repeats)
    ratios = {name: ratio(seconds[name], seconds[first]) for name in others}
    return {name: spread(values) for name, values in seconds.items()}, ratios


def plain_nll(model, window: np.ndarray, num_scored: int) -> float:
    """The sum of the losses of a window's last tokens, from all its logits."""
    tokens = torch.from_numpy(window.astype(np.int64))
    with torch.inference_mode():
        log_p = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    losses = -log_p[:-1].gather(1, tokens[1:, None])[:, 0]
    return float(losses[-num_scored:].double().sum())


def sweep(args, scorer: Scorer, stock, document: np.ndarray) -> tuple[dict, dict]:
    lengths = args.lengths["sweep"]
    token_bytes = np.ones(scorer.model.config.vocab_size, np.int64)
    options = {"token_bytes": token_bytes, "windows": args.windows, "tail": None, "bin": 256}

    def ours(by_length: bool):
        scorer.by_length = by_length
        sums = perplexity.truncated(scorer, document, lengths, **options)
        return [sums[f"ppl@{n}"][0] for n in lengths]

    def plain():
        starts = perplexity.spread(len(document) - max(lengths), args.windows)
        return [sum(plain_nll(stock, document[s : s + n], n - 1) for s in starts) for n in lengths]

    ways = {"one pass": lambda: ours(False), "a pass per length": lambda: ours(True), "plain": plain}
    return side_by_side(ways, args.repeats)


def sliding(args, scorer: Scorer, stock, document: np.ndarray) -> tuple[dict, dict]:
    lengths = args.lengths["sliding"]

    def ours():
        sums = perplexity.sliding(scorer, document, lengths, stride=args.stride)
        return [sums[f"sliding_ppl@{n}"][0] for n in lengths]

    def plain_length(n: int) -> float:
        total, scored = 0.0, 1
        for start in range(0, len(document), args.stride):
            end = min(start + n, len(document))
            total += plain_nll(stock, document[start:end], end - scored)
            scored = end
            if end == len(document):
                break
        return total

    return side_by_side({"ours": ours, "plain": lambda: [plain_length(n) for n in lengths]}, args.repeats)


def passkey(args, scorer: Scorer, stock, tokenizer) -> tuple[dict, dict, int]:
    lengths = args.lengths["passkey"]
    task = Passkey(PasskeyPrompts(tokenizer), lengths, trials=args.trials, seed=0)
    prompts = [task.drawn(n) for n in lengths]

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
    lengths = args.lengths["long"]
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=args.kv_heads, max_position_embeddings=max(lengths),
    )  # fmt: skip
    scorer = Scorer(build_model(config, None), args.batch_tokens)
    if args.whole:
        scorer.chunk_len = max(lengths)
    document = np.random.default_rng(0).integers(0, 4096, max(lengths))
    before, start = peak_memory_gib(scorer.device), time.perf_counter()
    task = perplexity.Perplexity([document], ["random"], lengths, token_bytes=np.ones(4096, int), windows=1, tail=None)
    metrics = task.summarise({unit: task.measure(scorer, unit) for unit in task.units()})
    minutes = (time.perf_counter() - start) / 60
    results = {"minutes": minutes, "peak_gib": peak_memory_gib(scorer.device), "before_gib": before}
    results |= {name: e.value for name, e in metrics.items() if name.startswith("ppl")}
    row = [f"{minutes:.2f}", f"{results['peak_gib']:.2f}", f"{before:.2f}"]
    text = table(f"long: {len(document):,} tokens", ["minutes", "GiB at most", "GiB before"], [row])
    report(text, "evaluation", args, results)


def main():
    args = options()
    quiet_libraries()
    if args.part == "long":
        long(args)
        return
    parts, texts = {}, []
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
        tokenizer = load_tokenizer(folder)
        text = next(iter(read_documents(locate(BOOK)))).text
        document = np.array(tokenizer(text, verbose=False).input_ids[: args.tokens])
        for part in args.parts:
            scorer = Scorer(model, args.batch_tokens)
            if part == "passkey":
                seconds, ratios, num_found = passkey(args, scorer, stock, tokenizer)
                equal = f"the verdicts ({num_found} of {args.trials * len(args.lengths[part])} keys found) are equal"
            else:
                seconds, ratios = {"sweep": sweep, "sliding": sliding}[part](args, scorer, stock, document)
                equal = "the losses are equal to 1e-5"
            parts[part] = {"seconds": seconds, "ratios": ratios}
            rows = [(name, words(s), words(ratios[name]) if name in ratios else "") for name, s in seconds.items()]
            title = f"{part}: {args.repeats} repeats; {equal}"
            texts.append(table(title, ["way", "seconds", "times as long"], rows))
    report("\n\n".join(texts), "evaluation", args, {"parts": parts})


if __name__ == "__main__":
    main()
