"""What a training costs before it starts: FLOPs, memory of a device, hours, and what to change where it does not fit.

python -m pose.plan model=llama7b pose.target_len=32768 strategy=zero3 trainer.devices=8 [--json] [--mfu 0.4]

Pure arithmetic over the numbers of a model's config. Letters, as elsewhere: B examples of a micro-batch, L tokens of
an example, T = B L, H hidden size, F width of the MLP, V vocabulary, D = heads x head size, K = the same of the
key-value heads. c is the number of bytes of what is computed in (2 in mixed precision, else 4), r that of the residual
stream.

FLOPs of a trained token: 6 N + 6 n_layer n_head d_head L. N are the weights of the matrices that a token goes through:
the head counts, an input embedding that is not also the head does not. The second term is causal attention (12 in its
place would be the non-causal count). Where weights are frozen, their gradients are not computed: 4 for each of them in
place of 6, since gradients still go through them. Recomputation is no part of it, and is part of the time.

Objectives of two views (`pose.training.objectives`): a token goes through the layers once, and once more from the first
skip on, for a share s of the tokens on average (all of them where the views share nothing); attention sees two whole
rows. self_distill has the head's logits of
both views (6 and 6 s; the teacher's are those of the language model's loss). long_short has those of one view, and a
forward pass of the original's layers: 2 for each of its weights, and a third of attention. Memory is that of s = 1.
"""

import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pose.errors import ConfigError, require_choice

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "gathered")
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
MIXED = ("bf16-mixed", "16-mixed")
PRECISIONS = (*MIXED, "32-true")
MFU = 0.4  # of a run that recomputes nothing; 0.45 to 0.52 is what well-tuned LLaMA code reaches at 2,048 tokens
USABLE = 0.95  # of a GPU's memory; the rest is CUDA's own, and gaps between tensors
CHUNK_LEN = 1024  # tokens whose logits exist at one time: pose.modeling.loss
CHUNK_LEN_OF_VIEWS = CHUNK_LEN // 2  # the same of two views; where a token has a teacher's too, both count
OBJECTIVES = ("lm", "self_distill", "long_short")
GATHERED_MAX = 10**9  # weights that ZeRO-3 holds together at most (stage3_max_live_parameters of DeepSpeed)
BUCKET = 2 * 10**8  # elements of a bucket of DeepSpeed's reductions
MASTER = 4  # bytes of an fp32 weight or gradient
NF4_BYTES = 0.516  # of a weight in 4 bits, with its scales (QLoRA's double quantisation)
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2.03}  # for each trained weight: two moments, in 8 bits with their scales


@dataclass(frozen=True)
class GPU:
    """A GPU that hours are given for.

    Attributes:
        name: as it is shown.
        memory: bytes that programs see.
        half, single: peak FLOPS, dense, of bf16 with fp32 sums on the tensor cores, and of fp32.
    """

    name: str
    memory: int
    half: float
    single: float


# NVIDIA's data sheets: A100 80GB SXM (nvidia-a100-datasheet: bf16 312, fp32 19.5), H100 SXM (h100-datasheet: bf16 1,979
# with sparsity, half of it without; fp32 67), RTX 4090 (Ada GPU architecture whitepaper, appendix A: bf16 on the tensor
# cores with fp32 sums 165.2, fp32 82.6)
GPUS = (
    GPU("A100", 79 * GIB, 312e12, 19.5e12),
    GPU("H100", 79 * GIB, 989e12, 67e12),
    GPU("RTX 4090", int(23.5 * GIB), 165.2e12, 82.6e12),
)


SLOWER = re.compile(r"h100.*(pcie|nvl)|rtx 4090 (laptop|d\b)")  # other chips of these names


def peak_flops(device_name: str, precision: str) -> float | None:
    """Of a GPU by the name that its driver gives, in what a precision computes in; None for one that is not known."""
    name = device_name.lower().replace("h200", "h100")  # which differ in memory alone
    if SLOWER.search(name):
        return None
    gpu = next((one for one in GPUS if re.search(rf"{re.escape(one.name.lower())}(?!\d)", name)), None)  # no A1000
    return None if gpu is None else gpu.half if precision in MIXED else gpu.single


@dataclass(frozen=True)
class Kind:
    """What a model class's layer is, beside its sizes.

    Attributes:
        gated: whether the MLP multiplies by a gate (three matrices).
        norms: normalisations of a layer; with one, attention and MLP stand side by side.
        layer_norm: LayerNorm with its bias in place of RMSNorm.
        qk_norm: RMSNorm of each head's queries and keys.
        names: of the matrices of attention (queries, keys, values, output; or all three in one, output) and MLP.
        biases: which matrices of a layer have one: "", "qkv", "attention", "mlp", "all".
        head_bias: whether the head has one.
        partial: whether RoPE puts heads together of a rotated and another part, after which SDPA's output lies in
            another order than the output matrix reads it.
    """

    gated: bool = True
    norms: int = 2
    layer_norm: bool = False
    qk_norm: bool = False
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    biases: str = ""
    head_bias: bool = False
    partial: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether queries, keys and values are one matrix, and gate and up one."""
        return len(self.names) == 4


_PHI = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
KINDS = {
    "llama": Kind(),
    "mistral": Kind(),
    "gemma": Kind(),
    "baichuan": Kind(),
    "qwen2": Kind(biases="qkv"),
    "qwen3": Kind(qk_norm=True),
    "phi": Kind(False, norms=1, layer_norm=True, names=_PHI, biases="all", head_bias=True, partial=True),
    "gptj": Kind(False, norms=1, layer_norm=True, names=_PHI, biases="mlp", head_bias=True, partial=True),  # as phi
    "phi3": Kind(names=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), partial=True),
    "gpt_neox": Kind(False, layer_norm=True, names=_NEOX, biases="all", partial=True),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's config.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: of the model.
        tied: whether the head is the input embedding.
        kind: of its layers.
        gelu_new: whether the MLP's function is written out in five operations, each of which keeps its input.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    kind: Kind = field(default_factory=Kind)
    gelu_new: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str = "this model") -> "Shape":
        """The shape of a config: the content of a config.json, or the values of a config of transformers.

        Raises:
            ConfigError: a class that is not known here, or a number is missing.
        """
        model_type = config.get("model_type")
        kind = KINDS.get(str(model_type))
        experts = [key for key in EXPERTS if config.get(key)]
        if kind is None or experts:
            what = f"has {experts[0]}={config[experts[0]]}" if experts else f"is of class {model_type!r}"
            raise ConfigError(f"{name} {what}, for which no plan can be made; supported: {', '.join(KINDS)}")

        def number(key: str, *others: Any) -> int:
            found = next((value for value in (config.get(key), *others) if value is not None), None)
            if not isinstance(found, int) or found < 1:
                raise ConfigError(f"{name} has {key}={found!r} in its config: an integer of at least 1 is accepted")
            return found

        hidden = number("hidden_size", config.get("n_embd"))
        heads = number("num_attention_heads", config.get("n_head"))
        inner = number("intermediate_size", config.get("n_inner"), 4 * hidden if model_type == "gptj" else None)
        if config.get("attention_bias") and kind.biases == "" and kind.names == Kind().names:
            kind = replace(kind, biases="attention")
        return cls(
            hidden,
            number("num_hidden_layers", config.get("n_layer")),
            heads,
            number("num_key_value_heads", heads),
            number("head_dim", hidden // heads),
            inner,
            number("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", model_type == "gemma")),
            kind=kind,
            gelu_new=(config.get("hidden_act") or config.get("activation_function")) == "gelu_new",
        )

    @property
    def query_width(self) -> int:
        """D."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """K."""
        return self.num_kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer by the name of their module: inputs, outputs."""
        hidden, inner, query, key = self.hidden_size, self.intermediate_size, self.query_width, self.key_width
        sizes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        if self.kind.is_fused:
            sizes = [(hidden, query + 2 * key), (query, hidden)]
            sizes.append((hidden, 2 * inner if self.kind.gated else inner))
        else:
            sizes += [(hidden, inner)] * (2 if self.kind.gated else 1)
        return dict(zip(self.kind.names, [*sizes, (inner, hidden)], strict=True))

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's matrices."""
        return sum(num_in * num_out for num_in, num_out in self.matrices.values())

    @property
    def norm_weights(self) -> int:
        """Weights of all normalisations."""
        width = self.hidden_size * (2 if self.kind.layer_norm else 1)
        heads = 2 * self.head_dim if self.kind.qk_norm else 0
        return self.num_layers * (self.kind.norms * width + heads) + width

    @property
    def biases(self) -> int:
        """Weights of all biases of matrices."""
        qkv, inner = self.query_width + 2 * self.key_width, self.intermediate_size * (2 if self.kind.gated else 1)
        mlp, attention = inner + self.hidden_size, qkv + self.hidden_size
        layer = {"": 0, "qkv": qkv, "mlp": mlp, "attention": attention, "all": attention + mlp}
        head = self.vocab_size if self.kind.head_bias else 0
        return self.num_layers * layer[self.kind.biases] + head

    @property
    def embedding(self) -> int:
        """Weights of the input embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights; tied ones count once."""
        matrices = self.num_layers * self.layer_matrices
        return self.embedding * (1 if self.tied else 2) + matrices + self.norm_weights + self.biases


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        shape: of the model.
        train_len: L, tokens of an example.
        target_len: tokens of the window to extend to.
        micro_batch: B, examples at a time on one device.
        global_batch: examples of an optimizer step, over all devices.
        max_steps: optimizer steps.
        strategy: one of STRATEGIES; ddp is also one device alone.
        offload_optimizer, offload_parameters: of ZeRO: what lies in CPU memory.
        devices: W, over all machines.
        precision: one of PRECISIONS.
        gradient_checkpointing: whether layers are computed again in the backward pass; "selective": but for attention
            and every second matrix product.
        attention: eager keeps the scores, every other attention does not.
        rank: of adapters; None trains all weights.
        targets: the matrices that get an adapter, by the end of their name; None: all of a layer.
        train_embeddings_and_norms: beside adapters.
        optimizer: one of OPTIMIZER_BYTES.
        weight_bytes: of a matrix's weight that trains, outside DeepSpeed: 4, or 2 with adamw8bit.
        frozen_bytes: of one that does not: 4, 2, or NF4_BYTES in the matrices of layers, with original_bytes in
            embedding and head.
        objective: one of OBJECTIVES.
        skipped: s, the share of an example's tokens from the first skip on; of two views.
        views_share: whether the tokens before the first skip go through the layers once for both views.
        num_compared: layers whose states long_short compares with the original's.
        original_bytes: of a weight as its checkpoint has it: of the frozen original that long_short keeps beside a
            model all of whose weights train, and of what does not train beside adapters.
        has_checkpoint: whether it starts from one; else from random weights.
        barred: settings that change no number here, each with the strategies under which train.py refuses it.

    Raises:
        ConfigError: a value that is not accepted, or a batch that cannot be split evenly.
    """

    shape: Shape
    train_len: int
    target_len: int
    micro_batch: int = 1
    global_batch: int = 64
    max_steps: int = 1000
    strategy: str = "ddp"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    devices: int = 1
    precision: str = "bf16-mixed"
    gradient_checkpointing: bool | str = False
    attention: str = "sdpa"
    rank: int | None = None
    targets: tuple[str, ...] | None = None
    train_embeddings_and_norms: bool = False
    optimizer: str = "adamw"
    weight_bytes: float = MASTER
    frozen_bytes: float = MASTER
    objective: str = "lm"
    skipped: float = 0.0
    views_share: bool = True
    num_compared: int = 0
    original_bytes: float = MASTER
    has_checkpoint: bool = True
    barred: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self):
        require_choice("objective", self.objective, OBJECTIVES)
        require_choice("strategy", self.strategy, STRATEGIES)
        require_choice("trainer.precision", self.precision, PRECISIONS)
        require_choice("finetune.optimizer", self.optimizer, OPTIMIZER_BYTES)
        if self.global_batch % (self.micro_batch * self.devices):
            raise ConfigError(
                f"trainer.global_batch={self.global_batch} is not a multiple of trainer.micro_batch={self.micro_batch} "
                f"on {self.devices} device(s): give a global batch that {self.micro_batch * self.devices} divides"
            )
        for target in self.targets or ():
            if target.rsplit(".", 1)[-1] not in self.shape.matrices:
                raise ConfigError(
                    f"finetune.lora.target_modules has {target!r}, which is no linear layer of this model (a head gets "
                    f"no adapter): choose from {', '.join(sorted(self.shape.matrices))}"
                )

    @property
    def is_sharded(self) -> bool:
        """Whether layers are put together while they compute."""
        return self.strategy in ("fsdp", "zero3")

    @property
    def compute_bytes(self) -> int:
        """c."""
        return 2 if self.precision in MIXED else 4

    @property
    def residual_bytes(self) -> int:
        """r: that of what is computed; fp16 under autocast would overflow, and keeps fp32."""
        return MASTER if self.is_autocast and self.precision == "16-mixed" else self.compute_bytes

    @property
    def is_autocast(self) -> bool:
        """Whether fp32 weights are cast where they are used: in mixed precision without fsdp and DeepSpeed."""
        return self.strategy == "ddp" and self.precision in MIXED

    @property
    def trained_matrices(self) -> frozenset[str]:
        """The names of a layer's matrices that train, or have an adapter that does: they keep their inputs."""
        if self.rank is None or self.targets is None:
            return frozenset(self.shape.matrices)
        return frozenset(target.rsplit(".", 1)[-1] for target in self.targets)

    @property
    def products(self) -> list[tuple[int, int]]:
        """A layer's matrix products in the order in which they are computed, adapters' two after their matrix's.

        Inputs, outputs of each.
        """
        found = []
        for name, (num_in, num_out) in self.shape.matrices.items():
            found.append((num_in, num_out))
            if self.rank is not None and name in self.trained_matrices:
                found += [(num_in, self.rank), (self.rank, num_out)]
        return found

    @property
    def adapters(self) -> int:
        """Weights of all adapters: rank x (inputs + outputs) of each target."""
        if self.rank is None:
            return 0
        sizes = (self.shape.matrices[name] for name in self.trained_matrices)
        return self.shape.num_layers * sum(self.rank * (num_in + num_out) for num_in, num_out in sizes)

    @property
    def num_trained(self) -> int:
        """Weights that train."""
        if self.rank is None:
            return self.shape.num_parameters
        whole = self.shape.embedding + self.shape.norm_weights if self.train_embeddings_and_norms else 0
        return self.adapters + whole

    @property
    def num_frozen(self) -> int:
        """Weights that do not."""
        return self.shape.num_parameters + self.adapters - self.num_trained

    @property
    def trains_embedding(self) -> bool:
        """Whether the input embedding trains."""
        return self.rank is None or self.train_embeddings_and_norms

    @property
    def trains_head(self) -> bool:
        """Whether the head trains: beside adapters, if it is the embedding."""
        return self.rank is None or (self.train_embeddings_and_norms and self.shape.tied)

    @property
    def tokens(self) -> int:
        """Trained tokens of the run."""
        return self.max_steps * self.global_batch * self.train_len

    @property
    def num_views(self) -> int:
        """Rows that attention sees of an example."""
        return 1 if self.objective == "lm" else 2

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a micro-batch in the layers: B L for each view."""
        return self.num_views * self.micro_batch * self.train_len

    def full_length(self) -> "Training":
        """The same with examples as long as the target, which have plain positions alone."""
        return replace(self, train_len=self.target_len, objective="lm", num_compared=0)

    # ----- FLOPs -----

    @property
    def attention_flops(self) -> float:
        """Of a token, forward and backward: 6 n_layer n_head d_head L for each view."""
        return 6.0 * self.num_views * self.shape.num_layers * self.shape.query_width * self.train_len

    @property
    def flops_per_token(self) -> float:
        """6 for a trained and 4 for a frozen weight of those that a token goes through, and attention.

        What an objective of two views adds: the module's docstring.
        """
        shape, twice = self.shape, self._twice
        layers = shape.num_parameters - shape.embedding * (1 if shape.tied else 2)  # but for embedding and head
        trained = layers if self.rank is None else self.adapters + self.train_embeddings_and_norms * shape.norm_weights
        of_layers = (4.0 * (layers + self.adapters) + 2.0 * trained) * (1 + twice)
        of_head = 6.0 if self.trains_head else 4.0
        teacher = 0.0
        if self.objective == "self_distill":
            of_head *= 1 + self.skipped
        elif self.objective == "long_short":
            teacher = 2.0 * layers + self.attention_flops / self.num_views / 3
        return of_layers + of_head * shape.embedding + self.attention_flops + teacher

    @property
    def _twice(self) -> float:
        """The share of the tokens that go through the layers a second time."""
        if self.num_views == 1:
            return 0.0
        return self.skipped if self.views_share else 1.0

    @property
    def flops(self) -> float:
        """Of the run."""
        return self.flops_per_token * self.tokens

    @property
    def recomputed_flops_per_token(self) -> float:
        """What is computed again: with checkpointing the forward pass of the layers, 2 N and a third of attention.

        Selective: every second product, and of attention what eager computes.
        """
        if not self.gradient_checkpointing:
            return 0.0
        if self.gradient_checkpointing == "selective":
            again = sum(num_in * num_out for num_in, num_out in self.products[1::2])
            scores = self.attention_flops / 3 if self.attention == "eager" else 0.0
            return 2.0 * self.shape.num_layers * again * (1 + self._twice) + scores
        layers = self.shape.num_layers * self.shape.layer_matrices + self.adapters
        return 2.0 * layers * (1 + self._twice) + self.attention_flops / 3

    def mfu(self, without_recomputation: float = MFU) -> float:
        """The model FLOPs over the peak, of which recomputation takes its share."""
        return without_recomputation * self.flops_per_token / (self.flops_per_token + self.recomputed_flops_per_token)

    def hours(self, gpu: GPU, mfu: float = MFU) -> float:
        """From the first step to the last on `devices` GPUs; evaluation and export are not in it."""
        peak = gpu.half if self.precision in MIXED else gpu.single
        return self.flops / (peak * self.mfu(mfu) * self.devices) / 3600

    # ----- memory -----

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on one device by part, and `total`: at the highest point of a step.

        weights, gradients, optimizer: `states`, all the time; gradients are whole from the second micro-batch of a step
        on. The highest point is one of three, and the parts are those of that one:

        * the loss is made: the forward pass is over, and all copies of weights that autocast has made are there;
        * its backward pass;
        * the backward pass of the last layer (`layers_peak`), when nothing of the loss is there: 0 of that part.
        """
        states = {part: 0.0 if self._on_cpu(part) else size for part, size in self.states.items()}
        forward, backward = loss_working(self)
        points = [
            {"activations": self.loss_kept, "loss": forward, "gathered": self.gathered(forward=True)},
            {"activations": self.loss_kept, "loss": backward, "gathered": self.gathered()},
            {"activations": self.layers_peak, "loss": 0.0, "gathered": self.gathered()},
        ]
        parts = states | max(points, key=lambda point: sum(point.values()))
        return parts | {"total": sum(parts.values())}

    @property
    def host_memory(self) -> float:
        """Bytes in CPU memory for one device: what is offloaded."""
        return sum(size for part, size in self.states.items() if self._on_cpu(part))

    def _on_cpu(self, part: str) -> bool:
        return self.offload_parameters if part == "weights" else self.offload_optimizer

    @property
    def states(self) -> dict[str, float]:
        """Bytes of weights, gradients and optimizer of one of W processes, wherever they lie: docs/STRATEGIES.md.

        With P weights of which Q train: ddp 4 P, 4 Q, 8 Q; fsdp the same over W; less if they are held in fewer bits.
        DeepSpeed has weights in what it computes in, c P (over W in stage 3), and fp32 ones with the optimizer,
        (4 + 8) Q / W. Its gradients: in the first stage c Q, and in mixed precision 4 Q of sums beside them; from the
        second on 4 Q / W, offloaded 8 Q / W. The frozen original of long_short is over W under fsdp, and whole
        elsewhere.
        """
        trained, frozen, share = self.num_trained, self.num_frozen, 1 / self.devices
        moments = OPTIMIZER_BYTES[self.optimizer]
        has_original = self.objective == "long_short" and self.rank is None
        original = self.original_bytes * self.shape.num_parameters if has_original else 0.0
        if self.strategy in ("ddp", "fsdp"):
            share = share if self.strategy == "fsdp" else 1.0
            matrices = self.shape.num_layers * self.shape.layer_matrices if self.rank is not None else 0
            # Embedding, head and norms
            rest = self.original_bytes if self.frozen_bytes == NF4_BYTES else self.frozen_bytes
            held = self.frozen_bytes * matrices + rest * (frozen - matrices)
            return {
                "weights": (self.weight_bytes * trained + held + original) * share,
                "gradients": MASTER * trained * share,
                "optimizer": moments * trained * share,
            }
        weight = self.compute_bytes
        gradients = MASTER * trained * share * (2 if self.offload_optimizer else 1)
        if self.strategy == "zero1":
            gradients = (MASTER if weight == MASTER else MASTER + weight) * trained
        return {
            "weights": weight * (trained + frozen) * (share if self.strategy == "zero3" else 1.0) + original,
            "gradients": gradients,
            "optimizer": (MASTER + moments) * trained * share,
        }

    def gathered(self, forward: bool = False) -> float:
        """Bytes of weights that exist for the time that they compute, and of buckets of gradients on their way.

        ddp: in mixed precision autocast's copies of the layers' matrices in 2 bytes. They wait for the backward pass,
        unless layers are computed again: then one layer's are there. Those of trained ones, autocast keeps to the end
        of the forward pass. The loss has a copy of the head. Where there are several devices, a bucket for each
        gradient. fsdp: two layers, embedding and head, and as much of gradients where they train. ZeRO: two buckets;
        stage 3 up to 1e9 weights.

        Args:
            forward: at the end of the forward pass; else in the backward pass.
        """
        shape, c = self.shape, self.compute_bytes
        ends = shape.embedding * (1 if shape.tied else 2)
        if self.strategy == "ddp":
            buckets = MASTER * self.num_trained if self.devices > 1 else 0
            if c == MASTER:
                return buckets
            held = self.weight_bytes if self.rank is None else self.frozen_bytes
            matrices, adapters = shape.num_layers * shape.layer_matrices, float(self.adapters)
            if held == c:  # nothing is cast
                return buckets + c * (adapters if forward or not self.gradient_checkpointing else 0)
            if self.gradient_checkpointing and not forward:
                matrices, adapters = shape.layer_matrices, adapters / shape.num_layers
            elif self.gradient_checkpointing and self.rank is not None:
                matrices = 0
            return buckets + c * (matrices + adapters + (shape.embedding if forward else 0))
        if self.strategy == "fsdp":
            layers = 2 * shape.layer_matrices + ends
            return c * layers * (2 if self.rank is None else 1)
        buckets = 2 * c * min(self.num_trained, BUCKET)
        return buckets + (c * min(shape.num_parameters, GATHERED_MAX) if self.strategy == "zero3" else 0)

    @property
    def _layer_saved(self) -> dict[str, float]:
        """Bytes that autograd saves of a token in one layer, of attention and of the MLP.

        Read in transformers' modeling_llama.py, operation by operation, with all weights trained and c = r = 4:

        * RMSNorm: its input (of `pow` and of the product with rsqrt), the normalised (of the product with the
          weight), its output (the input of the matrices): 3 H; rsqrt itself: 1. LayerNorm: input and output.
        * RoPE: nothing but cos and sin, which all layers share. SDPA: queries, keys, values, output, and the log of
          each head's sum. Eager: keys and values once for each query head, the softmax [heads, L], the mask in bytes.
        * The residual sums: nothing. MLP: gate, act(gate), up, and their product: 4 F.

        With r = 2 the norm's input is an fp32 copy, the normalised one and the output are in 2 bytes. Under autocast
        (c = 2) the output is in fp32, as the norm's weight; each matrix casts it for itself, and keeps its own copy. A
        frozen matrix keeps no input, a frozen norm does not keep what is normalised; each adapter keeps its inputs and
        `rank` numbers.
        """
        shape, c, r = self.shape, self.compute_bytes, self.residual_bytes
        hidden, inner, query, key = shape.hidden_size, shape.intermediate_size, shape.query_width, shape.key_width
        names, trained, fused = shape.kind.names, self.trained_matrices, shape.kind.is_fused
        into_attention, output = (names[:1], names[1]) if fused else (names[:3], names[3])
        into_mlp, down = (names[2:3], names[3]) if fused else (names[4:-1], names[-1])
        copies = self.is_autocast
        norms_train = self.rank is None or self.train_embeddings_and_norms

        def normed(readers: Sequence[str], with_norm: bool) -> float:
            kept = sum(name in trained for name in readers)
            size = c * hidden * (kept if copies else min(kept, 1))
            if with_norm and shape.kind.layer_norm:
                size += MASTER * hidden + 8
            elif with_norm:
                size += MASTER * hidden + MASTER + (r * hidden if norms_train else 0)
            return size

        low_rank = 0 if self.rank is None else c * self.rank
        attention = normed(into_attention, True) + low_rank * len(trained & {*into_attention, output})
        if shape.kind.qk_norm:  # the queries and keys before it in fp32, and normalised
            attention += (query + key) * (MASTER + (c if norms_train else 0))
        if self.attention == "eager":
            softmax = MASTER if c == MASTER else MASTER + c
            attention += 4 * c * query + self.train_len * (shape.num_heads * softmax + 1 / self.micro_batch)
        else:
            attention += 2 * c * (query + key) + MASTER * shape.num_heads
            attention += c * (query + key) if fused else 0  # the values are a part of a tensor, all of which stays
        if output in trained and ((self.rank is not None and copies) or shape.kind.partial):
            attention += c * query  # cast for the adapter, or put in order
        elif output in trained and self.num_views > 1:
            attention += c * query  # each token's once, of the rows that attention sees
        if shape.kind.gated:
            function = 3
        else:
            function = 4 if shape.gelu_new else 1
        mlp = normed(into_mlp, shape.kind.norms == 2) + low_rank * len(trained & {*into_mlp, down})
        if shape.kind.norms == 1 and not copies:  # both read one output
            mlp -= c * hidden * (1 if any(name in trained for name in into_mlp) else 0)
        mlp += c * inner * (function + (1 if down in trained else 0))
        return {"attention": attention, "mlp": mlp}

    @property
    def _outputs_kept(self) -> tuple[float, float]:
        """Bytes that selective recomputation keeps of a token in one layer, beside its input, and of the last product.

        The outputs of every second product, and of attention (not eager's, which is many operations) with the log of
        each head's sum. In the backward pass of a layer each is taken in place of its computation, but for the last
        product: nothing in the layer waits for its output, so it is not come to, and stays.
        """
        if self.gradient_checkpointing != "selective":
            return 0.0, 0.0
        c, products = self.compute_bytes, self.products
        attention = 0 if self.attention == "eager" else c * self.shape.query_width + MASTER * self.shape.num_heads
        last = c * products[-1][1] if len(products) % 2 else 0
        return float(attention + c * sum(num_out for _, num_out in products[::2])), float(last)

    @property
    def _kept(self) -> float:
        """Bytes that wait for the backward pass through the last layer, all layers together, and its own saved ones.

        Where layers are computed again, their inputs. The first one's is made a leaf if the embedding is frozen, which
        stays in fp32 beside what it is cast to.
        """
        shape, tokens = self.shape, self.tokens_at_once
        layer = sum(self._layer_saved.values()) * tokens
        cos_sin = 2 * shape.head_dim * tokens * self.residual_bytes
        if not self.gradient_checkpointing:
            return shape.num_layers * layer + cos_sin
        inputs = self.residual_bytes * shape.hidden_size * tokens + self._outputs_kept[0] * tokens
        is_leaf = self.is_autocast and self.residual_bytes < MASTER and not self.trains_embedding
        leaf = MASTER * shape.hidden_size * tokens if is_leaf else 0
        return shape.num_layers * inputs + leaf + cos_sin

    @property
    def layers_peak(self) -> float:
        """Bytes at the highest point of the backward pass through the last layer, or at its end.

        What is kept, with checkpointing the last layer made again (its input is there already where r = 4, and outputs
        that were kept), and on top the gradient of the residual stream, and

        * with checkpointing, when it has been made again and nothing of it has gone: the residual (where r = 2), under
          autocast the norm's output, and where the down matrix has an adapter, the outputs' gradient by that, the
          matrix's own output, and the adapter's input in fp32;
        * in the MLP the gradient of the down matrix's input and either those of both factors (less the product, which
          has gone, if it was kept) or that of the matrix;
        * in attention, when what the MLP has kept is gone, the gradients of output, queries, keys and values; with
          eager attention two more of the scores, when the output has gone.

        Before that, in the last norm, its input and five numbers in fp32 for each of its own: the gradients by both
        factors, and the steps to that of the square.
        A gradient of a tied matrix waits from the head to the embedding, and those of the states that long_short
        compares for their layers. At the end the embedding's is made.
        """
        shape, c, r = self.shape, self.compute_bytes, self.residual_bytes
        tokens, saved = self.tokens_at_once, self._layer_saved
        down = shape.kind.names[-1] in self.trained_matrices
        again = made = 0.0
        if self.gradient_checkpointing:
            outputs, last = self._outputs_kept
            again = (sum(saved.values()) - (outputs - last)) * tokens
            again -= MASTER * shape.hidden_size * tokens if r == MASTER else 0
            made += r * shape.hidden_size if r < MASTER else 0
            made += MASTER * shape.hidden_size if self.is_autocast else 0
            if self.rank is not None and down:
                made += 2 * c * shape.hidden_size
                made += (MASTER + c) * shape.intermediate_size if self.is_autocast else 0
        waits: float = MASTER * shape.embedding if shape.tied and self.trains_head else 0
        waits += r * shape.hidden_size * tokens * max(self.num_compared - 1, 0)
        inner = c * shape.intermediate_size * tokens
        matrix = shape.hidden_size * shape.intermediate_size * (MASTER if c == MASTER else MASTER + c)
        factors = 2 * inner if shape.kind.gated or shape.gelu_new else inner
        in_mlp = inner + max(factors - (inner if down else 0), matrix if self.rank is None else 0)
        if self.rank is not None and down and self.is_autocast:  # the adapter's own, and cast
            in_mlp = max(in_mlp, (MASTER + c) * shape.intermediate_size * tokens)
        in_attention: float = 2 * c * tokens * (shape.query_width + shape.key_width)
        if self.attention == "eager":
            scores = MASTER * shape.num_heads * self.train_len * tokens
            in_attention = max(2 * scores - c * tokens * shape.query_width, scores + 2 * c * tokens * shape.query_width)
        in_attention -= saved["mlp"] * tokens
        through = again + r * shape.hidden_size * tokens + max(made * tokens, in_mlp, in_attention)
        through = self._kept + max(through, 6 * MASTER * shape.hidden_size * tokens)
        at_the_end = MASTER * (shape.embedding + tokens * shape.hidden_size) if self.trains_embedding else 0
        return waits + max(through, at_the_end)

    @property
    def loss_kept(self) -> float:
        """Bytes that wait for the backward pass while the loss is made: of all layers, and the last norm."""
        shape, r, tokens = self.shape, self.residual_bytes, self.tokens_at_once
        normed = self.trains_embedding and not shape.kind.layer_norm
        return self._kept + tokens * shape.hidden_size * (MASTER + (r if normed else 0))


def loss_working(training: Training) -> tuple[float, float]:
    """Bytes of `pose.modeling.loss` beside all that waits for the backward pass: at the end of the forward, backward.

    Forward: the last norm's output, of it the states of scored tokens (under autocast also cast), their gradient, and
    that of the head, 4 V H. The logits of a chunk of C = 1,024 tokens (512 of two views) in fp32, which become
    their own gradient, 4 C V, and where layers compute in 16 bits that cast, c C V, and the head's gradient by the
    chunk, c V H. (A CPU makes an fp32 copy of that to add it, which is not counted.)

    Backward: both gradients, the head's cast to what it is computed in; then the states' and that of the norm's output.

    With ZeRO-3 the head is in parts: logits and their log-probabilities, in fp32, 8 C V. They are made again in the
    backward pass: the log-probabilities and the gradients by them and by the logits, 12 C V; then beside the logits'
    gradient that of the head, 4 V H; with several chunks its sum too, all the time.

    self_distill: states and their gradients of both views, and for a chunk of 256 tokens three times the logits: the
    teacher's, the student's, and the teacher's probabilities. long_short: the second view whole, and what
    the original made of each layer that is compared.

    All that is known here of the loss is in this function.
    """
    shape, tokens = training.shape, training.micro_batch * (training.train_len - 1)
    chunk = min(CHUNK_LEN if training.objective == "lm" else CHUNK_LEN_OF_VIEWS, tokens)
    c = training.compute_bytes
    r = MASTER if training.is_autocast else training.residual_bytes  # the last norm's weight is fp32
    output = float(r * training.tokens_at_once * shape.hidden_size)
    states, gradients = float(r * tokens * shape.hidden_size), float(c * tokens * shape.hidden_size)
    logits = 4.0 * chunk * shape.vocab_size
    head = 4.0 * shape.embedding if training.trains_head else 0.0
    in_half = c < MASTER
    cast = c * head / MASTER if in_half else 0.0
    if training.objective == "long_short":  # the second view whole, and the original's states
        output += r * tokens * shape.hidden_size * (1 + training.num_compared)
    if training.strategy == "zero3":
        total = head if tokens > chunk else 0.0
        return output + states + 2 * logits, states + total + max(3 * logits, logits + head)
    by_token = (MASTER + c * in_half) * shape.vocab_size
    forward = output + states + gradients + (gradients if training.is_autocast else 0.0) + head
    forward += by_token * chunk + cast
    backward = max(gradients + head + cast, states + output)
    if training.objective == "self_distill":
        pairs = min(CHUNK_LEN_OF_VIEWS // 2, tokens)
        rows = 2 * (states + gradients + (gradients if training.is_autocast else 0.0))
        working = max(3 * MASTER * shape.vocab_size * pairs, by_token * max(2 * pairs, chunk) + cast)
        forward = output + rows + head + working
        backward = max(2 * gradients + head + cast, 2 * states + output)
    return forward, backward


# ----- what to change -----


@dataclass(frozen=True)
class Advice:
    """Overrides of train.py that lower what a device needs.

    Attributes:
        overrides: as they are typed.
        total: bytes of a device with them.
        fits: whether that is enough.
    """

    overrides: tuple[str, ...]
    total: float
    fits: bool


def fits(training: Training, gpu: GPU) -> bool:
    """Whether a training fits a GPU, with a margin of 1 - USABLE."""
    return training.memory["total"] <= USABLE * gpu.memory


def divisors(number: int) -> list[int]:
    """All of a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def micro_batch_of_views(micro_batch: int, num_views: int, share: int) -> int:
    """The examples of two views that are taken at a time where as many of one were asked for: about the same memory.

    Args:
        micro_batch: that was asked for.
        num_views: of an example.
        share: of a device, of the global batch; what is returned divides it.
    """
    if num_views == 1:
        return micro_batch
    return max(one for one in divisors(share) if one <= max(micro_batch // num_views, 1))


def largest_micro_batch(training: Training, gpu: GPU) -> int:
    """The largest by which a training fits a GPU, of those that divide a device's share of the batch; 1 for none."""
    sizes = divisors(training.global_batch // training.devices)
    return max((n for n in sizes if fits(replace(training, micro_batch=n), gpu)), default=1)


def _changes(training: Training) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """What may help, the cheapest first: overrides, and the same as changes of a Training."""
    found: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    if training.micro_batch > 1:
        found.append((("trainer.micro_batch=1",), {"micro_batch": 1}))
    if training.gradient_checkpointing is not True:
        found.append((("model.gradient_checkpointing=true",), {"gradient_checkpointing": True}))
    if training.attention == "eager":
        found.append((("model.attention=sdpa",), {"attention": "sdpa"}))
    if training.precision == "32-true":
        found.append((("trainer.precision=bf16-mixed",), {"precision": "bf16-mixed"}))
    keep = {"offload_optimizer": False, "offload_parameters": False}
    if training.devices > 1 and training.strategy not in ("fsdp", "zero3"):
        found.append((("strategy=fsdp",), keep | {"strategy": "fsdp"}))
    single = training.strategy == "ddp" and training.precision == "bf16-mixed"
    # What was asked for by itself stays, whatever group is chosen behind it
    is_8bit = training.optimizer == "adamw8bit"
    adamw = ("finetune.optimizer=adamw", "finetune.weights_dtype=auto") if is_8bit else ()
    whole: dict[str, Any] = {"optimizer": "adamw", "weight_bytes": MASTER} if is_8bit else {}
    if training.rank is None and single and training.devices == 1 and training.optimizer == "adamw":
        overrides = ("finetune.optimizer=adamw8bit", "strategy=auto")  # under ddp weights stay fp32
        found.append((overrides, {"optimizer": "adamw8bit", "weight_bytes": 2}))
    if training.rank is None:
        lora = {"rank": 8, "optimizer": "adamw", "weight_bytes": MASTER, "frozen_bytes": training.original_bytes}
        found.append((("finetune=lora", *adamw), lora))
        if single:
            found.append((("finetune=qlora", *adamw), lora | {"frozen_bytes": NF4_BYTES}))
    elif single and training.frozen_bytes > 1:
        found.append((("finetune.lora.frozen_dtype=nf4",), {"frozen_bytes": NF4_BYTES}))
    for devices in (2, 4, 8, 16, 32):
        size = training.micro_batch
        if devices > training.devices and training.global_batch % (devices * size) == 0:
            sharded = keep | whole | {"strategy": "fsdp", "devices": devices}
            if training.is_sharded:
                found.append(((f"trainer.devices={devices}",), {"devices": devices}))
            else:
                found.append((("strategy=fsdp", f"trainer.devices={devices}", *adamw), sharded))
    if not training.offload_parameters:
        offload = whole | {"strategy": "zero3", "offload_optimizer": True, "offload_parameters": True}
        found.append((("strategy=zero3_offload", *adamw), offload))
    if training.train_len > 256 and training.train_len < training.target_len:
        half = training.train_len // 2
        found.append(((f"pose.train_len={half}",), {"train_len": half}))
    return [(overrides, change) for overrides, change in found if not refused(replace(training, **change))]


def refused(training: Training) -> str:
    """Why train.py refuses such a training (`pose.app.holding`, `pose.training.strategies`); "" where it does not.

    What depends on more than a plan knows, such as the packages that are installed, is not looked at.
    """
    strategy = training.strategy
    if training.optimizer == "adamw8bit" and strategy != "ddp":
        return f"finetune.optimizer=adamw8bit is not supported by strategy={strategy}"
    if training.optimizer == "adamw8bit" and training.precision == "16-mixed":
        return "finetune.optimizer=adamw8bit is not supported with trainer.precision=16-mixed"
    if training.weight_bytes < MASTER and training.devices > 1:
        return "finetune.weights_dtype=bfloat16 is for one process"
    if training.rank is not None and training.frozen_bytes == NF4_BYTES and strategy != "ddp":
        return f"finetune.lora.frozen_dtype=nf4 is not supported by strategy={strategy}"
    if training.rank is not None and training.frozen_bytes == NF4_BYTES and not training.has_checkpoint:
        return "finetune.lora.frozen_dtype=nf4 needs the weights of a checkpoint, and model.path is null"
    for setting, strategies in training.barred:
        if strategy in strategies:
            return f"{setting} is not supported by strategy={strategy}"
    if strategy == "fsdp" and training.precision == "16-mixed":
        return "trainer.precision=16-mixed is not supported by strategy=fsdp"
    if training.objective == "long_short":
        if not training.has_checkpoint:
            return "objective=long_short needs an original model, and model.path is null"
        if training.rank is None and strategy == "zero3":
            return "objective=long_short is not supported by strategy=zero3 without finetune=lora"
        if training.train_embeddings_and_norms and training.rank is not None and strategy in ("fsdp", "zero3"):
            return (
                "finetune.lora.train_embeddings_and_norms=true is not supported with objective=long_short by "
                f"strategy={strategy}"
            )
    return ""


def advise(training: Training, gpu: GPU) -> list[Advice]:
    """What to change so that a training fits a GPU; each is planned anew, and lowers what a device needs.

    Returns:
        The changes that suffice alone, the cheapest first; where none does, those that lower it, and then one that
        joins them until it fits, or as far as it goes. Empty where it fits.
    """
    if fits(training, gpu):
        return []
    before = training.memory["total"]
    alone: list[Advice] = []
    for overrides, change in _changes(training):
        changed = replace(training, **change)
        if "devices" in change and any(one.fits and "trainer.devices" in one.overrides[-1] for one in alone):
            continue  # fewer are enough
        if changed.memory["total"] < before:
            alone.append(Advice(overrides, changed.memory["total"], fits(changed, gpu)))
    if enough := [one for one in alone if one.fits]:
        return enough
    joined = training
    chosen: dict[str, str] = {}
    while not fits(joined, gpu):
        options = [(o, replace(joined, **change)) for o, change in _changes(joined)]
        options = [(o, changed) for o, changed in options if changed.memory["total"] < joined.memory["total"]]
        if not options:
            break
        added, joined = next(((o, changed) for o, changed in options if fits(changed, gpu)), options[0])
        chosen |= {override.split("=")[0]: override for override in added}  # the last one of a key holds
    together = Advice(tuple(chosen.values()), joined.memory["total"], fits(joined, gpu))
    return [*alone, together] if len(chosen) > 1 else alone


# ----- what is shown -----


def as_json(training: Training, mfu: float = MFU) -> dict[str, Any]:
    """Everything that is planned, in numbers: of the training, and of the same at full length.

    Args:
        training: what is planned.
        mfu: that is assumed where nothing is recomputed.
    """

    def costs(one: Training) -> dict[str, Any]:
        hours = {gpu.name: one.hours(gpu, mfu) for gpu in GPUS}
        return {
            "train_len": one.train_len,
            "tokens": one.tokens,
            "flops_per_token": one.flops_per_token,
            "flops": one.flops,
            "mfu": one.mfu(mfu),
            "memory_gib": {part: size / GIB for part, size in one.memory.items()},
            "host_memory_gib": one.host_memory / GIB,
            "hours": hours,
            "gpu_hours": {name: value * one.devices for name, value in hours.items()},
            "fits": {gpu.name: fits(one, gpu) for gpu in GPUS},
        }

    full = training.full_length()
    advice = {gpu.name: advise(training, gpu) for gpu in GPUS}
    return {
        "parameters": {"total": training.shape.num_parameters, "trained": training.num_trained},
        "target_len": training.target_len,
        "devices": training.devices,
        "micro_batch": training.micro_batch,
        "strategy": training.strategy,
        "precision": training.precision,
        **costs(training),
        "full_length": costs(full),
        "flop_ratio": full.flops / training.flops,
        "advice": {
            name: [{"overrides": list(one.overrides), "total_gib": one.total / GIB, "fits": one.fits} for one in found]
            for name, found in advice.items()
            if found
        },
    }


def summary(training: Training, mfu: float = MFU) -> str:
    """Two lines: what a run needs and takes, and what full-length training would."""
    full, memory = training.full_length(), training.memory
    states = sum(memory[part] for part in ("weights", "gradients", "optimizer"))
    hours = ", ".join(f"{gpu.name} {duration(training.hours(gpu, mfu) * training.devices)}" for gpu in GPUS)
    ratio = full.flops / training.flops
    return (
        f"Plan        {training.flops:.3g} FLOPs, {gib(memory['total'])} of memory a device ({gib(states)} of weights, "
        f"gradients, optimizer)\n"
        f"            GPU time at {training.mfu(mfu):.0%} MFU: {hours}; full-length at {training.target_len:,} tokens "
        f"{ratio:.3g} x the FLOPs, {gib(full.memory['total'])}"
    )


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def duration(hours: float) -> str:
    """Hours as a person reads them."""
    if hours >= 1:
        return f"{hours:,.1f} h" if hours < 1000 else f"{hours:,.0f} h"
    if hours * 60 >= 1:
        return f"{hours * 60:.1f} min"
    return f"{hours * 3600:.0f} s" if hours * 3600 >= 1 else "under 1 s"


if __name__ == "__main__":
    runpy.run_module("pose.app.plan", run_name="__main__")
