"""A file in parts, for machines that take only so much at a time: python -m benchmarks.parts split FILE FOLDER

split writes FOLDER/NAME.part-1-of-3-DIGEST, ...; they can be copied one after the other, in any order. On the other
machine python -m benchmarks.parts join FOLDER FILE puts them together again, and checks that every byte is there.
"""

import argparse
import re
from pathlib import Path

from pose.files import atomic_file, sha256

PART = re.compile(r"(?P<name>.+)\.part-(?P<number>\d+)-of-(?P<num>\d+)-(?P<digest>[0-9a-f]{16})")
BLOCK = 1 << 20  # bytes


def split(file: Path, folder: Path, size: int) -> list[Path]:
    """Writes the parts of a file, of at most `size` bytes each, into a folder; their paths.

    The name of each has the beginning of the whole file's SHA-256.

    Raises:
        SystemExit: the file is not there, or empty.
    """
    if not file.is_file() or not file.stat().st_size:
        raise SystemExit(f"{file} is no file with anything in it")
    folder.mkdir(parents=True, exist_ok=True)
    num = -(-file.stat().st_size // size)
    digest = sha256(file)[:16]
    parts = [folder / f"{file.name}.part-{number}-of-{num}-{digest}" for number in range(1, num + 1)]
    with open(file, "rb") as source:
        for path in parts:
            with atomic_file(path, "wb") as part:
                part.write(source.read(size))
    return parts


def join(folder: Path, file: Path):
    """Puts the parts that a folder holds together to a file, which appears in one step.

    Raises:
        SystemExit: a part is missing (names it), there are parts of several files, or a byte is another.
    """
    found = [match for path in folder.glob("*.part-*") if (match := PART.fullmatch(path.name))]
    wholes = sorted({(match["name"], int(match["num"]), match["digest"]) for match in found})
    if len(wholes) != 1:
        kinds = ", ".join(f"{name} ({digest})" for name, _, digest in wholes) or "none"
        raise SystemExit(f"{folder} has to hold the parts of one file, and has those of: {kinds}")
    ((name, num, digest),) = wholes
    paths = [folder / f"{name}.part-{number}-of-{num}-{digest}" for number in range(1, num + 1)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, "wb") as whole:
        for path in paths:
            with open(path, "rb") as part:
                while block := part.read(BLOCK):
                    whole.write(block)
        whole.flush()
        if sha256(whole.name)[:16] != digest:
            raise SystemExit(f"the parts in {folder} are not those of {name}: copy them again")


def main(arguments: list[str] | None = None):
    """Splits or joins.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.parts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    one = ways.add_parser("split", help="FILE into FOLDER")
    one.add_argument("file", type=Path)
    one.add_argument("folder", type=Path)
    one.add_argument("--mib", type=float, default=32, help="MiB of a part at most (32)")
    two = ways.add_parser("join", help="the parts in FOLDER to FILE")
    two.add_argument("folder", type=Path)
    two.add_argument("file", type=Path)
    args = parser.parse_args(arguments)
    if args.way == "join":
        join(args.folder, args.file)
        print(f"{args.file}: {args.file.stat().st_size:,} bytes, as before")
        return
    if not args.mib * 2**20 >= 1:
        parser.error(f"--mib {args.mib} is not accepted: give a number above 0")
    for path in split(args.file, args.folder, int(args.mib * 2**20)):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
