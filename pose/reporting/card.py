"""The model card of an exported folder: what the model is, how it was made, what was measured, how to load it."""

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from pose.errors import one_line
from pose.evaluation.task import Metric, shown
from pose.files import atomic_file
from pose.modeling.export.engines import factor_is_not_ratio
from pose.positions import PositionSampler
from pose.reporting.text import markdown
from pose.rope import RopeScaling

COLUMNS = {
    "untuned": "as it was",
    "scaled": "RoPE rescaled, nothing trained",
    "extended": "this model",
}
LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model")  # this folder
tokenizer = AutoTokenizer.from_pretrained("model")"""


# What serves this folder, by engine; docs/SERVING.md explains the options.
SERVE = {
    "vllm": "vllm serve model --max-model-len {window}",
    "sglang": "python -m sglang.launch_server --model-path model --context-length {window}",
    "llama.cpp": "python -m pose.export model gguf && llama-server -m model-f16.gguf -c {window}",
    "ollama": """python -m pose.export model gguf
printf 'FROM ./model-f16.gguf\\nPARAMETER num_ctx {window}\\n' > Modelfile && ollama create extended -f Modelfile""",
    "mlx": "mlx_lm.server --model model",
}


@dataclass(frozen=True)
class Card:
    """What a card says. Lengths are in tokens; texts come as they are, and are made safe for Markdown here.

    Attributes:
        base: hub id, or folder, of the model that was extended; None for random weights. Of a folder
            only its name is shown, or its run's for RUN/model and RUN/best.
        license: of the base, where it is known.
        model_type: transformers' name of the architecture.
        window: of the base.
        target_len: of this model.
        sampler: of the position ids; its class and fields are shown.
        scaling: of RoPE; likewise.
        rope_base: the base b of the unscaled model; None where the base model was scaled already.
        data: names of what was trained on.
        training: further rows of the table, label: value.
        results: metrics by model: untuned, scaled, extended.
        measured_on: names of the documents that perplexity is of.
        command: that made it, without folders of this machine.
        versions: package: version.
        commit: of the code, where it is known.
        cache_bytes: of a token's keys and values in 16 bits; None says nothing about memory.
        misread: engines that serve this folder wrong, each with why; None says nothing about engines.
        described: what the tasks say of their metrics, by name; of others only what their names tell is known.
    """

    base: str | None
    license: str | None
    model_type: str
    window: int
    target_len: int
    sampler: PositionSampler
    scaling: RopeScaling
    rope_base: float | None
    data: Sequence[str]
    training: Mapping[str, str]
    results: Mapping[str, Mapping[str, float]]
    measured_on: Sequence[str]
    command: str
    versions: Mapping[str, str]
    commit: str | None = None
    cache_bytes: int | None = None
    misread: Mapping[str, str] | None = None
    described: Mapping[str, Metric] | None = None

    def write(self, folder: str | Path):
        """Writes README.md into the folder of the model, in one step."""
        with atomic_file(Path(folder) / "README.md") as file:
            file.write(self.text())

    def text(self) -> str:
        """The whole card, in Markdown with a YAML head as the Hugging Face hub reads it."""
        parts = [self._head(), self._title(), self._making(), self._measured(), self._loading(), self._serving()]
        parts.append(self._repeating())
        return "\n\n".join(part for part in parts if part) + "\n"

    @property
    def name(self) -> str:
        """Of the base, in one line."""
        if self.base is None:
            return one_line(f"A {self.model_type} model from random weights")
        folder = Path(self.base).expanduser()
        if not folder.is_dir():
            return one_line(without_folders(self.base))
        folder = folder.resolve()
        return one_line(folder.parent.name if folder.name in ("model", "best") else folder.name)

    def _head(self) -> str:
        base = {} if self.base is None else {"base_model": self.name, "base_model_relation": "finetune"}
        head: dict[str, Any] = base | {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": None if self.license is None else one_line(self.license),
            "tags": ["pose", "long-context", "rope"] + [self.scaling.name] * (self.scaling.name != "none"),
        }
        return f"---\n{ModelCardData(**head).to_yaml()}\n---"

    def _title(self) -> str:
        name = markdown(self.name)
        if self.target_len <= self.window:
            return f"# {name}: window {self.window:,} tokens"
        times = f"{self.target_len / self.window:.4g}"
        return (
            f"# {name}, extended from {self.window:,} to {self.target_len:,} tokens\n\n"
            f"The window of {name} is {self.window:,} tokens; this model uses {times} times as many. It was "
            f"trained on examples of {self.sampler.example_len:,} tokens whose position ids lie between 0 and "
            f"{self.sampler.target_len - 1:,}, after [PoSE](https://arxiv.org/abs/2309.10400), with the package `pose`."
        )

    def _making(self) -> str:
        base = "scaled already" if self.rope_base is None else f"base {self.rope_base:,g} before scaling"
        data = [
            markdown(without_folders(name)) + (f" ({times} times)" if times > 1 else "")
            for name, times in Counter(self.data).items()
        ]
        rows = {
            "Base model": f"{markdown(self.name)}, window {self.window:,} tokens",
            "Window": f"{self.target_len:,} tokens",
            "Length in training": f"{self.sampler.example_len:,} tokens",
            "Position ids": _described(self.sampler, without=("train_len", "target_len")),
            "RoPE": f"{_described(self.scaling)}; {base}",
            "Data": ", ".join(data),
            **{markdown(label): markdown(value) for label, value in self.training.items()},
        }
        return "## How it was made\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items())

    def _measured(self) -> str:
        models = [name for name in COLUMNS if name in self.results]
        found = dict.fromkeys(name for model in models for name in self.results[model])
        names = [name for name in found if not name.startswith("position_ppl")]
        if not names:
            return ""
        families = list(dict.fromkeys(name.split("@")[0] for name in names))
        names.sort(key=lambda name: families.index(name.split("@")[0]))  # a family's lengths stay in their order
        lines = ["| | " + " | ".join(f"{name}: {COLUMNS[name]}" for name in models) + " |"]
        lines.append("|---|" + "---|" * len(models))
        for name in names:
            values = [self.results[model].get(name) for model in models]
            cells = ("" if value is None else shown(name, value, self.described) for value in values)
            lines.append(f"| {markdown(name)} | " + " | ".join(cells) + " |")
        text = "## What was measured\n\n" + "\n".join(lines)
        text += "\n\n`@N` is the length in tokens."
        if any(name.startswith("tail_ppl") for name in names):
            text += " `tail_ppl` is the perplexity of the same last tokens, given more or less text before them."
        if self.measured_on:
            text += f" Perplexity is of these documents: {', '.join(map(markdown, self.measured_on))}."
        return text

    def _loading(self) -> str:
        text = f"## Load it\n\n```python\n{LOAD}\n```"
        factor, ratio = self.scaling.factor, self.target_len / self.window
        if factor_is_not_ratio(self.scaling, self.window, self.target_len):
            text += (
                f"\n\nOn loading, transformers warns that the factor ({factor:g}) is not the ratio of the two windows "
                f"({ratio:g}), and asks to correct the config. Change nothing: the model was trained with {factor:g}. "
                f"transformers 4.55 and older take {ratio:g} all the same, and with it give another model: use a newer "
                "one."
            )
        return text

    def _serving(self) -> str:
        if self.misread is None:
            return ""
        text = f"## Serve it\n\nThe window is {self.target_len:,} tokens."
        if self.cache_bytes:
            whole = self.cache_bytes * self.target_len / 2**30
            text += (
                f" Keys and values of a text as long take {whole:.3g} GiB in 16 bits ({self.cache_bytes:,} bytes a "
                "token), beside the weights."
            )
        commands = [line.format(window=self.target_len) for name, line in SERVE.items() if name not in self.misread]
        text += "\n\n```bash\n" + "\n".join(commands) + "\n```"
        for engine, why in self.misread.items():
            text += f"\n\n**Not with {engine}**: {markdown(why)}."
        return text

    def _repeating(self) -> str:
        command = one_line(self.command)
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", command)), 3)  # longer than any inside
        versions = ", ".join(f"{markdown(name)} {markdown(version)}" for name, version in self.versions.items())
        commit = f", commit {markdown(self.commit)}" if self.commit else ""
        return f"## Repeat it\n\n{fence}\n{command}\n{fence}\n\nWith {versions}{commit}."


def without_folders(text: str) -> str:
    """Paths of one machine (absolute, or from the home folder) cut down to the names of what they lead to.

    Hub ids and relative paths stay as they are; several paths may stand in one text.
    """
    return re.sub(r"(?<![^\s=,\[\"'])(~|/)[^\s,\]\"']*", lambda path: Path(path[0]).name or path[0], text)


def license_of(folder: str) -> str | None:
    """The license that the card of a local folder names; None where there is no card, or none in it."""
    card = Path(folder).expanduser() / "README.md"
    try:
        license = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return license if isinstance(license, str) else None


def _described(method: Any, without: Sequence[str] = ()) -> str:
    """The name, what is set, and the first line of the docstring."""
    settings = [
        f"{field.name}={markdown(_setting(getattr(method, field.name)))}"
        for field in fields(method)
        if field.name not in without and getattr(method, field.name) is not None
    ]
    text = f"`{method.name}`" + (f" ({', '.join(settings)})" if settings else "")
    return f"{text}: {(inspect.getdoc(type(method)) or '').partition(chr(10))[0].rstrip('.')}"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        return f"{len(value)} values"
    return value.name if isinstance(value, PositionSampler | RopeScaling) else str(value)
