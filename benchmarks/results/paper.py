"""The paper's own figures (Zhu et al., arXiv 2309.10400), as printed there; what is told of them is worked out."""

BROKEN = 1000.0  # "> 10^3"
# Table 1, reports (GovReport) and proofs (Proof-pile) at 2k, 4k, 8k, 16k, 32k; LLaMA-7B, linear interpolation
LENGTHS = (2, 4, 8, 16, 32)
TABLE_1 = {
    "reports": {
        "none": (4.74, BROKEN, BROKEN, BROKEN, BROKEN), "full 16k": (4.87, 4.70, 4.61, 4.59),
        "randpos 16k": (11.63, 11.17, 11.54, 15.16), "randpos 32k": (93.43, 95.85, 91.79, 93.22, 97.57),
        "pose 16k": (4.84, 4.68, 4.60, 4.60), "pose 32k": (4.91, 4.76, 4.68, 4.64, 4.66),
    },
    "proofs": {
        "none": (2.83, BROKEN, BROKEN, BROKEN, BROKEN), "full 16k": (2.93, 2.71, 2.58, 2.53),
        "randpos 16k": (7.26, 6.83, 6.76, 7.73), "randpos 32k": (60.74, 63.54, 60.56, 63.15, 66.47),
        "pose 16k": (2.95, 2.74, 2.61, 2.60), "pose 32k": (3.01, 2.78, 2.66, 2.60, 2.59),
    },
}  # fmt: skip
# Table 2, PG-19, at 32k, 64k, and the target
TABLE_2 = {
    "96k": {"linear": (10.18, 11.11, 13.57), "ntk": (7.98, 20.39, 38.73), "yarn": (8.31, 8.65, 9.36)},
    "128k": {"linear": (16.90, 22.47, 31.18), "ntk": (8.04, 14.84, 34.80), "yarn": (9.32, 10.36, 11.33)},
}
# Table 4, at 16k: the content of the chunks
TABLE_4 = {
    "reports": {"random": 4.60, "contiguous": 4.68, "aligned": 4.60},
    "proofs": {"random": 2.60, "contiguous": 2.61, "aligned": 2.56},
}
# Table 5, proofs at 16k, by number of chunks
TABLE_5 = {"1": BROKEN, "2": 2.60, "3": 2.59, "all": 7.73}


def table_1(text: str, method: str, kilo: int) -> float:
    """A figure of Table 1, by method and length in thousands of tokens."""
    return TABLE_1[text][method][LENGTHS.index(kilo)]


def over(value: float, other: float) -> str:
    """A ratio in words; of a broken model a bound."""
    return f"{'> ' * (value == BROKEN)}{value / other:.{0 if value == BROKEN else 2}f}"
