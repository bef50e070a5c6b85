"""docs/RESULTS.md and the tables of docs/METHODS.md, docs/TINY.md and README.md, from docs/results/runs.json."""

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import smollm2
from benchmarks.results.arms import (
    COSTS,
    EVALUATE,
    EXACT,
    LR_SEED,
    METHOD_LENGTHS,
    RATE_OF,
    RATES,
    SEARCH,
    SECONDS,
    Arm,
    Scale,
    arms_of_methods,
    arms_of_tiny,
    candidate_arm,
    candidates,
    distilled,
    methods,
    rate_arm,
    tiny_lengths,
)  # fmt: skip
from benchmarks.results.claims import COSTS_OF, Checked, Claim, Missing, Numbers, checked, claims, verdict
from benchmarks.results.records import Runs, base_model, current, seed_of
from pose.errors import DataError
from pose.evaluation.task import student_95
from pose.files import atomic_file, load_json

HEAD = """\
# The paper, claim by claim

What the paper claims, and what came of it on the shipped tiny model (window 256) or on what a section names;
[a real model](#on-a-real-model) comes last. Every number of ours and every verdict is computed from
[the runs' metrics](results/runs.json) by `make results` (`python -m benchmarks.results`), and a test holds the page to
the runs; only the paper's numbers and the bounds are entered by hand. A number is the mean over its seeds, with the
lowest and the highest in brackets where there are several.

A claim is a list of checks, each a number with a bound (`benchmarks/results/claims.py`). The bounds are ours. The
paper's model is a thousand times as large, so "equal" is read as within 5 % (2 % for short texts), "stays" as within
10 %, "breaks" as 1.5 times; where the paper has a ratio of its own, the bound is a weaker one. **Holds**: every check
that has a number holds for every seed. **Not at this scale**: no check holds for any seed. **Holds in part**: anything
between. **Not tested**: no check has a number yet. Checks of the untuned model alone are premises: they do not affect
the verdict and are not counted.
"""
COMMANDS = (
    "In the commands, RUN is the folder of the arm's own run, and `{NAME}` that of arm NAME's. Trainings had "
    "`trainer.checkpoint_every_n_steps=null` besides."
)
PICTURE = "docs/images/default.png"  # of docs/TINY.md
EQUAL = 1.1  # times as long is called equal
MANY = "†"  # behind the name of a row
BEGIN, END = "<!-- from python -m benchmarks.results: {} -->", "<!-- until here: {} -->"


# ----- numbers in words -----


def number(value: float, metric: str) -> str:
    """As it is read: keys in percent, perplexities to a tenth."""
    if "passkey@" in metric:
        return f"{100 * value:.0f}"
    if "ppl@" in metric:
        return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def half_digit(value: float, metric: str) -> float:
    """Half a unit of the last digit that `number` shows."""
    if "passkey@" in metric:
        return 0.005
    return 0.05 if "ppl@" in metric and value < 1000 else 0.5 if abs(value) >= 100 else 0.005


def rounding(value: float, metric: str) -> float:
    """How far a number may be from that of a single run with the same seed, on another processor or with other code.

    The most that ten methods showed between a CPU and a GPU (docs/METHODS.md, "How far needle gain is noise"). Not
    compared there, and so our choice: passkeys, four of 20 prompts, and the share of needle gain, 0.81 of about 2 nats.
    """
    largest = {"needle_gain_kept@": 0.4, "needle_gain@": 0.81, "passkey@": 0.2, "ppl@": 1.3 / 48 * value}
    return next((bound for family, bound in largest.items() if family in metric), 0.0)


def spread(values: Sequence[float], form) -> str:
    """Mean, lowest and highest; one value by itself.

    Args:
        values: one a seed.
        form: puts a number into words.
    """
    if not values:
        return "–"
    mean, low, high = form(statistics.mean(values)), form(min(values)), form(max(values))
    return mean if low == high else f"{mean} ({low}–{high})"


def cell(runs: Runs, arm: Arm, metric: str) -> str:
    """A metric over the seeds of an arm; a dash where there is none."""
    return spread(values(runs, arm, metric), lambda value: number(value, metric))


def values(runs: Runs, arm: Arm, metric: str) -> list[float]:
    """A metric of each seed of an arm that has been run, and has it."""
    found = []
    for seed in arm.seeds:
        try:
            found.append(Numbers(runs, {arm.name: arm}, seed)(arm.name, metric))
        except Missing:
            continue
    return found


def _num_runs(runs: Runs, arm: Arm) -> str:
    return str(sum((arm.name, seed) in runs for seed in arm.seeds))


def is_begun(runs: Runs, arm: Arm) -> bool:
    """Whether any seed of an arm has been run."""
    return any((arm.name, seed) in runs for seed in arm.seeds)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ----- docs/RESULTS.md -----


def results(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> str:
    """The whole page.

    Args:
        runs: those that are still current.
        arms: all, by name.
        scale: of the claims.
    """
    found = {claim.name: (claim, checked(claim, runs, arms, scale.seeds)) for claim in claims(scale).values()}
    summary = table(
        ["claim", "verdict", "checks that hold", "runs"],
        (
            [f"[{claim.title}](#{anchor(claim.title)})", f"**{verdict(one)}**", _tally(one), _count(claim, runs, arms)]
            for claim, one in found.values()
        ),
    )
    sections = [_section(claim, one, runs, arms) for claim, one in found.values()]
    names = {name: None for claim, _ in found.values() for name in claim.arms}
    listed = table(["arm", "seeds", "commands"], ([f"`{n}`", _seeds(runs, arms[n]), _commands(arms[n])] for n in names))
    parts = [HEAD.strip(), summary, *sections, *_real(), "## The runs", COMMANDS, _machines(runs, names), listed]
    return "\n\n".join(parts) + "\n"


def _real() -> list[str]:
    """The claims that were asked of a real model, from what benchmarks.smollm2 keeps of it."""
    lines = smollm2.verdicts(load_json(smollm2.FOUND, required={"rows": list})["rows"])
    told = (
        "The checks of Table 1 (perplexity at the target), Figure 2 (passkeys) and Table 3 (perplexity inside the "
        "window) for SmolLM2-135M: every scaled or trained model whose perplexity was measured on the same tokens as "
        "the untuned model's, on an H100 in bf16 or on an AMD EPYC in fp32. These numbers are of smollm2.json, not of "
        "runs.json; machines, commits and commands: [SMOLLM2.md](SMOLLM2.md#what-came-of-it), which also says how much "
        "scaling alone does, how much is adaptation to the domain of the texts, and what was measured of other models."
    )
    return ["## On a real model", told, *lines] if lines else []


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def command(arm: Arm) -> str:
    """Of an arm, for all its seeds; {NAME} is the folder of another arm's run."""
    script = ["-m", SEARCH] if arm.script == SEARCH else [arm.script]
    many = ["-m"] if len(arm.seeds) > 1 else []
    seeds = [] if arm.script == EVALUATE else [f"seed={','.join(map(str, arm.seeds))}"]
    steps = ["trainer.max_steps=STEPS"] if arm.as_long else []
    exact = [EXACT] if arm.script == EVALUATE else []
    return shlex.join(["python", *script, *arm.overrides, *steps, *exact, *many, *seeds]).replace("|", "\\|")


def _commands(arm: Arm) -> str:
    """Of its runs, and of what is measured of each besides."""
    given = next((override for override in arm.overrides if override.startswith("ckpt=")), "ckpt=RUN")
    more = (shlex.join(["python", EVALUATE, given, *overrides, EXACT]) for overrides in arm.also.values())
    return "; ".join(f"`{one}`" for one in (command(arm), *more))


def _seeds(runs: Runs, arm: Arm) -> str:
    """Those that have been run, and those that have not."""
    done = ", ".join(str(seed) for seed in arm.seeds if (arm.name, seed) in runs)
    left = ", ".join(str(seed) for seed in arm.seeds if (arm.name, seed) not in runs)
    return done + f"{' ' * bool(done)}(not run: {left})" * bool(left)


def _tally(found: Sequence[Checked]) -> str:
    counted = [one for one in found if not one.check.is_premise]
    tested = [one for one in counted if one.share is not None]
    held, left = sum(one.share == 1 for one in tested), len(counted) - len(tested)
    return f"{held} of {len(tested)}" + (f"; {left} not tested" if left else "")


def _count(claim: Claim, runs: Runs, arms: Mapping[str, Arm]) -> str:
    every = [(name, seed) for name in claim.arms for seed in arms[name].seeds]
    return f"{sum(run in runs for run in every)} of {len(every)}"


def _section(claim: Claim, found: Sequence[Checked], runs: Runs, arms: Mapping[str, Arm]) -> str:
    verdict_of = verdict(found)
    parts = [
        f"## {claim.title}",
        f"**{verdict_of[:1].upper()}{verdict_of[1:]}.**",
        f"*The paper.* {claim.paper} *Here.* {claim.ours}",
        table(["check", "bound", "paper", "here", "holds"], map(_check, found)),
        _numbers(claim, runs, arms),
    ]
    if missing := [name for name in claim.arms if not is_begun(runs, arms[name])]:
        parts.append(f"Not run yet: {', '.join(f'`{name}`' for name in missing)}.")
    lines = [f"python -m benchmarks.results --only {claim.name}", *claim.commands]
    parts.append("```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(filter(None, parts))


def _check(one: Checked) -> list[str]:
    check, form = one.check, one.check.form
    unit = 100 if form.endswith("%") else 1
    rounded = [float(f"{value:{form}}".rstrip("%")) / unit for value in one.values]
    if any(check.holds(a) != check.holds(b) for a, b in zip(one.values, rounded, strict=True)):
        form = f".{int(form[1]) + 1}{form[2:]}"  # rounding would hide on which side of the bound it is
    ours = spread(one.values, lambda value: f"{value:{form}}")
    ours += "".join(f"; `{arm}`: one run" for arm in one.once)
    held = sum(map(check.holds, one.values))
    holds = {None: "not tested", 1: "yes", 0: "no"}.get(one.share, f"for {held} of {len(one.values)} seeds")
    return [check.says, check.bound(), check.paper or "–", ours, holds + " (premise)" * check.is_premise]


def _numbers(claim: Claim, runs: Runs, arms: Mapping[str, Arm]) -> str:
    """The table of a claim; "" where none of its arms has been run. Costs are of one kind of processor.

    They are shown of arms that measure nothing else: others have batches of another size, and are compiled.
    """
    processor = _processor(runs, claim.arms)
    alike = {run: one for run, one in runs.items() if one["processor"] == processor}

    def shown(name: str, metric: str) -> Runs:
        is_cost = metric.startswith(COSTS_OF)
        return {} if is_cost and not name.startswith("cost.") else alike if is_cost else runs

    is_measured = not all(metric.startswith("coverage/") for metric in claim.columns.values())  # which is arithmetic
    rows = [
        [label + MANY * (is_measured and len(_processors(runs, name)) > 1), _num_runs(runs, arms[name]),
         *(cell(shown(name, metric), arms[name], metric) for metric in claim.columns.values())]
        for label, name in claim.rows.items() if is_begun(runs, arms[name])
    ]  # fmt: skip
    said = f"\n\n{MANY} seeds on several kinds of processors: the spread includes their difference."
    marked = any(label.endswith(MANY) for label, *_ in rows)
    return table(["", "runs", *claim.columns], rows) + said * marked if rows else ""


def _processors(runs: Runs, name: str) -> set[str]:
    return {one["processor"] for (of, _), one in runs.items() if of == name}


def _machines(runs: Runs, names: Iterable[str]) -> str:
    """With what the runs of some arms were made."""
    wanted = set(names)
    found = [one for (name, _), one in runs.items() if name in wanted]
    if not found:
        return f"No runs yet of the base model whose weights' SHA-256 begins with `{base_model()}`."
    facts = {
        "commit": {str(one["commit"]) for one in found},
        "torch": {str(one["torch"]) for one in found},
        "date": {one["date"] for one in found},
    }
    on = Counter(one["processor"] for one in found)
    where = ", ".join(f"{num} on {name}" for name, num in sorted(on.items())) if len(on) > 1 else f"on {next(iter(on))}"
    compiled = {one["is_compiled"] for one in found if one["training"]}
    said = "; ".join(f"{key} {', '.join(sorted(of))}" for key, of in facts.items())
    steps = "not compiled" if not any(compiled) else "compiled" if all(compiled) else "partly compiled"
    steps += " (`trainer.compile=true`)" * any(compiled)
    said += " (+: with changes that were not committed)" * any(one.endswith("+") for one in facts["commit"])
    return (
        f"{len(found)} run{'s' * (len(found) > 1)} ({where}), one CPU thread each (`num_threads=1`), training steps "
        f"{steps}; "
        f"{said}. The base model's weights: SHA-256 `{base_model()}`..."
    )


# ----- docs/METHODS.md -----


def method_tables(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> dict[str, str]:
    """The tables of docs/METHODS.md by the name of their place."""
    found = {f"methods{times}x": _methods(runs, arms, scale, times) for times in METHOD_LENGTHS}
    found["candidate"] = _candidate(runs, arms, scale)
    found["distilled"] = _distilled(runs, arms, scale)
    found["lr"] = _rates(runs, arms, scale)
    found["search"] = _searches(runs, arms, scale)
    return found


def _methods(runs: Runs, arms: Mapping[str, Arm], scale: Scale, times: int) -> str:
    def of(name: str) -> Arm:
        return arms[f"{name}.{times}x"]

    used = arms_of_methods(scale)[f"methods{times}x"]
    processor = _processor(runs, used)

    def rows(beside: Mapping[str, str | None]) -> str:
        told = {
            name: "untuned" if name == "untuned_books" else _named(name, methods(scale, times).get(name, ()))
            for name in beside
        }
        pairs = {told[name]: (of(name), other and of(other)) for name, other in beside.items()}
        return _compared(runs, arms, scale, times, pairs, processor)

    machines = _machines(runs, used)
    if not any(is_begun(runs, arms[name]) for name in used):
        return machines
    names = dict.fromkeys(methods(scale, times), "lm")
    slower = {"lm": None, **{f"{name}{SECONDS}": "lm" for name in COSTS}, "lm_as_searched": None,
              **dict.fromkeys(_searched(scale, times), "lm_as_searched")}  # fmt: skip
    is_timed = any(is_begun(runs, of(name)) for name in slower if name not in names)
    return "\n\n".join(
        [
            f"Equal tokens; minutes: training steps and any search, on the processor that most runs used. {machines}",
            rows({"untuned_books": None} | names | {"lm": None}),
            f"Equal seconds: `{SECONDS}` has as many steps as fit into `lm`'s time, and `lm_as_searched` as many as "
            "fit into that of a search and the training after it. Searched methods are compared with `lm_as_searched` "
            "here.",
            rows(slower) if is_timed else "Not run yet.",
            f"{_rule(scale, times)} {_best(runs, arms, scale, times)}",
        ]
    )


def _named(name: str, overrides: Sequence[str]) -> str:
    """A method, with what its command has more than lm's."""
    return f"`{name}`" + (f" (`{_short(' '.join(overrides))}`)" if overrides else "")


def _compared(
    runs: Runs, arms: Mapping[str, Arm], scale: Scale, times: int, pairs: Mapping[str, tuple[Arm, Arm | None]],
    processor: str, first: str = "lm",
) -> str:  # fmt: skip
    """Arms by what they are called, each against another or none; those of which nothing is run are named below."""
    lengths = scale.lengths(*METHOD_LENGTHS[times])
    gain, short = f"needle_gain@{lengths[-1]}", f"tail_ppl@{lengths[0]}"
    columns = {
        **{f"ppl@{n:,}": f"tail_ppl@{n}" for n in lengths},
        **{f"passkey@{n:,}": f"passkey@{n}" for n in lengths},
        **{f"needle gain@{n:,}": f"needle_gain@{n}" for n in lengths},
    }
    found = []
    for told, (arm, other) in pairs.items():
        if not is_begun(runs, arm):
            continue
        cost = spread([seconds / 60 for seconds in _seconds(runs, arms, arm, processor)], lambda value: f"{value:.1f}")
        against = "–" if other is None else _against(runs, arm, other, gain, short)
        steps = spread(values(runs, arm, "training/steps"), lambda value: f"{value:.0f}")
        cells = (cell(runs, arm, metric) for metric in columns.values())
        found.append([told, _num_runs(runs, arm), steps, cost, *cells, against])
    if not found:
        return "Not run yet."
    missing = [told for told, (arm, _) in pairs.items() if not is_begun(runs, arm)]
    below = f"\n\nNot run yet: {', '.join(missing)}." if missing else ""
    return table(["", "runs", "steps", "minutes", *columns, f"against {first}"], found) + below


def _rule(scale: Scale, times: int, first: str = "lm") -> str:
    """By which methods are told apart."""
    lengths = scale.lengths(*METHOD_LENGTHS[times])
    return (
        f"Against {first}: the difference of the mean needle gains at {lengths[-1]:,} tokens, with its 95 % interval "
        f"(Welch's t). It is **better** or worse where the interval excludes 0, not significant elsewhere. Perplexity "
        f"at {lengths[0]} tokens is higher or lower by the same rule; – where the two do not both have three seeds on "
        "the same kind of processor. No correction is made for the number of comparisons."
    )


def _candidate(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> str:
    """What became the default against lm, on seeds that had no part in the choice."""
    return _on_seeds(runs, arms, scale, "candidate", "lm", {times: candidates(times) for times in METHOD_LENGTHS})


def _distilled(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> str:
    """The objectives against the default, on the same seeds."""
    found = {
        times: {"far_answers": candidates(times)["far_answers"]} | distilled(times)
        for times in METHOD_LENGTHS
        if distilled(times)
    }
    return _on_seeds(runs, arms, scale, "distilled", "far_answers", found)


def _on_seeds(
    runs: Runs, arms: Mapping[str, Arm], scale: Scale, claim: str, first: str,
    methods_at: Mapping[int, Mapping[str, Sequence[str]]],
) -> str:  # fmt: skip
    """A table a length: the first of some methods, and the others against it."""
    used = arms_of_methods(scale)[claim]
    told = [_machines(runs, used)]
    if not any(is_begun(runs, arms[name]) for name in used):
        return told[0]
    processor = _processor(runs, used)
    for times, every in methods_at.items():
        base = arms[candidate_arm(first, times)]
        pairs = {
            _named(name, of): (arms[candidate_arm(name, times)], None if name == first else base)
            for name, of in every.items()
        }
        seeds = _shared_seeds(runs, {name: arms[candidate_arm(name, times)] for name in every})
        told.append(f"{scale.window} → {scale.at(times):,} tokens, {seeds}. {_rule(scale, times, first)}")
        told.append(_compared(runs, arms, scale, times, pairs, processor, first))
    return "\n\n".join(told)


def _shared_seeds(runs: Runs, of: Mapping[str, Arm]) -> str:
    """Of some methods, by name, those that were run: the seeds of most of them, and where others have more or fewer."""
    done = {name: tuple(seed for seed in arm.seeds if (arm.name, seed) in runs) for name, arm in of.items()}
    done = {name: seeds for name, seeds in done.items() if seeds}
    usual = Counter(done.values()).most_common(1)[0][0] if done else ()
    others: dict[str, list[str]] = {}
    for name, seeds in done.items():
        if seeds != usual:
            more = [seed for seed in seeds if seed not in usual]
            told = f"{_in_words(more)} too" if set(usual) < set(seeds) else f"{_in_words(seeds)} alone"
            others.setdefault(told, []).append(f"`{name}`")
    told = "".join(f"; of {' and '.join(names)} {seeds}" for seeds, names in others.items())
    return f"seeds {_in_words(usual)}{told}"


def _in_words(numbers: Iterable[int]) -> str:
    """As 3, 4, 5."""
    return ", ".join(map(str, numbers))


def _searched(scale: Scale, times: int) -> list[str]:
    """The methods that a search goes before."""
    return [name for name, overrides in methods(scale, times).items() if "rope=searched" in overrides]


def _short(overrides: str) -> str:
    """Without a list of numbers that nobody reads."""
    return re.sub(r"long_factor=\[[^]]*]", "long_factor=[...]", overrides)


def _processor(runs: Runs, names: Iterable[str]) -> str:
    """Of most of the runs of some arms: times of one kind of processor alone are compared."""
    wanted = set(names)
    found = [one["processor"] for (name, _), one in runs.items() if name in wanted]
    return max(sorted(set(found)), key=found.count, default="")


def _seconds(runs: Runs, arms: Mapping[str, Arm], arm: Arm, processor: str) -> list[float]:
    """Of the steps of each seed, and of the search before them; of the runs on a kind of processor."""
    searches = [arms[name] for name in arm.needs() if arms[name].script == SEARCH]
    found = []
    for seed in arm.seeds:
        one = runs.get((arm.name, seed))
        before = [runs.get((search.name, seed_of(search, seed))) for search in searches]
        timed = [each is not None and each["processor"] == processor for each in (one, *before)]
        if one is not None and all(timed) and "step_seconds" in one["training"]:
            steps = one["training"]["steps"] * one["training"]["step_seconds"]
            found.append(steps + sum(search["seconds"] for search in before))
    return found


def compare(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether a mean is above, below, or among what the other may be; "" where either has no three seeds."""
    if (found := difference(mine, theirs)) is None:
        return ""
    _, low, high = found
    return "above" if low > 0 else "below" if high < 0 else "among"


def difference(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float] | None:
    """Of the means, and the bounds of its 95 % interval (Welch 1947); None where either has no three seeds."""
    if min(len(mine), len(theirs)) < 3:
        return None
    found = statistics.mean(mine) - statistics.mean(theirs)
    terms = [(statistics.variance(values) / len(values), len(values) - 1) for values in (mine, theirs)]
    of_both = sum(term for term, _ in terms)
    if of_both == 0:
        return found, found, found
    freedom = of_both**2 / sum(term**2 / free for term, free in terms)
    half = student_95(freedom) * of_both**0.5
    return found, found - half, found + half


def _comparable(runs: Runs, one: Arm, other: Arm) -> Runs:
    """Those on the kind of processor on which both arms have most: another rounds, and may train, otherwise."""
    mine, theirs = (
        Counter(runs[arm.name, s]["processor"] for s in arm.seeds if (arm.name, s) in runs) for arm in (one, other)
    )
    kind, _ = max((mine & theirs).items(), key=lambda found: found[1], default=(None, 0))
    return {key: run for key, run in runs.items() if run["processor"] == kind}


def _against(runs: Runs, arm: Arm, other: Arm, gain: str, short: str) -> str:
    runs = _comparable(runs, arm, other)
    gains, ppls = (compare(values(runs, arm, metric), values(runs, other, metric)) for metric in (gain, short))
    if not gains or not ppls:
        return "–"
    told = {"above": "**better**", "below": "worse", "among": "not significant"}[gains]
    told += {"above": ", ppl higher", "below": ", ppl lower", "among": ""}[ppls]
    if by := difference(values(runs, arm, gain), values(runs, other, gain)):
        told += "; {:+.2f} ({:+.2f} to {:+.2f})".format(*by)
    return told


def _best(runs: Runs, arms: Mapping[str, Arm], scale: Scale, times: int) -> str:
    """The methods that beat lm at equal seconds: in needle gain at the target, perplexity in the window no higher.

    Steps of the same computation are taken as equally long; others are timed.
    """
    lengths = scale.lengths(*METHOD_LENGTHS[times])
    searched = _searched(scale, times)
    same = {name: (name, "lm") for name in methods(scale, times) if name not in ("lm", *COSTS, *searched)}
    same |= {name: (f"{name}{SECONDS}", "lm") for name in COSTS}
    same |= {name: (name, "lm_as_searched") for name in searched}
    winners, is_tested = [], False
    processor = _processor(runs, arms_of_methods(scale)[f"methods{times}x"])
    for name, pair in same.items():
        mine, theirs = (arms[f"{one}.{times}x"] for one in pair)
        both = _comparable(runs, mine, theirs)
        gains, ppls = (compare(values(both, mine, m), values(both, theirs, m))
                       for m in (f"needle_gain@{lengths[-1]}", f"tail_ppl@{lengths[0]}"))  # fmt: skip
        is_tested |= bool(gains)
        if gains == "above" and ppls != "above":
            taken, given = (_seconds(runs, arms, one, processor) for one in (mine, theirs))
            is_timed = mine.as_long or theirs.as_long
            if not is_timed or (taken and given and statistics.mean(taken) <= EQUAL * statistics.mean(given)):
                winners.append(f"`{name}`")
    if not is_tested:
        return "Not run yet."
    names = ", ".join(winners) or "none"
    return f"At equal seconds better in needle gain, with perplexity at the window no higher: {names}."


def _rates(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> str:
    """Needle gain and perplexities by learning rate; which has most gain at the target, and which the tables have."""
    window, *_, target = scale.lengths(*METHOD_LENGTHS[16])
    metrics = f"needle_gain@{target}", f"tail_ppl@{window}", f"tail_ppl@{target}"
    rows = []
    for name in RATE_OF:
        tried = {lr: [values(runs, arms[rate_arm(name, lr)], metric) for metric in metrics] for lr in RATES}
        if found := {lr: [one[0] for one in of if one] for lr, of in tried.items() if of[0]}:
            texts = {lr: "; ".join([f"{of[0]:.2f}", *(f"{ppl:.1f}" for ppl in of[1:])]) for lr, of in found.items()}
            shown = (texts.get(lr, "–") for lr in RATES)
            rows.append([f"`{name}`", *shown, max(found, key=lambda lr: found[lr][0]), RATE_OF[name]])
    told = (
        f"Needle gain at {target:,} tokens; ppl@{window}; ppl@{target:,}, by peak learning rate, seed {LR_SEED}. Best "
        "is by needle gain"
    )
    return f"{told}:\n\n{table(['', *RATES, 'best', 'in the tables'], rows)}" if rows else f"{told}: not run yet."


def _searches(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> str:
    """What was found and the methods without a search, untrained: NLL of needle answers by target."""
    searches = {scale.at(times): runs.get((f"search.{times}x", 0), {}).get("metrics", {}) for times in METHOD_LENGTHS}
    searches = {target: found for target, found in searches.items() if found}
    if not searches:
        return "Not run yet."
    texts = {"searched on": "nll", "held out": "heldout_nll"}
    names = dict.fromkeys(
        key.removesuffix(": nll") for found in searches.values() for key in found if key.endswith(": nll")
    )
    rows = [
        [
            f"`{name}`",
            *(
                number(found[at], key) if (at := f"{name}: {key}") in found else "–"
                for found in searches.values()
                for key in texts.values()
            ),
        ]
        for name in names
    ]
    head = [f"{target:,} tokens, {text}" for target in searches for text in texts]
    return table(["", *head], rows)


# ----- docs/TINY.md, README.md -----


def tiny_tables(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> dict[str, str]:
    """The table of docs/TINY.md by the name of its place."""
    names = arms_of_tiny(scale)
    machines = _machines(runs, names)
    lengths = tiny_lengths(scale)
    columns = _by_length(lengths, {"ppl": "tail_ppl", "passkey": "passkey"})
    columns += _by_length((lengths[0], lengths[-1]), {"needle gain": "needle_gain"})
    rows = _before(runs, arms[names[0]], columns)
    for name in filter(lambda name: is_begun(runs, arms[name]), names):
        marked = " (the default)" if name == names[0] else ""
        rows.append([f"`{name.replace('default.', 'pose=')}`{marked}", *_cells(runs, arms[name], columns)])
    if not rows:
        return {"tiny": machines}
    commands = "\n".join(command(arms[name]) for name in names)
    return {"tiny": f"{table(['', *(head for head, _ in columns)], rows)}\n\n{machines}\n\n```\n{commands}\n```"}


def readme_tables(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> dict[str, str]:
    """What the README says of the default run, by the name of its place."""
    lengths = tiny_lengths(scale)
    arm = arms[arms_of_tiny(scale)[0]]
    if not is_begun(runs, arm):
        return {"default": _machines(runs, [arm.name])}
    own = cell(runs, arm, f"untuned: tail_ppl@{lengths[0]}")
    ppl, key, gain = (
        [cell(runs, arm, f"{model}{metric}@{lengths[-1]}") for model in ("untuned: ", "")]
        for metric in ("tail_ppl", "passkey", "needle_gain")
    )
    return {
        "default": f"Perplexity at {lengths[-1]:,} tokens falls from {ppl[0]} to {ppl[1]}, where the untuned model has "
        f"{own} at {lengths[0]}. Passkeys found there rise from {key[0]} to {key[1]} %, needle gain from "
        f"{gain[0]} to {gain[1]} nats." + _controls(runs, arms, scale)
    }


def _controls(runs: Runs, arms: Mapping[str, Arm], scale: Scale) -> str:
    """The same three numbers of scaling alone and of the training without skips; "" where that has not been run."""
    own, control = (arms[f"default.{name}"] for name in ("pose", "short_pi"))
    if not is_begun(runs, control):
        return ""
    metrics = [f"{metric}@{tiny_lengths(scale)[-1]}" for metric in ("tail_ppl", "passkey", "needle_gain")]
    scaled, short = (
        "{}, {} % and {} nats".format(*(cell(runs, arm, f"{prefix}{metric}") for metric in metrics))
        for arm, prefix in ((own, "scaled: "), (control, ""))
    )
    num = _num_runs(runs, control)
    seeds = f"{num} seed{'s' * (num != '1')}"
    return f" Scaling alone, without training, has {scaled}; the same training without skips ({seeds}) {short}."


def draw(runs: Runs, arms: Mapping[str, Arm], scale: Scale, root: Path):
    """Draws the default run: three metrics by length, mean and range over its seeds. Nothing where it has not been run.

    Args:
        runs: those that are not current any more are left out.
        arms, scale: that they are of.
        root: the folder of the README.
    """
    from pose.evaluation.task import Estimate
    from pose.reporting.plots import plot_results

    now, arm, lengths = current(runs, arms), arms[arms_of_tiny(scale)[0]], tiny_lengths(scale)
    panels = ("tail_ppl", "passkey", "needle_gain")
    results: dict[str, dict[str, Estimate]] = {}
    for model, prefix in {"untuned": "untuned: ", "scaled": "scaled: ", "extended": ""}.items():
        found = {f"{panel}@{n}": values(now, arm, f"{prefix}{panel}@{n}") for panel in panels for n in lengths}
        results[model] = {m: Estimate(statistics.mean(v), min(v), max(v), len(v)) for m, v in found.items() if v}
    plot_results(results, root / PICTURE, lengths[0], panels, lengths[-1])


Columns = list[tuple[str, str]]  # heads and metrics


def _by_length(lengths: Sequence[int], metrics: Mapping[str, str]) -> Columns:
    """Columns of metrics; lengths after the first stand without a name."""
    return [(f"{name if n == lengths[0] else ''}@{n:,}", f"{metric}@{n}")
            for name, metric in metrics.items() for n in lengths]  # fmt: skip


def _cells(runs: Runs, arm: Arm, columns: Columns, model: str = "") -> list[str]:
    return [cell(runs, arm, model + metric) for _, metric in columns]


def _before(runs: Runs, arm: Arm, columns: Columns) -> list[list[str]]:
    """The rows of the model as it is, and of it with its RoPE rescaled; none where no run has measured them."""
    models = {"untuned": "untuned: ", "scaled, nothing trained": "scaled: "}
    rows = [[label, *_cells(runs, arm, columns, model)] for label, model in models.items()]
    return [row for row in rows if set(row[1:]) != {"–"}]


# ----- files -----


def placed(text: str, tables: Mapping[str, str], name: str) -> str:
    """A document with tables at their places.

    Args:
        text: of the document.
        tables: by the names of their places.
        name: of the document, for errors.

    Raises:
        DataError: it has no place for one.
    """
    for place, content in tables.items():
        begin, end = BEGIN.format(place), END.format(place)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise DataError(f"{name} has no place for {place}: put {begin} and {end} there, each on a line of its own")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


TABLES = {"METHODS.md": method_tables, "TINY.md": tiny_tables, "../README.md": readme_tables}


def pages(runs: Runs, arms: Mapping[str, Arm], scale: Scale, texts: Mapping[str, str]) -> dict[str, str]:
    """RESULTS.md, and the pages that have tables, by their paths from docs/ on.

    Args:
        runs: by arm and seed; those that are not current any more are left out.
        arms, scale: that they are of.
        texts: the pages of `TABLES` as they are.
    """
    now = current(runs, arms)
    return {"RESULTS.md": results(now, arms, scale)} | {
        name: placed(texts[name], tables(now, arms, scale), name) for name, tables in TABLES.items()
    }


def write(docs: Path, content: Mapping[str, str]):
    """Writes pages, whose paths begin in a folder."""
    for name, text in content.items():
        with atomic_file(docs / name) as file:
            file.write(text)
