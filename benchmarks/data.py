"""Training examples a second that one reading process delivers: python -m benchmarks.data

PoSE examples (N = 2) of the shipped books, read from a token cache, measured in two places:
`dataset` takes the examples one by one in this process (data.num_workers=0), `loader` takes batches
from a DataLoader with one worker process, copied over to this process, from the first batch on.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import Options, report, spread, table, whole, words


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("data", __doc__, quick={"repeats": 5, "examples": 2000})
    parser.add_argument("--repeats", type=whole(1), default=7)
    parser.add_argument("--examples", type=whole(1), default=8000, help="in one repeat")
    parser.add_argument("--micro-batch", type=whole(1), default=16)
    parser.add_argument("--train-len", type=whole(2), default=2048, help="tokens in an example")
    parser.add_argument("--target-len", type=whole(2), default=16384, help="tokens in the stretch it is drawn from")
    args = parser.read()
    if args.target_len < args.train_len:
        parser.error(f"--target-len {args.target_len} is below --train-len {args.train_len}")
    if args.examples < args.micro_batch:
        parser.error(f"--examples {args.examples} is below --micro-batch {args.micro_batch}")
    return args


if __name__ == "__main__":
    options()

from pose.app.runtime import quiet_libraries
from pose.data.datamodule import PoseDataModule
from pose.files import locate
from pose.modeling.load import load_tokenizer
from pose.positions import PoSE

BOOKS = "assets/corpora/books.train.jsonl.gz"
TOKENIZER = "assets/tiny"


def build_data(args: argparse.Namespace, cache_dir: str | Path, num_workers: int) -> PoseDataModule:
    """The data of a training run, its token cache built."""
    data = PoseDataModule(
        [locate(BOOKS)],
        load_tokenizer(locate(TOKENIZER)),
        PoSE(args.train_len, args.target_len, num_chunks=2),
        num_examples=args.examples * args.repeats,
        micro_batch=args.micro_batch,
        seed=0,
        cache_dir=cache_dir,
        window_len=args.target_len,
        num_workers=num_workers,
    )
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        data.prepare_data()
        data.setup()
    return data


def dataset_speed(data: PoseDataModule, args: argparse.Namespace) -> list[float]:
    """Examples a second, one value a repeat, each repeat with other examples."""
    data.dataset[0]  # opens the file
    speeds = []
    for repeat in range(args.repeats):
        start = time.perf_counter()
        for i in range(repeat * args.examples, (repeat + 1) * args.examples):
            data.dataset[i]
        speeds.append(args.examples / (time.perf_counter() - start))
    return speeds


def loader_speed(data: PoseDataModule, args: argparse.Namespace) -> list[float]:
    """Examples a second between the arrivals of batches, one value for each stretch of them."""
    batches = args.examples // args.micro_batch
    loader = iter(data.train_dataloader())
    next(loader)  # the worker has started
    speeds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        num_examples = sum(len(batch["input_ids"]) for batch in itertools.islice(loader, batches))
        if num_examples:
            speeds.append(num_examples / (time.perf_counter() - start))
    return speeds


def main():
    args = options()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache_dir:
        dataset = spread(dataset_speed(build_data(args, cache_dir, num_workers=0), args))
        loader = spread(loader_speed(build_data(args, cache_dir, num_workers=1), args))
    rows = [("one process", words(dataset, ",.0f")), ("DataLoader, one worker", words(loader, ",.0f"))]
    title = f"data: examples of {args.train_len:,} tokens, {args.repeats} repeats"
    report(
        table(title, ["", "examples/s"], rows),
        "data",
        args,
        {"examples_per_second": {"dataset": dataset, "loader_1_worker": loader}},
    )


if __name__ == "__main__":
    main()
