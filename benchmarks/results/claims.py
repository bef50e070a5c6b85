"""What is claimed, by which arms it is told."""

from benchmarks.results.arms import COST_TARGETS, COSTS, METHOD_LENGTHS, RATES, Scale, methods


def arms_of(scale: Scale) -> dict[str, tuple[str, ...]]:
    """The arms of each claim, by its name."""
    found = {
        "table1": ("untuned.8x", "untuned.16x", "linear.full_tokens.8x", "linear.full.8x", "linear.randpos.8x",
                   "linear.randpos.16x", "linear.pose.8x", "linear.pose.16x"),
        "fig2": ("untuned.8x", "untuned.16x", "linear.pose.8x", "linear.pose.16x", "linear.long.8x", "yarn.pose.8x"),
        "fig3": (*(f"cost.{pose}.{times}x" for pose in ("pose", "full") for times in COST_TARGETS), "linear.pose.8x",
                 "linear.full.8x"),
        "fig4": ("untuned.8x", "linear.pose.8x", "ntk.pose.8x", "yarn.pose.8x",
                 *(f"{rope}.{family}" for family in ("phi", "qwen3") for rope in ("untuned", "linear", "ntk", "yarn"))),
        "table2": tuple(f"{rope}.pose.{times}x" for times in (32, 64) for rope in ("linear", "ntk", "yarn")),
        "table3": ("untuned.8x", "linear.full_tokens.8x", "linear.pose.8x", "ntk.pose.8x", "yarn.pose.8x"),
        "table4": ("linear.pose.8x", "linear.contiguous.8x", "linear.aligned.8x"),
        "table5": ("untuned.8x", "linear.short.8x", "linear.pose.8x", "linear.n3.8x", "linear.randpos.8x"),
        "fig5": ("linear.short.8x", "linear.pose.8x", "linear.n3.8x", "linear.randpos.8x"),
    }  # fmt: skip
    for times in METHOD_LENGTHS:
        names = ("untuned_books", "search", *methods(scale, times), *(f"{name}_seconds" for name in COSTS),
                 "lm_as_searched")  # fmt: skip
        found[f"methods{times}x"] = tuple(f"{name}.{times}x" for name in names)
    rated = ("lm", "self_distill", "long_short", "searched", "searched_mixed")
    found["lr"] = tuple(f"lr.{name}.{lr.replace('.', '_')}" for name in rated for lr in RATES)
    return found
