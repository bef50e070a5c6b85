"""What is run: each arm is the overrides of one command, once for each of its seeds.

Trained on the shipped texts from the shipped base model (window 256), unless an arm says otherwise. "8x" in a name is
the target over the window. An arm that needs what another has left says {NAME} for the folder of that one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from pose.files import REPOSITORY

TRAIN, EVALUATE, SEARCH = "train.py", "evaluate.py", "pose.search"
EXACT = "dtype=float32"  # of every evaluation, on a GPU too: what train.py measures its models in
TEXTS = "assets/corpora/{}.heldout.jsonl.gz"
TINY = REPOSITORY / "assets" / "tiny"
REFERENCE = re.compile(r"\{([\w.]+)\}")


@dataclass(frozen=True)
class Scale:
    """How large everything is; the claims are the same at every scale.

    Attributes:
        window: of the base model, in tokens.
        seeds: of most arms.
        is_quick: whether it is to go through all in seconds; the figures then mean nothing.
    """

    window: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    is_quick: bool = False

    def at(self, times: int) -> int:
        """A target or length, in tokens."""
        return self.window + 16 * times if self.is_quick and times > 1 else self.window * times

    def lengths(self, *times: int) -> tuple[int, ...]:
        """Some lengths in tokens; of a quick scale the first and the last."""
        return tuple(map(self.at, (times[0], times[-1]) if self.is_quick else times))


@dataclass(frozen=True)
class AsLong:
    """A number of steps by time: as many as fit into what another arm takes, its search included.

    Attributes:
        arm: whose time is taken.
        step_of: the arm by whose steps this one's are timed.
    """

    arm: str
    step_of: str


@dataclass(frozen=True)
class Arm:
    """One command, for several seeds.

    Attributes:
        name: of the arm and its folder.
        overrides: of the command, without seed and folders.
        script: of the command.
        seeds: each is a run.
        also: further evaluations of the model that it leaves: overrides of evaluate.py, by the name that is put before
            their metrics.
        as_long: decides trainer.max_steps, where given.
        cost: seconds of a training token, relative to those of objective=lm.
        keep: whether the model stays when all is measured, for other arms.
    """

    name: str
    overrides: tuple[str, ...]
    script: str = TRAIN
    seeds: tuple[int, ...] = (0,)
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    as_long: AsLong | None = None
    cost: float = 1.0
    keep: bool = False

    def needs(self) -> set[str]:
        """The arms that have to be finished first."""
        found = {name for override in self.overrides for name in REFERENCE.findall(override)}
        return found | ({self.as_long.arm, self.as_long.step_of} if self.as_long else set())

    def value(self, key: str, default: str) -> str:
        """Of an override; the last one that is given holds."""
        return next((o.partition("=")[2] for o in reversed(self.overrides) if o.startswith(f"{key}=")), default)


def listed(values) -> str:
    """As Hydra takes it."""
    return f"[{','.join(map(str, values))}]"


def arms(scale: Scale) -> dict[str, Arm]:
    """All arms by name; those that others need come before them."""
    found: dict[str, Arm] = {}
    for arm in (*_default(scale), *_paper(scale), *_families(scale), *_cost(scale), *_methods(scale)):
        assert arm.name not in found and arm.needs() <= found.keys(), arm.name
        found[arm.name] = _small(arm) if scale.is_quick else arm
    return found


def _small(arm: Arm) -> Arm:
    """The same command, done in seconds."""
    measured = ("eval.windows=1", "eval.trials=2", "eval.max_documents=1")
    more = {
        TRAIN: ("trainer.max_steps=2", "trainer.global_batch=2", "trainer.micro_batch=1", "trainer.log_every_n_steps=1",
                *measured),
        EVALUATE: measured,
        SEARCH: ("search.population=3", "search.num_generations=1", "search.num_parents=2", "search.trials=1"),
    }[arm.script]  # fmt: skip
    overrides = tuple(o for o in arm.overrides if not o.startswith("watch."))
    also = {name: (*one, *measured) for name, one in arm.also.items()}
    return Arm(arm.name, (*overrides, *more), arm.script, arm.seeds[:1], also, arm.as_long, arm.cost, arm.keep)


# ----- docs/TINY.md, README.md -----


DEFAULT_SEEDS = (0, 1, 2, 3, 4)  # of the default run


def controls(scale: Scale) -> dict[str, tuple[str, ...]]:
    """The default run and what it is compared with: their overrides. Full length has as many tokens a step."""
    batch = 16 * scale.window // scale.at(8)
    return {
        "pose": (),
        "short_pi": ("pose=short_pi",),
        "randpos": ("pose=randpos", "data.skip_before_question=false"),  # all of its ids are its own
        "full": ("pose=full", f"trainer.global_batch={batch}", f"trainer.micro_batch={batch}"),
    }


def arms_of_tiny(scale: Scale) -> tuple[str, ...]:
    """The arms of docs/TINY.md's table."""
    return tuple(f"default.{name}" for name in controls(scale))


def _default(scale: Scale) -> Iterator[Arm]:
    small = (f"pose.target_len={scale.at(8)}", f"eval.lengths={listed(tiny_lengths(scale))}") if scale.is_quick else ()
    for name, overrides in controls(scale).items():
        seeds = scale.seeds if name != "pose" or scale.is_quick else DEFAULT_SEEDS
        yield Arm(f"default.{name}", (*overrides, *small, "eval.tasks=[perplexity,passkey,needle_gain]"), seeds=seeds)


def tiny_lengths(scale: Scale) -> tuple[int, ...]:
    """At which the default run is measured."""
    return scale.lengths(1, 2, 4, 8)


# ----- the paper -----


PAPER = ("experiment=paper_tiny", "eval.before=false")
LONG = {32: (1, 8, 16, 32), 64: (1, 16, 32, 64)}  # lengths of Table 2, over the window


def paper_lengths(scale: Scale, times: int) -> tuple[int, ...]:
    """Those at which an arm of Table 1 is measured."""
    return scale.lengths(*(2**n for n in range(times.bit_length())))


def _paper(scale: Scale) -> Iterator[Arm]:
    """Tables 1 to 5, Figures 2 and 5: trained on all three texts, as experiment=paper_tiny has it."""

    def text(name: str, times: int) -> tuple[str, ...]:
        lengths = f"eval.lengths={listed(paper_lengths(scale, times))}"
        return ("eval=perplexity", f"eval.documents={TEXTS.format(name)}", lengths, "eval.windows=4",
                "eval.max_documents=5")  # fmt: skip

    def arm(name: str, times: int, *overrides: str, **options) -> Arm:
        target = (f"pose.target_len={scale.at(times)}", f"eval.lengths={listed(paper_lengths(scale, times))}")
        also = {"proofs": text("proofs", times)}
        return Arm(f"{name}.{times}x", (*PAPER, *target, *overrides), **{"seeds": scale.seeds, "also": also} | options)

    for times in (8, 16):
        yield Arm(
            f"untuned.{times}x",
            ("ckpt=assets/tiny", *text("reports", times), "eval.tasks=[perplexity,passkey,needle_gain]"),
            EVALUATE,
            also={"proofs": text("proofs", times)},
        )
    by_step = ("watch.every_n_steps=50", "watch.tasks=[perplexity]")
    yield arm("linear.pose", 8, "rope=linear", *by_step)
    yield arm("linear.full_tokens", 8, "rope=linear", "pose=full", "trainer.global_batch=2", "trainer.micro_batch=2")
    yield arm("linear.full", 8, "rope=linear", "pose=full", "trainer.micro_batch=2", *by_step, cost=1.3)
    yield arm("linear.randpos", 8, "rope=linear", "pose=randpos")
    yield arm("linear.short", 8, "rope=linear", "pose=short_pi")
    yield arm("linear.n3", 8, "rope=linear", "pose=pose_n3")
    yield arm("linear.contiguous", 8, "rope=linear", "pose.content=contiguous")
    yield arm("linear.aligned", 8, "rope=linear", "pose.content=aligned")
    yield arm("linear.long", 8, "rope=linear", "trainer.max_steps=1000")
    yield arm("ntk.pose", 8, "rope=ntk")
    yield arm("yarn.pose", 8, "rope=yarn")
    yield arm("linear.pose", 16, "rope=linear")
    yield arm("linear.randpos", 16, "rope=linear", "pose=randpos")
    for times, lengths in LONG.items():
        books = (f"eval.documents={TEXTS.format('books')}", f"eval.lengths={listed(scale.lengths(*lengths))}",
                 "eval.tasks=[perplexity]")  # fmt: skip
        yield Arm(
            f"untuned_long.{times}x",
            ("ckpt=assets/tiny", "eval=perplexity", "eval.windows=4", "eval.max_documents=5", *books), EVALUATE,
        )  # fmt: skip
        for rope in ("linear", "ntk", "yarn"):
            yield Arm(
                f"{rope}.pose.{times}x",
                (*PAPER, f"pose.target_len={scale.at(times)}", f"rope={rope}", *books),
                seeds=scale.seeds,
            )


def _families(scale: Scale) -> Iterator[Arm]:
    """Figure 4: other architectures, from random weights to 256 tokens and from there to 2,048.

    GPT-J is Phi in transformers' terms of this package: a part of a head's dimensions is rotated. LLaMA2 and Baichuan2
    have LLaMA's architecture, which the shipped model has; Qwen3 normalises queries and keys.
    """
    families = {
        "phi": ("model.init.model_type=phi", "+model.init.rope_parameters.partial_rotary_factor=0.5"),
        "qwen3": ("model.init.model_type=qwen3", "+model.init.head_dim=64"),
    }
    lengths = paper_lengths(scale, 8)
    for family, init in families.items():
        yield Arm(
            f"base.{family}", ("experiment=pretrain_tiny", *init, "trainer.max_steps=2000", "eval=none"), keep=True
        )
        model = (f"model.path={{base.{family}}}/model",)
        measured = ("eval=perplexity", f"eval.documents={TEXTS.format('reports')}", f"eval.lengths={listed(lengths)}",
                    "eval.windows=4", "eval.max_documents=5", "eval.tasks=[perplexity,passkey]")  # fmt: skip
        yield Arm(f"untuned.{family}", (f"ckpt={{base.{family}}}/model", *measured), EVALUATE)
        for rope in ("linear", "ntk", "yarn"):
            yield Arm(
                f"{rope}.{family}",
                (*PAPER, f"pose.target_len={scale.at(8)}", f"eval.lengths={listed(lengths)}", f"rope={rope}", *model,
                 "eval.tasks=[perplexity,passkey]"),
                seeds=scale.seeds,
            )  # fmt: skip


COST_TARGETS = (8, 16, 32)


def _cost(scale: Scale) -> Iterator[Arm]:
    """Figure 3, left: a few steps of two examples, by target."""
    for times in COST_TARGETS:
        for pose in ("pose", "full"):
            yield Arm(
                f"cost.{pose}.{times}x",
                (*PAPER, "rope=linear", f"pose={pose}", f"pose.target_len={scale.at(times)}", "eval.tasks=[]",
                 "trainer.max_steps=8", "trainer.global_batch=2", "trainer.micro_batch=1",
                 "trainer.log_every_n_steps=1"),
                seeds=scale.seeds,
            )  # fmt: skip


# ----- docs/METHODS.md -----


METHODS = ("experiment=methods_tiny",)
METHOD_LENGTHS = {16: (1, 8, 16), 32: (1, 32)}
MIXED = ("pose=mix", "rope.attention_factor=1")
COSTS = {"self_distill": 1.8, "long_short": 2.0}
SECONDS = "_seconds"  # ends the name of a method with as many steps as fit into lm's time
RATES = ("2.5e-4", "5e-4", "1e-3")
# Of a method the peak learning rate that suits it: the best of the arms lr.*, by needle gain at the target
RATE_OF = {"lm": "1e-3", "self_distill": "2.5e-4", "long_short": "5e-4", "searched": "5e-4", "searched_mixed": "1e-3"}
# That of another, of a method for which none was looked for; else lm's
RATED_AS = {
    "yarn_mixed": "searched_mixed", "searched_plain": "searched", "far_self_distill": "self_distill",
    "far_long_short": "long_short",
}  # fmt: skip
# Compared at 32x too: at 16x no other was told apart from lm, but for a loss of perplexity at the target
FARTHEST = ("lm", "short_pi", "self_distill", "long_short", "beta10", "searched", "searched_plain")
LR_SEED = 10  # no figure of a table is of it
FAR = ("data.skip_before_question=true",)  # as the default has it; the experiment of the other methods does not
# The control without skips, distillation, what became the default, and what comes on top of it: their overrides, and
# the lengths at which they are compared
CANDIDATES = {
    "short_pi": (("pose=short_pi",), (16,)), "self_distill": (("objective=self_distill",), (16,)),
    "long_short": (("objective=long_short",), (16,)), "far_answers": (FAR, (16, 32)),
    "far_beta4": ((*FAR, "rope.beta_slow=4"), (16,)), "far_beta10": ((*FAR, "rope.beta_slow=10"), (16, 32)),
}  # fmt: skip
# The objectives on top of it, at the first length
DISTILLED = {"far_self_distill": (*FAR, "objective=self_distill"), "far_long_short": (*FAR, "objective=long_short")}
CANDIDATE_SEEDS = (3, 4, 5)  # that had no part in the choice
MORE_SEEDS = (6, 7, 8)  # besides, of lm and of what became the default at the first length: three left it open there


def rate_arm(name: str, lr: str) -> str:
    """The name of the arm that tries a learning rate."""
    return f"lr.{name}.{lr.replace('.', '_')}"


def candidate_arm(name: str, times: int) -> str:
    """The name of the arm of lm or of one of CANDIDATES or DISTILLED, which are compared with each other alone."""
    return f"candidate.{name}.{times}x"


def candidate_seeds(name: str, times: int) -> tuple[int, ...]:
    """Of one of the arms that are compared with each other alone."""
    has_more = name in ("lm", "far_answers") and times == next(iter(METHOD_LENGTHS))
    return CANDIDATE_SEEDS + MORE_SEEDS if has_more else CANDIDATE_SEEDS


def candidates(times: int) -> dict[str, tuple[str, ...]]:
    """Those of CANDIDATES that are compared at a length, by name: their overrides. Before them lm, which has none.

    One whose step takes longer than lm's is compared a second time, as NAME_seconds, with the steps of lm's time.
    """
    found = {"lm": ()} | {name: overrides for name, (overrides, lengths) in CANDIDATES.items() if times in lengths}
    return found | {f"{name}{SECONDS}": found[name] for name in COSTS if name in found}


def distilled(times: int) -> dict[str, tuple[str, ...]]:
    """Those of DISTILLED that are compared with the default at a length, by name: their overrides."""
    return DISTILLED if times == next(iter(METHOD_LENGTHS)) else {}


def methods(scale: Scale, times: int) -> dict[str, tuple[str, ...]]:
    """The methods that docs/METHODS.md compares, by name: their overrides. At 32x those of FARTHEST."""
    target = scale.at(times)
    searched = ("rope=searched", f"rope.factors={{search.{times}x}}")
    found = {
        "lm": (),
        "short_pi": ("pose=short_pi",),  # the control: no position is skipped
        "self_distill": ("objective=self_distill",),
        "long_short": ("objective=long_short",),
        "rcd10": ("rope.rcd_shift=true",),
        "rcd3": ("rope.rcd_shift=true", "rope.rcd_periods=3"),
        "beta10": ("rope.beta_slow=10",),
        "searched": searched,
        "searched_plain": (*searched, "pose=mix"),
        "searched_mixed": (*searched, "rope.mixed=true", *MIXED),
        "yarn_mixed": ("rope=longrope", f"rope.long_factor={listed(_yarn(target))}", *MIXED),
        "end_anchor": ("pose=end_anchor",),
        "curriculum": (f"pose.curriculum=[[0.25,{scale.at(times // 4)}],[0.5,{scale.at(times // 2)}]]",),
        "cope": ("rope=cope",),
    }
    return found if times == 16 else {name: found[name] for name in FARTHEST}


def _methods(scale: Scale) -> Iterator[Arm]:
    def rate(name: str) -> tuple[str, ...]:
        return (f"finetune.lr={RATE_OF[name if name in RATE_OF else RATED_AS.get(name, 'lm')]}",)

    for times, of in METHOD_LENGTHS.items():
        target = f"pose.target_len={scale.at(times)}"
        measured = f"eval.lengths={listed(scale.lengths(*of))}"
        common = (*METHODS, target, measured)
        yield Arm(
            f"untuned_books.{times}x",
            ("ckpt=assets/tiny", measured, "eval.tasks=[perplexity,passkey,needle_gain]"),
            EVALUATE,
        )
        yield Arm(
            f"search.{times}x",
            (target, "search.population=24", "search.num_generations=4", "search.num_parents=8", "search.trials=5"),
            SEARCH,
        )
        every = methods(scale, times)
        for name, overrides in every.items():
            yield Arm(
                f"{name}.{times}x", (*common, *overrides, *rate(name)), seeds=scale.seeds, cost=COSTS.get(name, 1.0)
            )
        # At equal seconds: a slower step leaves fewer of them; a search takes longer than lm's whole training, so lm
        # gets its time
        for name in COSTS:
            as_long = AsLong(f"lm.{times}x", f"{name}.{times}x")
            yield Arm(f"{name}{SECONDS}.{times}x", (*common, *every[name], *rate(name)), seeds=scale.seeds,
                      as_long=as_long)  # fmt: skip
        as_long = AsLong(f"searched.{times}x", f"lm.{times}x")
        yield Arm(f"lm_as_searched.{times}x", (*common, *rate("lm")), seeds=scale.seeds, as_long=as_long, cost=4.0)
        for name, overrides in (candidates(times) | distilled(times)).items():
            of = name.removesuffix(SECONDS)
            as_long = AsLong(candidate_arm("lm", times), candidate_arm(of, times)) if of != name else None
            yield Arm(
                candidate_arm(name, times), (*common, *overrides, *rate(of)), seeds=candidate_seeds(name, times),
                as_long=as_long, cost=COSTS.get(RATED_AS.get(name, name), 1.0),
            )  # fmt: skip
        if times == 16:
            for name in RATE_OF:
                for lr in RATES:
                    yield Arm(
                        rate_arm(name, lr), (*common, *every[name], f"finetune.lr={lr}"),
                        seeds=(LR_SEED,), cost=COSTS.get(name, 1.0),
                    )  # fmt: skip


def arms_of_methods(scale: Scale) -> dict[str, tuple[str, ...]]:
    """The arms of docs/METHODS.md by the name that --only has for a comparison."""
    found = {}
    for times in METHOD_LENGTHS:
        names = ("untuned_books", "search", *methods(scale, times), *(f"{name}{SECONDS}" for name in COSTS),
                 "lm_as_searched")  # fmt: skip
        found[f"methods{times}x"] = tuple(f"{name}.{times}x" for name in names)
    found["candidate"] = tuple(candidate_arm(name, times) for times in METHOD_LENGTHS for name in candidates(times))
    found["distilled"] = tuple(
        candidate_arm(name, times) for times in METHOD_LENGTHS if distilled(times)
        for name in ("far_answers", *distilled(times))
    )  # fmt: skip
    return found | {"lr": tuple(rate_arm(name, lr) for name in RATE_OF for lr in RATES)}


@cache
def _yarn(target_len: int) -> tuple[float, ...]:
    """The divisors of rope=yarn for the shipped model, to six digits."""
    from pose.rope import RopeGeometry, Yarn

    config = json.loads((TINY / "config.json").read_text())
    geometry = RopeGeometry(
        config["rope_parameters"]["rope_theta"], config["head_dim"], config["max_position_embeddings"]
    )
    inv_freq = Yarn().resolve(geometry, target_len).inv_freq(geometry)
    return tuple(round(divisor, 6) for divisor in (geometry.theta() / inv_freq).tolist())
