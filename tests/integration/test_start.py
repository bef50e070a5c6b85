"""What a user does before a run starts takes no time: help, a look at the config, a misspelt key."""

import pytest

pytestmark = pytest.mark.slow
HEAVY = {"torch", "transformers", "lightning", "datasets", "peft", "matplotlib", "scipy", "deepspeed", "lm_eval"}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("train.py", "--help"), 0, "rope: cope, drope, dynamic"),
        (("train.py", "--cfg", "job"), 0, "target_len: 2048"),
        (("train.py", "trainer.max_stepz=3"), 1, "max_stepz"),
        (("train.py", "rope=nope"), 1, "nope"),
        (("evaluate.py", "--help"), 0, "eval: books"),
        (("evaluate.py", "--cfg", "job"), 0, "batch_tokens: null"),
        (("evaluate.py", "eval.lengths=long"), 1, "long"),
        (("-m", "pose.coverage", "--help"), 0, "target_len"),
        (("-m", "pose.evaluation.ruler", "--help"), 0, "--length"),
        (("-m", "pose.modeling.legacy", "--help"), 0, "--yarn"),
        (("-m", "pose.modeling.checkpoints.gguf", "--help"), 0, "source"),
        (("-m", "pose.data.tokenizer", "--help"), 0, "--vocab-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nothing_heavy_is_imported_before_config_or_arguments_stand(script, arguments, status, words):
    result = script("-X", "importtime", *arguments, fresh=True)
    lines = result.stderr.splitlines()
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    others = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert result.returncode == status and words in result.stdout + others
    assert "pose" in imported and not imported & HEAVY
