"""The command `python -m pose.search`: divisors of the rotary frequencies, found on the model that is not trained.

python -m pose.search model=llama3_8b pose.target_len=131072 hydra.run.dir=DIR

leaves DIR/factors.yaml, for train.py rope=searched rope.factors=DIR, DIR/search.csv with all that was tried, and
DIR/needles.csv with what was found beside other scalings. With search.population=0 nothing is searched: scalings are
compared; or, of a model whose RoPE is scaled already, as train.py exports it, the model as it is. Given again with the
same DIR, the command goes on where it was.
"""

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from pose.app import schema
from pose.app.hints import naming_near_keys
from pose.divisors import Candidate, Evolution, Space
from pose.errors import ConfigError, DataError, require_choice, require_int
from pose.files import CONF, Memo, atomic_file, locate, read_json, write_json
from pose.rope import NTK, Frequencies, Linear, LongRope, RopeGeometry, RopeScaling, Yarn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pose.app.needles import Measured
    from pose.evaluation.needle_fitness import NeedleFitness
    from pose.tasks.needle_gain import MultiKeyPrompts

log = logging.getLogger("pose.app.search")
schema.register()

CHARS = 1_000_000  # of a text, at most: tokenising more would take longer than a question gains by it
PLAIN = "pose.rope.Unscaled"  # of rope=none, the default of conf/search.yaml
MAX_SHARED = 0.1  # of the lines of a held-out text: those of a licence may be in both
CHARS_TOLD_APART = 50_000  # by whose tokens two tokenizers are told apart
NAMED_OTHERWISE = (  # in what tells two searches apart, or no part of it
    "num_generations", "depths", "haystack", "heldout", "add_bos", "example_len", "methods", "baselines"
)  # fmt: skip
UNUSED = (  # train.py's groups
    "data", "objective", "finetune", "strategy", "logger", "eval", "watch", "pose", "trainer"
)  # fmt: skip
USED = ("pose.target_len", "trainer.accelerator")  # of which a search takes these
COLUMNS = ("generation", "nll", "first", "divisors")
SEARCHED = "searched"
AS_IT_IS = "as it is"  # a model that is scaled already
FIRST = "first generation"  # its best candidate: what the generations after it have gained on text they have not seen
OTHER_FOLDER = "Give another hydra.run.dir"
QUESTIONS = "questions about"  # a text: what follows from all else that is noted, by this version
OWN, HELDOUT = "haystack", "heldout"  # keys of search: the text that is searched on, and another
NLL = {OWN: "nll", HELDOUT: "heldout_nll"}  # in factors.yaml
TITLES = {OWN: "searched on", HELDOUT: "held out"}
BASELINES: dict[str, RopeScaling] = {
    "linear": Linear(), "ntk": NTK(), "yarn": Yarn(), "ntk, rcd_shift": NTK(rcd_shift=True),
    "yarn, rcd_shift": Yarn(rcd_shift=True),
}  # fmt: skip


@naming_near_keys("search")
@hydra.main(version_base="1.3", config_path=str(CONF), config_name="search")
def main(cfg: DictConfig):
    """Searches, and writes what was found."""
    from pose.app import runtime  # torch and the like are imported when the config stands
    from pose.app.preflight import check_config
    from pose.training import signals
    from pose.training.folder import alone_in

    def advice() -> str:
        return f"The same command with hydra.run.dir={runtime.run_folder()} goes on"

    with runtime.readable_errors(), signals.ending(advice):
        check_config(cfg, schema.SearchConfig)
        folder = runtime.run_folder()
        runtime.set_up(cfg)
        if unused := [given for given in HydraConfig.get().overrides.task if _is_unused(given)]:
            log.warning(
                f"{', '.join(unused)}: has no part in a search, whose own keys are search.KEY (docs/SETTINGS.md)"
            )
        with alone_in(folder):
            search(cfg, folder)


def _is_unused(override: str) -> bool:
    """Whether an override is of what only a training has."""
    key = override.lstrip("+~").partition("=")[0]
    return key.split(".")[0].split("@")[0] in UNUSED and key not in USED


@dataclass(frozen=True)
class _Task:
    """What a search has to do, once everything that it needs is known to be good.

    Attributes:
        geometry, target_len: of the model and its extension.
        scaling: the method whose divisors are searched for; None of a model that is scaled already.
        scalings: those without a search that are measured too, by name.
        evolution: how; None where methods are compared and nothing is searched.
        fitness: NLL of needle answers, on the text that is searched on and on another, by their keys.
        settings: by which two searches are told apart.
        tried: NLL of the candidates that a process before has tried.
        generations: in which each was.
    """

    geometry: RopeGeometry
    target_len: int
    scaling: LongRope | None
    scalings: dict[str, Frequencies]
    evolution: Evolution | None
    fitness: dict[str, "NeedleFitness"]
    settings: dict[str, Any]
    tried: dict[Candidate, float]
    generations: dict[Candidate, int]

    @property
    def space(self) -> Space:
        """Where candidates lie."""
        assert self.scaling is not None and self.scaling.factor is not None
        return Space.of(self.geometry, self.scaling.factor)

    def frequencies(self, candidate: Candidate) -> Frequencies:
        """Of a candidate."""
        assert self.scaling is not None
        return replaced(self.scaling, candidate).frequencies(self.geometry)


def search(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Searches for the divisors of a model.

    Args:
        cfg: as composed.
        folder: for factors.yaml, search.csv and what tells another search from this one.

    Returns:
        What factors.yaml says; {} where nothing is searched.

    Raises:
        PoseError: what cannot be searched, before anything long.
    """
    from pose.app.needles import compare

    task = _prepare(cfg, folder)
    if task.evolution is None:
        _say(compare(task.scalings, task.fitness, folder / "needles.csv"), {OWN: OWN, HELDOUT: HELDOUT})
        log.info(f"Answers     {folder}/needles.csv")
        return {}
    best, tried = _evolve(task, task.evolution, cfg.seed, folder)
    first = min((one for one in tried if task.generations[one] == 0), key=_order(tried))
    scalings = {SEARCHED: task.frequencies(best), FIRST: task.frequencies(first)} | task.scalings
    measured = compare(scalings, task.fitness, folder / "needles.csv")
    rows = {name: {NLL[one.text]: one.nll for one in measured if one.scaling == name} for name in scalings}
    found = _factors(task, best, rows, len(tried))
    with atomic_file(folder / "factors.yaml") as file:
        file.write(f"# python train.py rope=searched rope.factors={folder}  (docs/ROPE.md)\n")
        file.write(OmegaConf.to_yaml(OmegaConf.create(found)))
    _say(measured, TITLES)
    _warn(rows, folder)
    return found


def _prepare(cfg: DictConfig, folder: Path) -> _Task:
    """Checks everything, and then reads the weights.

    Raises:
        PoseError: what cannot be searched, or a folder with another search.
    """
    import torch

    from pose.app import models, runtime
    from pose.app.build import build_scaling
    from pose.data.datamodule import bos_id
    from pose.evaluation.needle_fitness import NeedleFitness
    from pose.evaluation.scoring import Scorer
    from pose.evaluation.suite import far_depths
    from pose.modeling.checkpoints.fingerprint import fingerprint
    from pose.modeling.guards import check_computing
    from pose.modeling.load import build_model, check_weights, load_tokenizer
    from pose.modeling.speed import CUDA, check_accelerator
    from pose.tasks.needle_gain import NUM_KEYS

    options: schema.SearchOptions = schema.to_options(cfg.search, schema.SearchOptions)
    evolution = None
    if options.population != 0:
        evolution = Evolution(options.population, options.num_generations, options.num_parents, options.mutation)
    if cfg.rope.get("_target_") != PLAIN:
        raise ConfigError(
            f"rope ({cfg.rope.get('_target_')}) has no part in a search, which looks for divisors of the model's own "
            "frequencies: leave it out"
        )
    build_scaling(cfg.rope)  # refuses a factor
    require_choice("trainer.accelerator", cfg.trainer.accelerator, ("auto", "cpu", *CUDA))
    check_accelerator(cfg.trainer.accelerator)
    if options.depths is not None and len(options.depths) > NUM_KEYS * options.trials:
        raise ConfigError(
            f"search.depths has {len(options.depths)} places, and search.trials={options.trials} has {NUM_KEYS} "
            f"needles a text: give search.trials={-(-len(options.depths) // NUM_KEYS)} or more, or fewer places"
        )
    require_int("pose.target_len", cfg.pose.target_len, at_least=1)
    if options.example_len is not None and options.example_len > cfg.pose.target_len:
        raise ConfigError(
            f"search.example_len={options.example_len} is above pose.target_len={cfg.pose.target_len}: the position "
            "ids of an example skip ahead to the target"
        )
    if cfg.model.path is None:
        raise ConfigError("model.path is not set: a search needs the weights of a model, a folder or a hub id")
    models.find_model(cfg)
    config = models.model_config(cfg)
    baselines = BASELINES if options.baselines else {}
    methods = baselines | _methods(options.methods, {*baselines, SEARCHED, FIRST, AS_IT_IS})
    geometry = _geometry(config, evolution, methods)
    scaling = None
    if methods or evolution:
        scaling = _scaled(config, geometry, cfg.pose.target_len, options, methods, evolution)
    path = locate(cfg.model.path)
    tokenizer = load_tokenizer(locate(cfg.model.tokenizer or cfg.model.path), cfg.model.revision)
    models.check_vocabulary(tokenizer, config, cfg.model.path)
    check_weights(config, path, cfg.model.revision)
    bos = bos_id(tokenizer, options.add_bos, "search.add_bos", config.vocab_size)
    depths = far_depths(NUM_KEYS * options.trials) if options.depths is None else list(options.depths)
    texts = _texts(options)
    prompts = _prompts(texts, tokenizer, config.vocab_size, cfg.seed, bos)
    length, target_len = options.example_len or cfg.pose.target_len, cfg.pose.target_len
    for one in prompts:
        _check_length(one, target_len, options.example_len, depths, options.trials)
    device = torch.device("cuda" if cfg.trainer.accelerator in ("auto", *CUDA) and torch.cuda.is_available() else "cpu")
    attention = models.attention_on(cfg.model.attention, device)
    files = fingerprint(path, cfg.model.revision, Memo(Path(cfg.cache_dir).expanduser() / ".memo"))
    settings = {
        "model": hashlib.sha256(json.dumps(files).encode()).hexdigest(), "target_len": cfg.pose.target_len,
        "seed": cfg.seed, "factor": scaling and scaling.factor, "depths": depths, "attention": attention,
        "device": device.type, "questions of a text": NUM_KEYS, "bos": bos,
        **{key: value for key, value in asdict(options).items() if key not in NAMED_OTHERWISE},
        "attention_factor": scaling and scaling.attention_factor,
        **({} if options.example_len is None else {"example_len": options.example_len}),
        **{f"text of {key}": hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()},
        **{f"tokens of {key}": _digest_of_tokens(tokenizer, text) for key, text in texts.items()},
        **{
            f"{QUESTIONS} {key}": _digest_of_questions(one, length, depths, options.trials, target_len)
            for key, one in zip(texts, prompts, strict=True)
        },
    }  # fmt: skip
    _check_folder(folder, settings)
    write_json(folder / "settings.json", settings)
    tried, generations = ({}, {}) if evolution is None else _go_on(folder / "search.csv")
    runtime.save_config(cfg, folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(config, path, attention, dtype, cfg.model.revision).to(device)  # type: ignore[arg-type]
    check_computing(model, device)  # answers are scored from hidden states
    scorer = Scorer(model)
    fitness = {
        key: NeedleFitness(scorer, one, length, depths, options.trials, target_len)
        for key, one in zip(texts, prompts, strict=True)
    }
    scalings = {
        name: method.resolve(geometry, target_len).frequencies(geometry, target_len) for name, method in methods.items()
    }
    if scaling is None:
        scalings = {AS_IT_IS: _own_frequencies(model, target_len)}
    return _Task(geometry, target_len, scaling, scalings, evolution, fitness, settings, tried, generations)


def _methods(asked: Any, taken: Collection[str]) -> dict[str, RopeScaling]:
    """Those of `search.methods`, whose names are none of those that are taken.

    Raises:
        ConfigError: a name that a row of the table has already, or what is no method with arguments that it takes.
    """
    from pose.app.build import build_scaling

    if asked is not None and not isinstance(asked, dict):
        raise ConfigError(f"search.methods={asked!r} is not accepted: give {{NAME: {{rope: yarn, factor: 8}}, ...}}")
    files, methods = {file.stem: file for file in (CONF / "rope").glob("*.yaml")}, {}
    for name, arguments in ((str(name), arguments) for name, arguments in (asked or {}).items()):
        key = f"search.methods.{name}"
        if name in taken:
            raise ConfigError(f"{key} is the name of a row that is there already: give another")
        if not isinstance(arguments, dict) or "rope" not in arguments:
            raise ConfigError(f"{key}={arguments!r} is not accepted: give {{rope: NAME}}, and what rope=NAME takes")
        given = dict(arguments)
        require_choice(f"{key}.rope", given.pop("rope"), sorted(files))
        node = OmegaConf.merge(OmegaConf.load(files[arguments["rope"]]), given)
        assert isinstance(node, DictConfig)
        methods[name] = build_scaling(node, key)
    return methods


def _digest_of_tokens(tokenizer, text: str) -> str:
    """Of the beginning of a text: what another tokenizer makes otherwise."""
    ids = tokenizer(text[:CHARS_TOLD_APART], add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _digest_of_questions(
    prompts: "MultiKeyPrompts", length: int, depths: Sequence[float], trials: int, target_len: int
) -> str:
    """Of what is asked: other words, or code that hides needles otherwise, make other questions of the same text."""
    from pose.evaluation.needle_fitness import depths_of_texts

    digest = hashlib.sha256()
    for trial, asked in enumerate(depths_of_texts(depths, trials)):
        text = prompts.sample(length, asked, trial, target_len)
        digest.update(text.input_ids.tobytes() + text.position_ids.tobytes() + str(text.answers).encode())
    return digest.hexdigest()


def _geometry(config, evolution: Evolution | None, methods: Collection[str]) -> RopeGeometry:
    """The geometry of a model that there is something to measure of: scalings, or the one that it has.

    Raises:
        PoseError: the model cannot be extended, or there is nothing to measure.
    """
    from pose.modeling.layers import check_layers
    from pose.modeling.load import rope_geometry

    check_layers(config)
    geometry = rope_geometry(config)
    is_scaled = geometry.rope_type != "default"
    if is_scaled and (evolution or methods):
        raise ConfigError(
            f"the RoPE of model.path is scaled already (rope_type {geometry.rope_type!r}): other scalings need the "
            "unscaled model. search.population=0 search.baselines=false without search.methods measures it as it is"
        )
    if not is_scaled and not evolution and not methods:
        raise ConfigError(
            "search.population=0 compares scalings, and search.baselines=false leaves none: give search.methods"
        )
    return geometry


def _own_frequencies(model: "PreTrainedModel", target_len: int) -> Frequencies:
    """Those with which a model rotates a text of target_len tokens."""
    from pose.modeling.compat import rotary_modules
    from pose.modeling.rotary import frequencies_at

    module = rotary_modules(model)[0]  # one RoPE for all layers
    return Frequencies(frequencies_at(module, target_len).cpu().clone(), float(module.attention_scaling))


def _scaled(
    config,
    geometry: RopeGeometry,
    target_len: int,
    options: schema.SearchOptions,
    methods: dict[str, RopeScaling],
    evolution: Evolution | None,
) -> LongRope:
    """The method that is searched for, or only compared; it is in the model's config afterwards.

    Raises:
        PoseError: the model cannot be extended to this target, or there is nothing to search for.
    """
    from pose.modeling.load import scale_config

    if target_len <= geometry.window:
        raise ConfigError(
            f"pose.target_len={target_len} is not above the model's own window of {geometry.window} tokens: there is "
            "nothing to extend"
        )
    ones = [1.0] * (geometry.dim // 2)
    plain = LongRope(long_factor=ones, short_factor=ones, attention_factor=options.attention_factor)
    scaling = scale_config(config, plain, target_len)
    assert isinstance(scaling, LongRope) and scaling.factor is not None
    if evolution is not None:
        Space.of(geometry, scaling.factor)
    for method in methods.values():  # measured at the end, refused here
        method.resolve(geometry, target_len)
    return scaling


def _texts(options: schema.SearchOptions) -> dict[str, str]:
    """What is searched on, and what the winner is measured on besides."""
    from pose.app.documents import find_documents
    from pose.evaluation.options import read_haystack

    texts = {
        key: read_haystack(find_documents(f"search.{key}", getattr(options, key)), "search", key)
        for key in (OWN, HELDOUT)
    }
    for key, text in texts.items():
        if not text.strip():
            raise ConfigError(f"search.{key}={getattr(options, key)} is empty: give a text to hide needles in")
        if len(text) > CHARS:
            log.info(f"Text        search.{key}: the first {CHARS:,} of {len(text):,} characters")
    texts = {key: text[:CHARS] for key, text in texts.items()}
    if (share := _share_in(texts[OWN], texts[HELDOUT])) >= MAX_SHARED:
        raise ConfigError(
            f"search.heldout={options.heldout} is the text of search.haystack={options.haystack} by {share:.0%} of its "
            "lines: the winner is to be measured on text that no candidate was chosen by. Give another one"
        )
    return texts


def _share_in(own: str, heldout: str) -> float:
    """Of the lines of a text, by their characters, how much is in the other one too."""
    lines = [line for line in heldout.split("\n") if line.strip()]
    known = set(own.split("\n"))
    return sum(len(line) for line in lines if line in known) / sum(map(len, lines))


def _prompts(texts: dict[str, str], tokenizer, vocab_size: int, seed: int, bos: int | None) -> list["MultiKeyPrompts"]:
    """Questions about needles in each text."""
    from pose.data.tokenizer import check_vocabulary
    from pose.tasks.needle_gain import MultiKeyPrompts

    prompts = []
    for i, (key, text) in enumerate(texts.items()):
        check_vocabulary(tokenizer, text, vocab_size, f"search.{key}")
        try:
            prompts.append(MultiKeyPrompts(tokenizer, text, seed=seed + i, bos_id=bos))
        except ConfigError as error:
            raise error.under("search") from None
    return prompts


def _check_length(
    prompts: "MultiKeyPrompts", target_len: int, example_len: int | None, depths: list[float], trials: int
):
    """Raises a ConfigError where a target, or an example, is too short for a question."""
    key, length = ("pose.target_len", target_len) if example_len is None else ("search.example_len", example_len)
    shortest = prompts.shortest(length, depths, trials)
    if shortest > length:
        raise ConfigError(
            f"{key}={length} is too short for a question about needles, which has {shortest} tokens with this tokenizer"
        )


def _evolve(task: _Task, evolution: Evolution, seed: int, folder: Path) -> tuple[Candidate, dict[Candidate, float]]:
    """Goes through the generations; the best candidate of them, and the NLL of all."""
    tried, generations, space, own = task.tried, task.generations, task.space, task.fitness[OWN]
    for index in range(evolution.num_generations + 1):
        before = {one: nll for one, nll in tried.items() if generations[one] < index}
        children = evolution.generation(space, seed, index, before)
        _try(children, index, tried, generations, lambda one: own(task.frequencies(one)), folder)
        known = {one: nll for one, nll in tried.items() if generations[one] <= index}  # a longer search has more
        best = min(known, key=_order(known))
        log.info(
            f"Generation {index} of {evolution.num_generations}: best {known[best]:.4f} nats per token, from j = "
            f"{best.first} of {space.num} on"
        )
    return best, known


def replaced(scaling: LongRope, candidate: Candidate) -> LongRope:
    """The method of a candidate, the same at every length."""
    divisors = candidate.divisors()
    return replace(scaling, long_factor=divisors, short_factor=divisors)


def _order(tried: dict[Candidate, float]) -> Callable[[Candidate], tuple]:
    return lambda one: (tried[one], one.first, one.beyond)


def _try(
    children: list[Candidate],
    index: int,
    tried: dict[Candidate, float],
    generations: dict[Candidate, int],
    fitness: Callable[[Candidate], float],
    folder: Path,
):
    """Measures those of a generation that have not been, and writes each down at once."""
    left = [one for one in children if one not in tried]
    with (folder / "search.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        for one in tqdm(left, desc=f"generation {index}", unit="candidate", leave=False):
            nll = fitness(one)
            tried[one], generations[one] = nll if math.isfinite(nll) else math.inf, index
            writer.writerow(_row(one, tried[one], index))
            file.flush()


def _row(one: Candidate, nll: float, generation: int) -> list:
    """A line of search.csv, by COLUMNS, from which `_go_on` has the candidate back to the bit."""
    return [generation, repr(nll), one.first, " ".join(map(repr, one.divisors()))]


def _check_folder(folder: Path, settings: dict[str, Any]):
    """Raises a ConfigError where a folder holds another search, or a training."""
    from pose.training.folder import check_kind

    check_kind(folder, "a search")
    before = read_json(folder / "settings.json")
    if not before and (left := [name for name in ("search.csv", "needles.csv") if (folder / name).exists()]):
        raise ConfigError(
            f"{folder} holds a search ({', '.join(left)}) whose settings.json is missing or damaged, so that nothing "
            "says what was measured: give another hydra.run.dir"
        )
    differing = [key for key in before | settings if before and before.get(key) != settings.get(key)]
    given = [key for key in differing if not key.startswith(QUESTIONS)]
    if differing and not given:
        raise ConfigError(
            f"{folder} holds a search by an earlier version, of pose or of wonderwords, which may have asked other "
            "questions: give another hydra.run.dir"
        )
    if changed := [f"{key}={settings.get(key)!r}, which was {before.get(key)!r}" for key in given]:
        raise ConfigError(
            f"{folder} holds another search: {'; '.join(changed)}. Give the earlier values to go on with it, or "
            "another hydra.run.dir"
        )


def _go_on(file: Path) -> tuple[dict[Candidate, float], dict[Candidate, int]]:
    """What a search has tried before by its search.csv, with the generation of each; the file is there afterwards.

    Raises:
        DataError: a line that is none of a search.
    """
    tried: dict[Candidate, float] = {}
    generations: dict[Candidate, int] = {}
    text = file.read_text(errors="replace") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a process that was killed may have left half a line
    lines = csv.DictReader(io.StringIO(whole))
    if whole and tuple(lines.fieldnames or ()) != COLUMNS:
        raise DataError(f"{file} is no table of a search, which begins with {','.join(COLUMNS)}. {OTHER_FOLDER}")
    for row in lines:
        try:
            first, divisors = int(row["first"]), [float(number) for number in row["divisors"].split()]
            if not 0 <= first < len(divisors):
                raise ValueError(f"first={first} is none of {len(divisors)} divisors")
            one = Candidate(first, tuple(divisors[first:]))
            tried[one], generations[one] = float(row["nll"]), int(row["generation"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file} has a line that is none of a search: {row}. {OTHER_FOLDER}") from error
    with atomic_file(file, newline="") as new:
        writer = csv.writer(new)
        writer.writerow(COLUMNS)
        writer.writerows(_row(one, nll, generations[one]) for one, nll in tried.items())
    if tried:
        log.info(f"Going on with {len(tried):,} candidates tried before")
    return tried, generations


def _factors(task: _Task, best: Candidate, rows: dict, num: int) -> dict[str, Any]:
    geometry, scaling = task.geometry, task.scaling
    assert scaling is not None
    return {
        "long_factor": best.divisors(),
        "attention_factor": scaling.attention_factor,
        "factor": scaling.factor,
        "searched_for": {
            "base": geometry.base, "dim": geometry.dim, "window": geometry.window, "target_len": task.target_len,
            "model": task.settings["model"], "seed": task.settings["seed"],
        },
        "critical_dimension": 2 * best.first,
        "candidates": num,
        "needle_answers": rows,
    }  # fmt: skip


def _say(measured: list["Measured"], titles: Mapping[str, str]):
    """A table of the scalings, with titles for the texts."""
    from pose.app.needles import table
    from pose.reporting.tables import print_table

    print_table(table(measured, titles))


def _warn(rows: dict[str, dict[str, float]], folder: Path):
    """Of methods that are better than what was found, and where everything is."""
    for key, where in (("nll", "on the text searched on"), ("heldout_nll", "on text that the search has not seen")):
        better = [name for name, row in rows.items() if name != FIRST and row[key] < rows[SEARCHED][key]]
        if better:
            log.warning(
                f"{where}, what was found is worse than {', '.join(better)}: give it more search.num_generations or "
                "search.trials, or take that method"
            )
    if rows[FIRST]["heldout_nll"] < rows[SEARCHED]["heldout_nll"]:
        log.warning(
            "on text that the search has not seen, the best of its first generation is better than what was found: the "
            "later generations fitted the text searched on. Give it more search.trials (every candidate's divisors are "
            f"in {folder}/search.csv)"
        )
    log.info(f"Factors     {folder}/factors.yaml  (train.py rope=searched rope.factors={folder})")
    log.info(f"Tried       {folder}/search.csv; beside other scalings {folder}/needles.csv")


if __name__ == "__main__":
    main()
