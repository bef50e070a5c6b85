"""Speed and memory of tokenising a file into the token cache: python -m benchmarks.tokenise [FILE] [--tokenizer FOLDER]

Memory is the most that the process holds for itself (RssAnon of /proc, every 20 ms) above what it held before. Without
a file: the shipped books. Linux.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import Options, memory, report, spread, table, whole, words
from pose.files import locate


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("tokenise", __doc__, quick={"repeats": 1})
    books = "assets/corpora/books.train.jsonl.gz"
    parser.add_argument("file", nargs="?", default=books, help="documents, as data.documents takes them")
    parser.add_argument("--tokenizer", default="assets/tiny", help="folder")
    parser.add_argument("--repeats", type=whole(1), default=1)
    args = parser.read()
    for path in (args.file, args.tokenizer):
        if not Path(locate(path)).exists():
            parser.error(f"{path} is not there")
    if not memory.is_known():
        parser.error("memory is read from /proc, which only Linux has")
    return args


if __name__ == "__main__":
    options()

from pose.app.runtime import quiet_libraries
from pose.data.cache import TokenCache
from pose.modeling.load import load_tokenizer


class Peak(threading.Thread):
    """Watches the memory until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = memory.resident("RssAnon"), threading.Event()

    def run(self):
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, memory.resident("RssAnon"))


def tokenise(file: str, tokenizer) -> tuple[float, float, dict[str, int]]:
    """Seconds, and MiB above those of before, of making a cache; and what is in it."""
    before, watch = memory.resident("RssAnon"), Peak()
    watch.start()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        cache = TokenCache.build(file, tokenizer, folder)
        seconds = time.perf_counter() - start
        content = {"documents": len(cache), "tokens": int(cache.lengths.sum())}
    watch.stopped.set()
    watch.join()
    return seconds, (watch.peak - before) / 2**20, content


def main():
    args = options()
    quiet_libraries()
    tokenizer, file = load_tokenizer(locate(args.tokenizer)), locate(args.file)
    tokenizer("warm")
    seconds, peaks = [], []
    for _ in range(args.repeats):
        took, peak, content = tokenise(file, tokenizer)
        seconds.append(took)
        peaks.append(peak)
    megabytes = Path(file).stat().st_size / 1e6
    speed, peak = spread([megabytes / one for one in seconds]), spread(peaks)
    title = f"tokenise: {megabytes:,.1f} MB, {content['documents']:,} documents, {content['tokens']:,} tokens"
    rows = [("MB/s", words(speed, ".1f")), ("MiB above what the process held", words(peak, ".0f"))]
    results = {"megabytes": megabytes, **content, "seconds": spread(seconds)}
    results |= {"megabytes_per_second": speed, "peak_mib": peak}
    report(table(title, ["", f"{args.repeats} repeats"], rows), "tokenise", args, results)


if __name__ == "__main__":
    main()
