"""What is set of a model, and the group `finetune.lora`. Imports nothing heavy: the config is made of it."""

from dataclasses import dataclass, fields

from pose.errors import ConfigError, require_choice, require_int, require_number

RECOMPUTE = (False, True, "selective")  # activations: `pose.modeling.speed.recompute`
NF4 = "nf4"
# What serves a folder, or a GGUF file of it.
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "ollama", "mlx")
FROZEN_DTYPES = ("auto", "float32", "bfloat16", NF4)


@dataclass
class LoraOptions:
    """The adapters: `finetune.lora`."""

    rank: int | None = None  # of an adapter; null: no adapters, all weights train
    alpha: float = 16.0  # an adapter is scaled by alpha / rank
    dropout: float = 0.0  # probability of dropping an input of an adapter
    target_modules: list[str] | None = None  # linear layers, by the end of their name; null: all but the head
    train_embeddings_and_norms: bool = False  # these too, whole, as LongLoRA (arXiv 2309.12307)
    frozen_dtype: str = (
        "auto"  # of frozen matrices: auto (the checkpoint's 16 bits, else float32), float32, bfloat16, nf4
    )

    def __post_init__(self):
        if self.rank is None:
            for option in fields(self):
                if getattr(self, option.name) != option.default:
                    raise ConfigError(
                        f"finetune.lora.{option.name}={getattr(self, option.name)} has no effect without adapters: "
                        "choose finetune=lora, or set finetune.lora.rank"
                    )
            return
        require_choice("finetune.lora.frozen_dtype", self.frozen_dtype, FROZEN_DTYPES)
        require_int("finetune.lora.rank", self.rank, at_least=1)
        require_number("finetune.lora.alpha", self.alpha, above=0)
        require_number("finetune.lora.dropout", self.dropout, at_least=0, below=1)
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("finetune.lora.target_modules=[] is not accepted: name linear layers, or give null")
