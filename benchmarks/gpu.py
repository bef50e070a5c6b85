"""Everything that waits for a GPU, in stages: python -m benchmarks.gpu [--only A B] [--skip C] [--minutes M]

Stages stand in order of worth, take at most two minutes each, and save what they found as they end in --out (NAME.json,
NAME.log, summary.json), so that a machine that is taken away leaves results. A stage that fails or takes too long is
noted, and the next begins. A call with the same folder does what is missing.

--rehearse runs the same commands with small shapes, on a CPU too. --write puts what a folder holds into docs/SPEED.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from benchmarks import machine
from pose.files import REPOSITORY, atomic_file, read_json, write_json

LIMIT = 120  # seconds of a stage
BEGIN, END = "<!-- from python -m benchmarks.gpu -->", "<!-- until here -->"
DOC = REPOSITORY / "docs" / "SPEED.md"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage and its files.
        command: arguments of python; {out} is the folder.
        rehearsal: what is put behind them, or in their place, for small shapes.
        tells: what it is about, for the table.
    """

    name: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    tells: str = ""

    def arguments(self, out: Path, rehearse: bool) -> list[str]:
        """The whole command line after `python`."""
        command = [*self.command, *(self.rehearsal if rehearse else ())]
        return [part.replace("{out}", str(out)).replace("{name}", self.name) for part in command]


def speed(name: str, tells: str, *arguments: str) -> Stage:
    """A stage of `benchmarks.speed`."""
    small = ("--shape", "rehearsal", "--train-len", "64", "--target-len", "256", "--micro-batch", "2", "--quick")
    return Stage(name, ("-m", "benchmarks.speed", *arguments, "--json", "{out}/{name}.json"), small, tells)


def efficiency(name: str, shape: str, *arguments: str) -> Stage:
    """A stage of `benchmarks.efficiency` at 16,384 tokens."""
    command = (
        "-m", "benchmarks.efficiency", "--shape", shape, "--train-len", "2048", "--targets", "16384", "--recompute",
        *arguments, "--json", "{out}/{name}.json",
    )  # fmt: skip
    small = ("--shape", "rehearsal", "--train-len", "64", "--targets", "128", "--repeats", "2", "--steps", "2")
    return Stage(name, command, small, f"PoSE against full-length at 16,384, {shape}")


def strategy(name: str) -> Stage:
    """A short run of the shipped model under a strategy on one GPU."""
    command = (
        "train.py", "experiment=smoke", f"strategy={name}", "trainer.devices=1", "eval=none",
        f"hydra.run.dir={{out}}/run-{name}",
    )  # fmt: skip
    return Stage(f"strategy-{name}", command, ("trainer.max_steps=1",), f"experiment=smoke, strategy={name}")


STAGES = (
    Stage("tests", ("-m", "pytest", "tests/gpu", "-q", "-x"), (), "tests/gpu"),
    speed("speed-135m", "135M, eager", "--shape", "135m"),
    speed("speed-135m-compiled", "135M, compiled", "--shape", "135m", "--compiled"),
    speed("speed-1b-compiled", "1B, compiled", "--shape", "1b", "--compiled", "--micro-batch", "4"),
    speed("speed-7b-lora-compiled", "7B LoRA, compiled, selective recomputation", "--shape", "7b", "--compiled",
          "--rank", "16", "--micro-batch", "2", "--recompute", "selective"),
    efficiency("efficiency-135m", "135m"),
    efficiency("efficiency-1b", "1b"),
    speed("speed-7b-adamw8bit", "7B, all weights, adamw8bit, compiled, recomputation", "--shape", "7b", "--compiled",
          "--optimizer", "adamw8bit", "--micro-batch", "1", "--recompute", "true"),
    speed("speed-1b", "1B, eager", "--shape", "1b", "--micro-batch", "4"),
    speed("speed-7b-lora", "7B LoRA, eager, recomputation", "--shape", "7b", "--rank", "16", "--micro-batch", "2",
          "--recompute", "true"),
    *(strategy(name) for name in ("auto", "fsdp", "zero3", "zero3_offload")),
    Stage("real", ("train.py", "experiment=smollm2_32k", "hydra.run.dir={out}/run-real"), (), "experiment=smollm2_32k"),
)  # fmt: skip


def run(stage: Stage, out: Path, rehearse: bool, limit: float) -> dict:
    """Runs a stage; what came of it."""
    if stage.name == "real" and not (REPOSITORY / "conf" / "experiment" / "smollm2_32k.yaml").exists():
        return {"status": "not there yet"}
    if stage.name.startswith("strategy-") and not torch.cuda.is_available() and "zero" in stage.name:
        return {"status": "needs a GPU"}
    arguments, start = stage.arguments(out, rehearse), time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with open(out / f"{stage.name}.log", "w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=REPOSITORY, stdout=log, stderr=log, timeout=limit, check=False,
                env=environment,
            )  # fmt: skip
            status = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"took more than {limit:.0f} s"
    found = {"status": status, "seconds": round(time.monotonic() - start, 1), "command": " ".join(arguments)}
    file = out / f"{stage.name}.json"
    if file.exists():
        found["result"] = read_json(file)
    shutil.rmtree(out / f"run-{stage.name.removeprefix('strategy-')}", ignore_errors=True)
    return found


def go_through(args) -> dict:
    """All stages that are asked for and not done yet; the summary."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    file = out / "summary.json"
    summary = read_json(file) if file.exists() else {"stages": {}}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    summary |= {"card": card, "date": date.today().isoformat(), "commit": _commit(), "rehearsal": args.rehearse,
                "machine": machine()}  # fmt: skip
    end = time.monotonic() + 60 * args.minutes
    for stage in STAGES:
        if (args.only and stage.name not in args.only) or stage.name in args.skip:
            continue
        if summary["stages"].get(stage.name, {}).get("status") == "done":
            continue
        left = end - time.monotonic()
        if left < 10:
            print(f"{stage.name}: no time left", flush=True)
            break
        print(f"{stage.name} ...", end=" ", flush=True)
        found = run(stage, out, args.rehearse, min(LIMIT, left))
        summary["stages"][stage.name] = found
        write_json(file, summary)
        print(f"{found['status']} ({found.get('seconds', 0):.0f} s)", flush=True)
    return summary


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)  # noqa: PLW1510
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def table(summary: dict) -> str:
    """What a folder holds, for docs/SPEED.md."""
    versions = summary["machine"]["packages"]
    lines = [
        f"{summary['card']}, {summary['date']}, commit {summary['commit']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}:",
        "",
        "| stage | what | result |",
        "|---|---|---|",
    ]
    for stage in STAGES:
        found = summary["stages"].get(stage.name)
        if found is not None:
            lines.append(f"| {stage.name} | {stage.tells} | {_in_words(found)} |")
    return "\n".join(lines)


def _in_words(found: dict) -> str:
    result = found.get("result")
    if found["status"] != "done" or result is None:
        return f"{found['status']} ({found['seconds']:.0f} s)" if "seconds" in found else found["status"]
    if result["benchmark"] == "efficiency":
        (one,) = result["targets"]
        times = one["times_as_long"]
        return (
            f"full-length takes {times['median']:.1f} ({times['min']:.1f} to {times['max']:.1f}) times as long, "
            f"{one['memory_ratio']:.1f} times the memory; measured by FLOPs {one['measured_by_flops']:.2f}"
        )
    rates, mfu = result["tokens_per_second"], result["mfu"]
    words = f"{rates['median']:,.0f} ({rates['min']:,.0f} to {rates['max']:,.0f}) tokens/s"
    words += f", MFU {mfu['median']:.1%}" if mfu else ""
    return words + (f", {result['peak_memory_gib']:.1f} GiB" if result["peak_memory_gib"] else "")


def write(folder: Path, doc: Path = DOC):
    """Puts the table of a folder into a document, between its marks.

    Raises:
        SystemExit: it was a rehearsal, or the document has no marks.
    """
    summary = read_json(folder / "summary.json")
    if summary["rehearsal"]:
        raise SystemExit(f"{folder} holds a rehearsal, whose figures say nothing of a GPU: not written")
    text = doc.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{doc} has no place for it: put {BEGIN} and {END} there")
    new = re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{table(summary)}\n{END}", text, flags=re.S
    )
    with atomic_file(doc) as file:
        file.write(new)


def main():
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", default=[], choices=names, metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=12, help="no stage runs beyond them")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument(
        "--write", action="store_true", help="put what --out holds into docs/SPEED.md, and nothing else"
    )
    args = parser.parse_args()
    if args.write:
        write(args.out)
        return
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error("there is no GPU here: --rehearse runs the same commands with small shapes")
    summary = go_through(args)
    done = sum(found["status"] == "done" for found in summary["stages"].values())
    print(table(summary))
    print(json.dumps({"benchmark": "gpu", "done": done, "out": str(args.out), "machine": summary["machine"]}))


if __name__ == "__main__":
    main()
