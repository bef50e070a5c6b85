"""The command `python -m pose.plan`, and the lines that train.py begins with: from a config to `pose.plan.Training`."""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pose.app import schema
from pose.app.hints import check_choices, hint
from pose.app.shapes import SHAPES, geometry_of
from pose.errors import ConfigError, PoseError, first_line, require_number
from pose.files import CONF, locate
from pose.modeling.options import NF4
from pose.plan import (
    GPUS,
    MASTER,
    MFU,
    NF4_BYTES,
    PARTS,
    Shape,
    Training,
    advise,
    as_json,
    duration,
    fits,
    gib,
    largest_micro_batch,
    micro_batch_of_views,
    refused,
    summary,
)  # fmt: skip

if TYPE_CHECKING:  # torch and the like are imported when the options stand
    from rich.table import Table
    from transformers import PretrainedConfig

    from pose.app.preflight import Plan
    from pose.rope import RopeScaling
    from pose.training.objectives import Objective

log = logging.getLogger("pose.app.plan")  # also where this module is the command

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}  # Lightning's short names
LABELS = {"gathered": "copies while computing"}  # of PARTS: copies of weights, and buckets of gradients
NUM_DRAWS = 200  # of the sampler, for the share of the tokens from the first skip on
USAGE = """\
FLOPs, memory of a device by part, hours on A100, H100 and RTX 4090, the same for full-length training, and what to
change where it does not fit: before anything is loaded. The ready models of conf/model need no network.

  python -m pose.plan model=llama7b pose.target_len=32768 strategy=zero3 trainer.devices=8
  python -m pose.plan model=local model.path=FOLDER finetune=lora --json

Formulas, and what they were measured against: docs/PLANNER.md."""


def main(arguments: list[str] | None = None):
    """Plans the training of the given overrides.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m pose.plan", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="those of train.py: python train.py --help lists the groups")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    parser.add_argument(
        "--mfu", type=float, default=MFU, help=f"of a run that recomputes nothing, for the hours (default {MFU})"
    )
    given = parser.parse_intermixed_args(arguments)
    from pose.app import console, runtime

    console.log_to_terminal()
    runtime.quiet_libraries()
    if given.json:
        logging.getLogger("pose").setLevel(logging.ERROR)  # nothing beside the line
    with runtime.readable_errors():
        require_number("--mfu", given.mfu, above=0, below=1)
        cfg = compose_config(given.overrides)
        training = plan(cfg)
        if given.json:
            print(json.dumps(as_json(training, given.mfu)))
        else:
            show(training, cfg, given.mfu)


def compose_config(overrides: list[str]) -> DictConfig:
    """The config that train.py would compose of them.

    Raises:
        ConfigError: a key, a choice or a value that it does not accept; carries Hydra's message.
    """
    schema.register()
    check_choices(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        why = "" if error.__cause__ is None else first_line(error.__cause__)
        told = [str(error).strip(), why, hint(error, "train", overrides)]
        raise ConfigError("\n".join(dict.fromkeys(filter(None, told)))) from error


def plan(cfg: DictConfig) -> Training:
    """What the config of a training costs.

    Raises:
        PoseError: a value that is not accepted, or a model of whose shape nothing is known.
    """
    from pose.app import build, preflight
    from pose.app.targets import make
    from pose.modeling.views import shares_beginnings
    from pose.training.objectives import Objective

    preflight.check_config(cfg, schema.TrainConfig)
    trainer = schema_options(cfg, "trainer", schema.TrainerConfig)
    schema_options(cfg, "model", schema.ModelConfig)
    config, window, longest, scaled = find_shape(cfg)
    sampler = build.build_sampler(cfg.pose, window)
    scaling = build.build_scaling(cfg.rope)
    hf_config = scaled(scaling, sampler.target_len)
    devices = schema.num_devices(trainer.devices) * trainer.num_nodes
    precision = PRECISIONS.get(str(trainer.precision), str(trainer.precision))
    if precision == "auto":
        precision = "32-true" if trainer.accelerator == "cpu" else "bf16-mixed"
    shape = Shape.of(config, cfg.model.path or "model.init")
    objective = make(cfg.objective, Objective, "objective")
    objective.check(sampler, shape.num_layers)
    preflight.check_window(objective, sampler, longest)
    is_open = trainer.micro_batch == "auto"
    share = max(trainer.global_batch // devices, 1)
    micro_batch = 1 if is_open else min(micro_batch_of_views(trainer.micro_batch, objective.num_views, share), share)
    training = of_config(
        cfg,
        shape,
        sampler,
        objective,
        devices=devices,
        precision=precision,
        micro_batch=micro_batch,
        stored=str(config.get("dtype")),
        views_share=objective.num_views == 1
        or (not scaling.depends_on_length if hf_config is None else shares_beginnings(hf_config)),
    )
    if why := refused(training):
        raise ConfigError(f"{why}: train.py refuses it")
    return choose_micro_batch(training) if is_open and trainer.accelerator != "cpu" else training


def choose_micro_batch(training: Training) -> Training:
    """The same with the largest micro-batch that by this estimate fits the first of GPUS; says what fits the others."""
    found = {gpu.name: largest_micro_batch(training, gpu) for gpu in GPUS}
    log.info(
        f"trainer.micro_batch=auto: this plan is for {found[GPUS[0].name]}. By this estimate the largest that fits is "
        f"{', '.join(f'{number} on {name}' for name, number in found.items())}; a run looks for it on its own GPU"
    )
    return replace(training, micro_batch=found[GPUS[0].name])


def frozen_bytes(choice: str, stored: str) -> float:
    """Of a frozen weight, by finetune.lora.frozen_dtype and the dtype of the checkpoint."""
    if choice == NF4:
        return NF4_BYTES
    in_half = choice == "bfloat16" or (choice == "auto" and "float16" in stored)
    return 2 if in_half else MASTER


def of_config(
    cfg: DictConfig,
    shape: Shape,
    sampler,
    objective: "Objective",
    *,
    devices: int,
    precision: str,
    micro_batch: int,
    stored: str,
    views_share: bool,
) -> Training:
    """The Training of a checked config.

    Args:
        cfg: of train.py.
        shape: of the model.
        sampler: of the examples.
        objective: what is minimised.
        devices: over all machines.
        precision: of Lightning, by its long name.
        micro_batch: examples at a time on one device.
        stored: the dtype of the checkpoint's weights; of another than one of 16 bits, fp32.
        views_share: whether two views share what is before the first skip (`pose.modeling.views`).
    """
    tune = schema_options(cfg, "finetune", schema.FinetuneConfig)
    lora, strategy = tune.lora, strategy_options(cfg.strategy)
    is_wrapped = cfg.strategy.get("name") == "ddp"  # which takes no fp32 gradients of bf16 weights, of one process too
    is_alone = devices == 1 and strategy["strategy"] == "ddp" and not is_wrapped and precision == "bf16-mixed"
    if tune.weights_dtype == "bfloat16" and is_wrapped:
        raise ConfigError("finetune.weights_dtype=bfloat16 is for one process without DDP: train.py refuses it")
    rounded = tune.optimizer == "adamw8bit" and lora.rank is None
    zero = ("zero1", "zero2", "zero3")
    barred: list[tuple[str, str, tuple[str, ...]]] = []
    if lora.frozen_dtype in ("bfloat16", "float32"):
        barred.append(("finetune.lora.frozen_dtype", lora.frozen_dtype, zero))
    if cfg.trainer.on_nonfinite == "skip":
        barred.append(("trainer.on_nonfinite", "skip", zero))
    if cfg.trainer.compile is True:
        barred.append(("trainer.compile", "true", ("zero3",)))
    in_half = rounded and (tune.weights_dtype == "bfloat16" or (tune.weights_dtype == "auto" and is_alone))
    return Training(
        shape,
        train_len=sampler.example_len,
        target_len=sampler.target_len,
        micro_batch=micro_batch,
        global_batch=cfg.trainer.global_batch,
        max_steps=cfg.trainer.max_steps,
        devices=devices,
        precision=precision,
        gradient_checkpointing=cfg.model.gradient_checkpointing,
        attention="eager" if cfg.model.attention == "eager" else "sdpa",
        rank=lora.rank,
        targets=None if lora.target_modules is None else tuple(lora.target_modules),
        train_embeddings_and_norms=lora.train_embeddings_and_norms,
        optimizer=tune.optimizer,
        weight_bytes=2 if in_half else MASTER,
        frozen_bytes=frozen_bytes(lora.frozen_dtype, stored),
        original_bytes=frozen_bytes("auto", stored),
        has_checkpoint=cfg.model.path is not None,
        barred=tuple((f"{key}={value}", of) for key, value, of in barred),
        **of_objective(objective, sampler, shape.num_layers),
        views_share=views_share,
        **strategy,
    )


def of_objective(objective: "Objective", sampler, num_layers: int) -> dict[str, Any]:
    """What an objective is in arguments of Training; one that is not of this package is planned as lm."""
    from pose.training.objectives import LongShort, SelfDistill

    if isinstance(objective, LongShort):
        found: dict[str, Any] = {
            "objective": "long_short", "num_compared": len({*objective.layers_of(num_layers), num_layers})
        }  # fmt: skip
    elif isinstance(objective, SelfDistill) and objective.weight > 0:
        found = {"objective": "self_distill"}
    else:
        return {}
    return found | {"skipped": share_skipped(sampler)}


def share_skipped(sampler) -> float:
    """The mean share of an example's tokens from the first skip on, over some draws, always the same."""
    import numpy as np

    rng, plain = np.random.default_rng(0), np.arange(sampler.example_len)
    layouts = [sampler.sample(rng, sampler.min_document_len) for _ in range(NUM_DRAWS)]
    return float(np.mean([layout.position_ids != plain for layout in layouts]))


def schema_options(cfg: DictConfig, group: str, kind: type[schema.Options]) -> schema.Options:
    """A group of the config, checked."""
    try:
        return schema.to_options(cfg[group], kind)
    except PoseError as error:
        raise error.under(group) from None


def find_shape(
    cfg: DictConfig,
) -> tuple[dict[str, Any], int, int, Callable[["RopeScaling", int], "PretrainedConfig | None"]]:
    """The numbers of the model's config, its window and what it was extended to, and what lays a scaling over it.

    Of the ready models from `SHAPES`, whose RoPE is plain, and of which there is no config to scale: the scaling is
    only checked. Of a folder or another id of the hub from its config.json; or of `model.init`.

    Raises:
        PoseError: there is none, or it is not a model's.
    """
    path = cfg.model.path
    if path in SHAPES and not Path(path).is_dir():
        shape = SHAPES[path]
        window = shape["max_position_embeddings"]

        def checked(scaling: "RopeScaling", target_len: int) -> None:
            geometry = geometry_of(shape)
            scaling.resolve(geometry, target_len).inv_freq(geometry)

        return shape, window, window, checked
    from pose.app import models
    from pose.modeling.layers import check_layers
    from pose.modeling.load import load_tokenizer, rope_geometry, scale_config
    from pose.modeling.rotary import target_len_of

    if path is not None and path.endswith(".gguf"):
        raise ConfigError(
            f"model.path={path}: no plan is made of a GGUF file: give a folder, or a ready model of its shape"
        )
    if path is not None:
        cfg.model.path = models.open_checkpoint(path, "model.path")
    config = models.model_config(cfg)
    if path is None and cfg.model.tokenizer is not None:
        config.vocab_size = len(load_tokenizer(locate(cfg.model.tokenizer), cfg.model.revision))
    check_layers(config)
    found = config.to_dict(), rope_geometry(config).window, target_len_of(config)

    def scaled(scaling: "RopeScaling", target_len: int) -> "PretrainedConfig":
        scale_config(config, scaling, target_len)
        return config

    return *found, scaled


def strategy_options(node: DictConfig) -> dict[str, Any]:
    """The group `strategy` as arguments of Training.

    Raises:
        ConfigError: a strategy of which nothing is known.
    """
    target, name = node.get("_target_"), node.get("name")
    if target is None and name in ("auto", "ddp"):
        return {"strategy": "ddp"}
    if target == "pose.training.strategies.FSDP":
        return {"strategy": "fsdp"}
    stage = node.get("stage")
    if target == "pose.training.strategies.DeepSpeed" and stage in (1, 2, 3):
        both = ("offload_optimizer", "offload_parameters")
        if stage != 3 and node.get("offload_parameters"):
            raise ConfigError(f"strategy.offload_parameters=true needs strategy.stage=3, and it is {stage}")
        return {"strategy": f"zero{stage}", **{key: bool(node.get(key, False)) for key in both}}
    raise ConfigError(f"strategy={target or name}: no plan is made of it: choose auto, ddp, fsdp, zero1, zero2, zero3")


def say(cfg: DictConfig, plan: "Plan") -> Training | None:
    """Logs the two lines that train.py begins with, and returns what they are of; None for a shape without a plan."""
    from pose.modeling.views import shares_beginnings

    trainer = plan.trainer
    try:
        training = of_config(
            cfg,
            Shape.of(plan.config.to_dict()),
            plan.sampler,
            plan.objective,
            devices=trainer.world_size,
            precision=str(trainer.precision),
            micro_batch=cfg.trainer.global_batch // (trainer.world_size * trainer.accumulate_grad_batches),
            stored=str(plan.config.dtype),
            views_share=plan.objective.num_views == 1 or shares_beginnings(plan.config),
        )
    except PoseError as error:
        log.debug(f"No plan: {error}")
        return None
    log.info(summary(training))
    return training


def show(training: Training, cfg: DictConfig, mfu: float):
    """Prints the plan as tables."""
    from pose.reporting.tables import print_table

    full, shape, trained = training.full_length(), training.shape, training.num_trained
    parameters = f"{shape.num_parameters:,} parameters"
    if training.rank is not None:
        parameters += f", {trained:,} train"
    how = f"{training.strategy}{', offloaded' * training.offload_optimizer} on {training.devices} device(s)"
    again = ", gradient checkpointing" * bool(training.gradient_checkpointing)
    log.info(
        f"{cfg.model.path or 'model.init'}: {parameters}; {how}, {training.precision}{again}; {training.max_steps:,} "
        f"steps of {training.global_batch:,} examples, {training.micro_batch} at a time"
    )
    if str(cfg.trainer.devices) in ("auto", "-1"):
        log.info("trainer.devices leaves the number of devices to the machine: this plan is for one")
    print_table(costs_table([training, full], mfu))
    for names, found in _advice(training):
        lines = [f"  {' '.join(one.overrides)}: {gib(one.total)}{', fits' if one.fits else ''}" for one in found]
        enough = "What makes it fit" if any(one.fits for one in found) else "What lowers it, and is not enough"
        log.info("\n".join([f"It does not fit {names}. {enough}:", *lines]))


def costs_table(trainings: list[Training], mfu: float) -> "Table":
    """A row for each cost, a column for each training: PoSE first, then full length."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for one, name in zip(trainings, ("this run", "full length"), strict=True):
        table.add_column(f"{name}\n{one.train_len:,} tokens", justify="right")

    def row(name: str, show) -> None:
        table.add_row(name, *(show(one) for one in trainings))

    row("FLOPs a token", lambda one: f"{one.flops_per_token:.4g}")
    row("tokens", lambda one: f"{one.tokens:.4g}")
    row("FLOPs in all", lambda one: f"{one.flops:.4g}")
    table.add_section()
    for part in PARTS:  # each at the moment when all of them together are the most
        row(LABELS.get(part, part), lambda one, part=part: gib(one.memory[part]))
    row("peak memory of a device", lambda one: gib(one.memory["total"]))
    if any(one.host_memory for one in trainings):
        row("CPU memory for it", lambda one: gib(one.host_memory))
    table.add_section()
    for gpu in GPUS:
        row(
            f"{gpu.name}, {gib(gpu.memory)}",
            lambda one, gpu=gpu: (
                duration(one.hours(gpu, mfu))
                + f" ({duration(one.hours(gpu, mfu) * one.devices)} of GPU time)" * (one.devices > 1)
                + f", {'fits' if fits(one, gpu) else 'does not fit'}"
            ),
        )
    row("MFU assumed", lambda one: f"{one.mfu(mfu):.1%}")
    return table


def _advice(training: Training):
    """What to change, by the names of the GPUs that it is for: those of one size get one."""
    found: dict[int, tuple[str, list]] = {}
    for gpu in GPUS:
        if advice := advise(training, gpu):
            names = found[gpu.memory][0] + f" and {gpu.name}" if gpu.memory in found else gpu.name
            found[gpu.memory] = (names, advice)
    return found.values()


if __name__ == "__main__":
    main()
