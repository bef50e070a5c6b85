"""Speed and memory of tokenising a file into the token cache: python -m benchmarks.tokenise FILE [--tokenizer FOLDER]

Memory is the most that the process holds for itself (RssAnon of /proc, every 20 ms) above what it held before.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import report
from pose.app.runtime import quiet_libraries
from pose.data.cache import TokenCache
from pose.files import locate
from pose.modeling.load import load_tokenizer


def memory_mib() -> float:
    """Anonymous memory of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Peak(threading.Thread):
    """Watches the memory until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = memory_mib(), threading.Event()

    def run(self):
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, memory_mib())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="documents, as data.documents takes them")
    parser.add_argument("--tokenizer", default="assets/tiny", help="folder")
    args = parser.parse_args()
    quiet_libraries()
    tokenizer = load_tokenizer(locate(args.tokenizer))
    tokenizer("warm")
    before, watch = memory_mib(), Peak()
    watch.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        cache = TokenCache.build(locate(args.file), tokenizer, folder)
        seconds, tokens, documents = time.perf_counter() - start, int(cache.lengths.sum()), len(cache)
    watch.stopped.set()
    watch.join()
    megabytes = Path(locate(args.file)).stat().st_size / 1e6
    peak = watch.peak - before
    line = (
        f"tokenise: {megabytes:,.1f} MB at {megabytes / seconds:.1f} MB/s, {peak:.0f} MiB above what the process held"
    )
    results = {"megabytes": megabytes, "seconds": seconds, "documents": documents, "tokens": tokens, "peak_mib": peak}
    report(line, "tokenise", vars(args), results)


if __name__ == "__main__":
    main()
