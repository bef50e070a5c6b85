"""Before any weights are loaded: the whole run checked, and everything prepared but the model."""

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PretrainedConfig
from yaml import YAMLError

from pose.app import build, measuring, models
from pose.app.documents import find_documents
from pose.app.holding import check_holding, check_teacher, trained_dtype
from pose.app.runtime import write_config
from pose.app.schema import DTYPES, DataConfig, FinetuneConfig, TrainConfig, to_options
from pose.data.cache import check_documents
from pose.data.datamodule import PoseDataModule
from pose.data.documents import Keys
from pose.errors import ConfigError, PoseError, first_line, require_choice, require_int
from pose.evaluation.options import MAX_SEED, EvalOptions
from pose.evaluation.suite import Suite
from pose.files import REPOSITORY, Memo, is_inside, locate
from pose.modeling.attention import resolve_backend
from pose.modeling.checkpoints.fingerprint import fingerprint
from pose.modeling.export.engines import check_engine
from pose.modeling.layers import check_layers
from pose.modeling.load import check_weights, load_tokenizer, rope_geometry, scale_config
from pose.modeling.rotary import target_len_of
from pose.modeling.speed import warn_of_emulated_bf16
from pose.plan import micro_batch_of_views
from pose.positions import Mix, PositionSampler
from pose.rope import NTK, Dynamic, Frequencies, Linear, Llama3, LongRope, NTKByParts, RopeGeometry, RopeScaling, Yarn
from pose.training import launch
from pose.training.callbacks import Export, Throughput
from pose.training.checkpoints import Checkpoint, Checkpoints
from pose.training.micro_batch import AUTO, MicroBatch, is_searched
from pose.training.objectives import Objective
from pose.training.resume import check_finished, check_resume, find_resume, finished_steps, resume_settings
from pose.training.watch import Watch

log = logging.getLogger(__name__)

SHIPPED = REPOSITORY / "assets"
MANY_EPOCHS = 4  # beyond this many, text is memorised (Muennighoff et al. 2023, arXiv 2305.16264)


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights.

    Attributes:
        base: the model's own config.
        config: the same with scaling and new window written in.
        tokenizer: of the model.
        scaling, sampler: with everything filled in.
        objective: what is minimised.
        geometry: of the base.
        trainer: built, not started.
        data: tokenised.
        suite: what is measured before and after; None for eval=none.
        watch: what is measured meanwhile; None without it.
        settings: what decides the weights, by key.
        checkpoint: from which training goes on; None at the beginning.
        is_finished: whether the run folder holds this run, complete.
    """

    base: PretrainedConfig
    config: PretrainedConfig
    tokenizer: Any
    scaling: RopeScaling
    sampler: PositionSampler
    objective: Objective
    geometry: RopeGeometry
    trainer: L.Trainer
    data: PoseDataModule
    suite: Suite | None
    watch: Watch | None
    settings: dict[str, Any]
    checkpoint: Checkpoint | None
    is_finished: bool

    @property
    def ckpt_path(self) -> Path | None:
        """For Trainer.fit."""
        return None if self.checkpoint is None else self.checkpoint.state

    @property
    def step(self) -> int:
        """Optimizer steps done already."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def expected(self) -> Frequencies | None:
        """The closed form that the built model must have at the target; None for a checkpoint's own scaling."""
        closed = self.scaling.name != "none" or self.geometry.rope_type == "default"
        return self.scaling.frequencies(self.geometry, self.sampler.target_len) if closed else None


def check_config(cfg: DictConfig, schema: type):
    """What holds for every command's config: no key beside the schema's, no empty value, seeds in range, whole tokens.

    Raises:
        ConfigError: names the key.
    """
    _check_keys(cfg, schema, "")
    if (target_len := OmegaConf.select(cfg, "pose.target_len")) not in (None, ""):
        require_int("pose.target_len", target_len, at_least=2)  # before a key that takes it over is blamed
    _check_no_empty(cfg, "")
    if cfg.get("seed") is not None:
        require_int("seed", cfg.seed, at_least=0, at_most=MAX_SEED)
    if cfg.get("num_threads") is not None:
        require_int("num_threads", cfg.num_threads, at_least=1)


def _check_keys(node: DictConfig, schema: type, prefix: str):
    """Keys that `+key=value` has put beside those of the schema: nothing would read them."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in node:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            meant = f"did you mean {prefix}{near[0]}?" if near else f"choose from {', '.join(fields)}"
            raise ConfigError(f"{prefix}{key!s} is no key of the config: {meant}")
        kind = OmegaConf.get_type(node, key) if not OmegaConf.is_missing(node, key) else None
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            _check_keys(node[key], kind, f"{prefix}{key}.")


def _check_no_empty(node: Any, key: str):
    """An unset shell variable makes `key=`: as a path it would be the folder that one stands in."""
    if isinstance(node, DictConfig | ListConfig):
        is_list = isinstance(node, ListConfig)
        for name in range(len(node)) if is_list else list(node):
            inner = f"{key}[{name}]" if is_list else f"{key}.{name}".removeprefix(".")
            if OmegaConf.is_missing(node, name):
                continue
            try:
                value = node[name]
            except OmegaConfBaseException as error:  # a reference (${...}) to nothing, or to another type
                raise ConfigError(f"{inner} cannot be worked out: {first_line(error)}") from error
            _check_no_empty(value, inner)
    elif isinstance(node, str) and not node.strip():
        raise ConfigError(
            f"{key} is empty: give a value, null for none, or leave it out (is a shell variable that it takes not set?)"
        )


def plan_training(cfg: DictConfig, run_dir: Path) -> Plan:
    """Checks the whole run and prepares all but the weights.

    Raises:
        PoseError: what cannot work, before any long work.
    """
    check_config(cfg, TrainConfig)
    if OmegaConf.is_missing(cfg.data, "documents"):
        raise ConfigError("data.documents is not set: give a file, a folder or a glob, or a list of them")
    for group in ("model", "data", "finetune", "trainer", "eval", "watch"):  # whose values are checked where they stand
        try:
            OmegaConf.to_object(cfg[group])
        except PoseError as error:
            if group in ("eval", "watch") and cfg.data.heldout is not None and cfg[group].documents == cfg.data.heldout:
                error.message = error.message.replace("{group}.documents", "data.heldout")  # from which they are taken
            raise error.under(group) from None
    require_choice("eval_dtype", cfg.eval_dtype, DTYPES)
    check_files(cfg)
    checkpoint = find_resume(cfg, run_dir)
    models.find_model(cfg)
    base, config = models.model_config(cfg), models.model_config(cfg)
    check_layers(base)
    geometry = rope_geometry(base)
    sampler = build.build_sampler(cfg.pose, geometry.window)
    objective = build.build_objective(cfg.objective, sampler, base)
    scaling = scale_config(config, build.build_scaling(cfg.rope), sampler.target_len)
    check_layers(config)
    warn_of_factor(scaling, geometry.window, sampler.target_len)
    if cfg.model.path is not None and sampler.target_len <= (reach := target_len_of(base)):
        log.warning(
            f"pose.target_len={sampler.target_len} is not above the {reach:,} tokens that {cfg.model.path} is made "
            "for: this run extends nothing"
        )
    warn_of_windows(sampler, scaling, geometry.window, objective)
    warn_of_sliding(sampler, config)
    warn_of_router_loss(config)
    warn_of_dropout(objective, config, cfg.finetune.lora.dropout)
    check_window(objective, sampler, target_len_of(base))
    warn_without_effect(cfg, sampler)
    if cfg.model.engine is not None:
        check_engine(cfg.model.engine, config)
    resolve_backend(cfg.model.attention)
    models.check_lora(to_options(cfg.finetune, FinetuneConfig).lora, config)
    tokenizer = _tokenizer(cfg, base, config)
    trainer = build.build_trainer(cfg, run_dir, 0 if checkpoint is None else checkpoint.step)
    launch.is_needed(trainer)  # or processes that are missing on other machines would be missed after the tokenising
    check_holding(cfg, config, trainer)
    check_teacher(cfg, objective, trainer)
    micro_batch = choose_micro_batch(cfg, trainer, checkpoint, objective.num_views)
    data = build.build_data(cfg, tokenizer, sampler, objective, micro_batch, config.vocab_size)
    measured = (tokenizer, geometry.window, sampler.target_len, cfg.cache_dir, config.vocab_size, data.set_aside)
    suite = measuring.build_suite(to_options(cfg.eval, EvalOptions), *measured)
    export = partial(Export, tokenizer, dtype=getattr(torch, cfg.model.export_dtype), fold=cfg.model.export_fold)
    throughput = next(one for one in trainer.callbacks if isinstance(one, Throughput))  # type: ignore[attr-defined]
    watch = measuring.build_watch(cfg, *measured, export=export(run_dir / "best"), throughput=throughput)
    computes_in = {"trainer.precision": cfg.trainer.precision}
    if suite is not None or watch is not None:
        computes_in["eval_dtype"] = cfg.eval_dtype
    instead = "trainer.precision=32-true and eval_dtype=float32"
    warn_of_emulated_bf16(trainer.strategy.root_device, computes_in, instead)
    data.prepare_data()
    data.setup()
    say_tokens(cfg, data, sampler)
    warn_of_trained_text(data, {"eval": suite, "watch": None if watch is None else watch.suite})
    fill_in(cfg, sampler, scaling)
    settings = resume_settings(
        cfg, trainer, data, base, _original(cfg, objective),
        held=str(trained_dtype(to_options(cfg.finetune, FinetuneConfig), trainer)).removeprefix("torch."),
    )  # fmt: skip
    is_finished = cfg.resume == "auto" and finished_steps(run_dir) == cfg.trainer.max_steps
    if checkpoint is not None:
        check_resume(cfg, checkpoint, settings, run_dir)
    elif is_finished:
        check_finished(settings, run_dir)
    own, t = run_dir / "checkpoints", cfg.trainer
    saved = checkpoint.step if checkpoint is not None and checkpoint.is_own(run_dir) else None
    trainer.callbacks += [  # type: ignore[attr-defined]
        Checkpoints(own, t.checkpoint_every_n_steps, t.keep_checkpoints, settings, saved),
        *([] if watch is None else [watch]),
        export(run_dir / "model"),
    ]
    if cfg.trainer.micro_batch == AUTO:
        save = partial(_save_micro_batch, cfg, run_dir, objective.num_views)
        trainer.callbacks.append(MicroBatch(t.global_batch, save))  # type: ignore[attr-defined]
    return Plan(
        base, config, tokenizer, scaling, sampler, objective, geometry, trainer, data, suite, watch, settings,
        checkpoint, is_finished,
    )  # fmt: skip


def check_files(cfg: DictConfig):
    """Opens what the config names as documents, before any of it is tokenised; named by the key that it was given by.

    Raises:
        PoseError: a file that is not there, or of a kind that is not read.
    """
    named = {"data.documents": cfg.data.documents, "data.leave_out": cfg.data.leave_out}
    for group in ("eval", "watch"):
        node = cfg[group]
        if "perplexity" in node.tasks and (group == "eval" or node.every_n_steps is not None):
            named["data.heldout" if node.documents == cfg.data.heldout else f"{group}.documents"] = node.documents
    for key, value in named.items():
        if value is not None:
            check_documents(find_documents(key, value), Keys.of_paths(key))


def _original(cfg: DictConfig, objective: Objective) -> list | None:
    """The fingerprint of what a frozen teacher is read from; None without one.

    The teacher of adapters is what they are on, which a checkpoint has; but where embeddings and norms train besides,
    it keeps those of model.path.
    """
    is_read = cfg.finetune.lora.rank is None or cfg.finetune.lora.train_embeddings_and_norms
    if not objective.has_teacher or cfg.model.path is None or not is_read:
        return None
    return fingerprint(locate(cfg.model.path), cfg.model.revision, Memo(Path(cfg.cache_dir).expanduser() / ".memo"))


def warn_of_sliding(sampler: PositionSampler, config: PretrainedConfig):
    """Warns where some layers see the last tokens alone: they tell these by their number, not by their positions."""
    kinds = getattr(config, "layer_types", None) or ()
    sliding, window = kinds.count("sliding_attention"), getattr(config, "sliding_window", None)
    if sliding and window is not None and window < sampler.target_len and sampler.changes_distances:
        log.warning(
            f"{sliding} of {len(kinds)} layers of this model attend to the last {window} tokens alone "
            f"(sliding_window), counted by tokens and not by positions. In examples of {sampler.name} they see across "
            "the skips, which never happens in real text, so what they learn there is of no use. pose=full trains them "
            "as they will be used"
        )


def warn_of_router_loss(config: PretrainedConfig):
    """Warns where transformers' own loss has a term for experts that none of the objectives has."""
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and coefficient:
        log.warning(
            f"this model's config asks for a loss that balances its experts (output_router_logits, "
            f"router_aux_loss_coef={coefficient:g}), which is not trained here: experts train by the objective alone"
        )


def warn_of_dropout(objective: Objective, config: PretrainedConfig, of_adapters: float):
    """Warns where both views of a self-distillation have a dropout of their own, which their divergence then measures.

    Args:
        objective: of the run.
        config: of the model.
        of_adapters: finetune.lora.dropout.
    """
    if objective.num_views == 1 or objective.has_teacher:  # a teacher of its own has none
        return
    given = {f"{key} of the model": value for key, value in config.get_text_config().to_dict().items()
             if key.endswith(("dropout", "pdrop")) and not key.startswith("classifier")}  # fmt: skip
    found = [f"{key}={value:g}" for key, value in (given | {"finetune.lora.dropout": of_adapters}).items() if value]
    if found:
        log.warning(
            f"objective={objective.name} compares two views of the model, and dropout ({', '.join(found)}) makes them "
            "differ where nothing skips: the loss is then of noise too. Give finetune.lora.dropout=0, or a model "
            "without dropout"
        )


def warn_of_factor(scaling: RopeScaling, window: int, target_len: int):
    """Warns of a factor that does not reach the target.

    Args:
        scaling: of the run.
        window: the model's own, in tokens.
        target_len: in tokens.
    """
    factor = scaling.factor or 1.0
    if isinstance(scaling, Linear | NTK | NTKByParts | Yarn | Llama3) and factor * window < target_len * (1 - 1e-9):
        log.warning(
            f"rope.factor={factor:g} reaches {factor * window:,.0f} tokens, the window of {window:,} times the factor, "
            f"and pose.target_len is {target_len:,}: leave rope.factor out, or give {target_len / window:g} or more"
        )


def warn_of_windows(sampler: PositionSampler, scaling: RopeScaling, window: int, objective: Objective):
    """Warns where nothing trains at a sampler's skips, or a longrope that keeps short texts trains other windows.

    What it is to train are mixed windows (docs/ROPE.md): by plain examples, or by the plain view of an objective.

    Args:
        sampler, scaling, objective: of the run.
        window: the model's own, in tokens.
    """
    if sampler.skips and not objective.trains_skipped:
        log.warning(
            f"objective={objective.name} trains at plain positions alone with these weights: the positions of "
            f"{sampler.name} change nothing"
        )
    is_mixed = isinstance(scaling, LongRope) and scaling.keeps_short_texts
    if (is_mixed or isinstance(scaling, Dynamic)) and sampler.example_len <= window and not sampler.skips:
        log.warning(
            f"{sampler.name} skips no position, and rope={scaling.name} leaves texts within the window of {window} "
            "tokens as they are: the model trains unscaled, and nothing trains the frequencies beyond the window"
        )
    if not is_mixed:
        return
    if not isinstance(sampler, Mix) and not objective.trains_plain:
        if sampler.target_len > window and sampler.skips:
            log.warning(
                f"rope keeps texts within the window of {window} tokens as they are, and {sampler.name} trains on "
                "hardly any: they are served by weights that were trained under rope.long_factor alone. Choose pose=mix"
            )
        return
    plain = (
        "the plain examples of pose=mix" if isinstance(sampler, Mix) else f"plain views (objective={objective.name})"
    )
    if sampler.train_len > window:
        log.warning(
            f"{plain} have pose.train_len={sampler.train_len} tokens, more than the model's own window of {window}: "
            "they are rotated by rope.long_factor like all others, and nothing trains under the original frequencies. "
            f"Give pose.train_len={window} or less"
        )
    elif scaling.attention_factor != 1.0:
        log.warning(
            f"rope.attention_factor={scaling.attention_factor:.4g} holds for {plain} too, so these do not see the "
            "original model. Give rope.attention_factor=1 for mixed windows"
        )


def check_window(objective: Objective, sampler: PositionSampler, window: int):
    """Raises a ConfigError where the original model is to teach on texts beyond its window, in tokens.

    That is what it was extended to, where it was.
    """
    if objective.has_teacher and sampler.train_len > window:
        raise ConfigError(
            f"pose.train_len={sampler.train_len} is above the {window} tokens that the original model is made for, "
            "where it is no teacher: give at most that with this objective"
        )


def warn_of_trained_text(data: PoseDataModule, suites: Mapping[str, Suite | None]):
    """Warns of perplexity on documents that train.

    Args:
        data: of the run, set up.
        suites: what is measured, by group of the config.
    """
    for group, suite in suites.items():
        if suite is not None and (trained := data.trains_on(suite.documents)):
            log.warning(
                f"{group}.documents: {', '.join(trained[:3])}{' ...' * (len(trained) > 3)} of the training text "
                "is what perplexity is measured on, so it is not of held-out text: leave it out with data.leave_out"
            )


def warn_without_effect(cfg: DictConfig, sampler: PositionSampler):
    """Warns of settings that change nothing beside the others.

    Raises:
        ConfigError: model.init, of a model from random weights, where there is a model to load.
    """
    if cfg.model.path is not None and cfg.model.init is not None:
        raise ConfigError(
            f"model.init is the config of a model from random weights, and model.path={cfg.model.path} has its own: "
            "give model.path=null, or leave model.init out"
        )
    if cfg.data.heldout is not None and cfg.data.heldout_share not in (0, DataConfig.heldout_share):
        log.warning(
            f"data.heldout_share={cfg.data.heldout_share:g} changes nothing beside data.heldout={cfg.data.heldout}: "
            "give data.heldout=null to set a share of the training documents aside"
        )
    warmup, steps = cfg.finetune.warmup_steps, cfg.trainer.max_steps
    if warmup >= steps and cfg.finetune.schedule != "constant":
        log.warning(
            f"finetune.warmup_steps={warmup} takes the whole run (trainer.max_steps={steps}): the learning rate "
            f"reaches {(steps - 1) / warmup:.0%} of finetune.lr={cfg.finetune.lr:g}"
        )
    if sampler.phases and not sampler.skips:
        log.warning(f"pose.curriculum changes nothing with {sampler.name}, which skips no position")
    if cfg.rope.get("rcd_periods", NTK.rcd_periods) != NTK.rcd_periods and not cfg.rope.get("rcd_shift"):
        log.warning(f"rope.rcd_periods={cfg.rope.rcd_periods:g} changes nothing without rope.rcd_shift=true")


def choose_micro_batch(cfg: DictConfig, trainer: L.Trainer, checkpoint: Checkpoint | None, num_views: int = 1) -> int:
    """The examples in a batch of one device, to begin with; the trainer accumulates the rest.

    trainer.micro_batch is then what is used, and counts each view of an example, so that an objective with two needs
    about the memory of one: what is taken is a divisor of the share of a device. It stays auto where that is found on
    the model (`MicroBatch`): on a GPU, unless the run goes on, and takes what was found before.

    Args:
        cfg: of the run.
        trainer: built.
        checkpoint: that the run goes on from.
        num_views: of the objective.

    Raises:
        ConfigError: the global batch cannot be split evenly, or auto cannot be searched for.
    """
    t, given = cfg.trainer, cfg.trainer.micro_batch
    share = max(t.global_batch // trainer.world_size, 1)
    number = 1
    if given == AUTO:
        before = None if checkpoint is None else _micro_batch_of(checkpoint.folder.parents[1])
        found = 0 if before is None else micro_batch_of_views(before, num_views, share)
        if found and t.global_batch % (found * trainer.world_size) == 0:
            number = found
            log.info(f"Micro-batch {number}, as this run found it before (trainer.micro_batch=auto)")
        elif is_searched(trainer.strategy):
            return build.accumulate(trainer, 1, t.global_batch)
        else:
            log.info("Micro-batch 1: trainer.micro_batch=auto looks for the largest that fits on a GPU alone")
    else:
        number = micro_batch_of_views(given, num_views, share)
    if given != AUTO and num_views > 1:
        log.info(f"Micro-batch {number}: the objective sees each example {num_views} times ({given} was given)")
    micro_batch = build.accumulate(trainer, number, t.global_batch)
    t.micro_batch = num_views * micro_batch  # which a small global batch may have lowered
    return micro_batch


def _micro_batch_of(run_dir: Path) -> int | None:
    """That of a run; None where it is not known."""
    try:
        value = OmegaConf.select(OmegaConf.load(run_dir / "config.yaml"), "trainer.micro_batch")
    except (OSError, YAMLError):
        return None
    return value if isinstance(value, int) and value > 0 else None


def _save_micro_batch(cfg: DictConfig, run_dir: Path, num_views: int, number: int):
    cfg.trainer.micro_batch = num_views * number
    write_config(cfg, run_dir)


def _tokenizer(cfg: DictConfig, base: PretrainedConfig, config: PretrainedConfig):
    path = cfg.model.tokenizer or cfg.model.path
    if path is None:
        raise ConfigError(
            "model.tokenizer is not set, and a model from random weights has none of its own: give a "
            "folder or a hub id, such as model.tokenizer=assets/tiny"
        )
    tokenizer = load_tokenizer(locate(path), cfg.model.revision)
    if cfg.model.path is None:
        for new in (base, config):
            new.vocab_size = len(tokenizer)
            new.bos_token_id, new.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    else:
        models.check_vocabulary(tokenizer, base, path)
        check_weights(base, locate(cfg.model.path), cfg.model.revision)
    return tokenizer


def say_tokens(cfg: DictConfig, data: PoseDataModule, sampler: PositionSampler):
    """How much text there is and how often it is seen; warns of what somebody may not have meant."""
    num_tokens, share = data.num_tokens, 1 - sum(data.synthetic.values())
    trained = cfg.trainer.max_steps * cfg.trainer.global_batch * sampler.example_len
    epochs = share * trained / num_tokens
    of_text = "" if share > 1 - 1e-9 else f", {share:.0%} of them text"
    log.info(
        f"Data        {num_tokens:,} tokens in {data.num_documents:,} documents; training takes {trained:,} tokens"
        f"{of_text}: {epochs:.2g} epochs"
    )
    is_shipped = all(isinstance(path, str) and is_inside(path, SHIPPED) for path in _paths(data.documents))
    is_real = cfg.model.path is not None and not is_inside(locate(cfg.model.path), SHIPPED)
    own = "data=jsonl data.documents=FILE, a folder or a glob, or data=pile (docs/DATA.md)"
    if is_shipped and is_real:
        log.warning(
            f"{cfg.model.path} trains on the few texts that come with this repository ({num_tokens:,} tokens, "
            f"{epochs:.2g} epochs), which are meant for trying things out. Your own text: {own}"
        )
    elif epochs > MANY_EPOCHS:
        log.warning(
            f"the text is seen {epochs:.1f} times over; beyond {MANY_EPOCHS} a model memorises it. What helps: "
            f"more text ({own}), or fewer trainer.max_steps"
        )
    heldout = cfg.data.heldout
    if not is_shipped and isinstance(heldout, str) and is_inside(locate(heldout), SHIPPED):
        log.warning(
            f"data.heldout={heldout} comes with this repository, while data.documents are your own: perplexity is "
            "measured on other text than yours. data.heldout=null sets some of your documents aside"
        )


def _paths(documents) -> list:
    documents = documents if isinstance(documents, list) else [documents]
    return [one.get("path") if isinstance(one, dict) else one for one in documents]


def fill_in(cfg: DictConfig, sampler: PositionSampler, scaling: RopeScaling):
    """Writes what was worked out into the config, so that config.yaml says it."""
    cfg.pose.train_len = sampler.train_len
    if scaling.name != "none":
        cfg.rope.factor = scaling.factor
