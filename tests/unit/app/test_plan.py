"""`python -m pose.plan`, and what train.py says at its start: from overrides to a plan."""

import gc
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from benchmarks.memory import cpu_peak
from pose.app import models, plan, preflight, schema
from pose.app.build import build_trainer
from pose.app.holding import check_holding, check_teacher
from pose.app.run import Run
from pose.app.shapes import SHAPES, geometry_of
from pose.app.targets import make
from pose.errors import ConfigError
from pose.modeling.load import load_config
from pose.plan import GPUS, PARTS, advise, fits
from pose.rope import RopeGeometry
from pose.training.objectives import Objective

ROOT = Path(__file__).resolve().parents[3]
# What the repositories of the hub state
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "llama7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "gemma_7b": 8_537_680_896,
    "phi_2": 2_779_683_840,
    "gptj_6b": 6_050_882_784,
    "baichuan2_7b": 7_505_973_248,
    "tiny": 5_900_000,
}


def planned(*overrides):
    return plan.plan(plan.compose_config(list(overrides)))


@pytest.mark.parametrize("choice", sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml")))
def test_every_ready_model_is_planned_without_network(choice):
    if choice == "local":
        pytest.skip("it has no model of its own")
    training = planned(f"model={choice}", "pose.target_len=262144", "pose.train_len=2048")
    tolerance = 0.01 if choice == "tiny" else 0
    assert training.shape.num_parameters == pytest.approx(PARAMETERS[choice], rel=tolerance)


def test_ready_models_are_those_with_a_shape():
    paths = {planned_path(file.stem) for file in (ROOT / "conf" / "model").glob("*.yaml")}
    assert paths - {None, "assets/tiny"} == set(SHAPES)


def planned_path(choice: str) -> str | None:
    return plan.compose_config([f"model={choice}"]).model.path


def test_overrides_reach_the_plan():
    training = planned(
        "model=llama7b", "pose.target_len=32768", "strategy=zero3_offload", "trainer.devices=8",
        "trainer.num_nodes=2", "finetune=lora", "finetune.lora.target_modules=[q_proj]", "trainer.max_steps=10",
        "model.attention=eager", "trainer.precision=32",
    )  # fmt: skip
    assert (training.strategy, training.offload_optimizer, training.offload_parameters) == ("zero3", True, True)
    assert (training.devices, training.micro_batch, training.global_batch, training.max_steps) == (16, 1, 64, 10)
    assert (training.train_len, training.target_len, training.gradient_checkpointing) == (2048, 32768, True)
    assert (training.rank, training.targets, training.attention) == (8, ("q_proj",), "eager")
    assert training.precision == "32-true"
    assert planned("model=llama7b", "pose=full", "pose.target_len=4096").train_len == 4096
    assert planned("trainer.accelerator=cpu").precision == "32-true"
    assert planned("strategy=fsdp", "trainer.devices=[0,1]").devices == 2


def test_random_weights_and_folders_are_planned(tmp_path):
    assert planned("experiment=shape_7b").shape.layer_matrices == 4 * 4096**2 + 3 * 4096 * 11008
    (tmp_path / "config.json").write_text((ROOT / "assets" / "tiny" / "config.json").read_text())
    folder = planned("model=local", f"model.path={tmp_path}", "pose.target_len=2048")
    assert folder.shape == planned("model=tiny").shape


def test_the_command_prints_a_table_and_what_to_change(capsys):
    plan.main(["model=llama7b", "pose.target_len=32768"])
    shown = capsys.readouterr().out
    parts = [plan.LABELS.get(part, part) for part in PARTS]
    for words in ("6,738,415,616 parameters", "FLOPs a token", *parts, "full length", "does not fit", "finetune=lora"):
        assert words in shown
    assert "of GPU time" not in shown, "on one device it is the time"
    assert all(gpu.name in shown for gpu in GPUS)


def test_gpu_time_is_shown_where_there_are_several(capsys):
    plan.main(["model=llama7b", "pose.target_len=32768", "strategy=fsdp", "trainer.devices=8"])
    assert "of GPU time)" in capsys.readouterr().out


def test_the_command_prints_one_line_of_json(capsys):
    plan.main(["model=llama7b", "--json", "pose.target_len=32768", "strategy=zero3", "trainer.devices=8", "--mfu=0.5"])
    line = capsys.readouterr().out
    found = json.loads(line)
    assert line.count("\n") == 1
    training = planned("model=llama7b", "pose.target_len=32768", "strategy=zero3", "trainer.devices=8")
    assert found["flops_per_token"] == training.flops_per_token
    assert set(found["memory_gib"]) == {*PARTS, "total"}
    assert found["hours"]["H100"] == pytest.approx(training.hours(GPUS[1], 0.5))


def test_the_largest_micro_batch_is_planned(capsys):
    """That of the first GPU; one more would not fit, by the same estimate."""
    overrides = ("model=llama7b", "finetune=lora", "pose.target_len=16384", "trainer.global_batch=64")
    training = planned(*overrides, "trainer.micro_batch=auto")
    number, said = training.micro_batch, capsys.readouterr().out
    assert f"trainer.micro_batch=auto: this plan is for {number}." in said and "on RTX 4090" in said
    assert 1 < number < 64 and fits(training, GPUS[0])
    assert not fits(planned(*overrides, f"trainer.micro_batch={2 * number}"), GPUS[0])
    assert planned(*overrides, f"trainer.micro_batch={number}") == training
    assert planned(*overrides, "trainer.micro_batch=auto", "trainer.accelerator=cpu").micro_batch == 1
    full = planned("model=llama7b", "pose.target_len=16384", "trainer.micro_batch=auto")
    assert full.micro_batch == 1 and not fits(full, GPUS[0]), "where none fits"
    three = planned(*overrides[:3], "trainer.global_batch=12", "trainer.devices=4", "trainer.micro_batch=auto")
    assert three.micro_batch == 3, "a divisor of what one device gets"
    plan.main([*overrides, "trainer.micro_batch=auto", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["micro_batch"] == number


def test_objectives_of_two_views():
    """Half the micro-batch; of PoSE's two chunks half of the tokens come after the skip."""
    overrides = ("model=llama7b", "pose.target_len=16384", "trainer.micro_batch=8", "trainer.global_batch=16")
    lm = planned(*overrides)
    assert (lm.objective, lm.micro_batch, lm.skipped) == ("lm", 8, 0)
    distilled = planned(*overrides, "objective=self_distill")
    assert (distilled.objective, distilled.micro_batch, distilled.num_compared) == ("self_distill", 4, 0)
    beyond = planned(*overrides, "objective=self_distill", "trainer.micro_batch=64", "trainer.global_batch=16")
    assert beyond.micro_batch == 16, "as train.py takes them: both views of all examples of a device are below 64"
    assert distilled.skipped == pytest.approx(0.5, abs=0.05)
    assert planned(*overrides, "objective=self_distill") == distilled, "always the same"
    short = planned(*overrides, "objective=long_short", "pose=randpos")
    assert (short.objective, short.num_compared, short.original_bytes) == ("long_short", 5, 2)
    assert short.skipped > 0.99, "each position is drawn"
    weightless = planned(*overrides, "objective=self_distill", "objective.weight=0")
    assert weightless == lm, "one view"
    assert short.views_share and planned(*overrides, "objective=long_short", "rope=yarn").views_share


@pytest.mark.parametrize("model", ["llama7b", "tiny"])
@pytest.mark.parametrize(
    ("rope", "share"),
    [
        (["rope=dynamic"], False),
        (["rope=longrope", f"rope.long_factor={[2.0] * 64}"], False),
        (["rope=longrope", f"rope.long_factor={[2.0] * 64}", f"rope.short_factor={[2.0] * 64}"], True),
        (["rope=ntk"], True),
    ],
)
def test_views_whose_frequencies_differ_are_computed_in_full(model, rope, share):
    """Of a ready model, of which there is no config to scale, as of one in a folder."""
    rope = [one.replace(str([2.0] * 64), str([2.0] * 32)) if model == "tiny" else one for one in rope]
    overrides = [f"model={model}", "pose.target_len=16384", "objective=self_distill", *rope]
    training = planned(*overrides, "pose=end_anchor")
    assert training.views_share is share
    assert (training.flops_per_token > 1.5 * planned(*overrides[:2]).flops_per_token) is not share


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=llama7b"],
        ["model=llama7b", "objective=self_distill", "trainer.micro_batch=4"],
        ["model=llama3_8b", "model.gradient_checkpointing=false", "trainer.micro_batch=8", "trainer.precision=32-true"],
        ["model=gemma_7b", "strategy=zero2", "trainer.devices=2", "model.attention=eager"],
        ["model=llama3_8b", "finetune.optimizer=adamw8bit", "trainer.micro_batch=8"],
        ["model=llama3_8b", "finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16", "trainer.micro_batch=8"],
        ["model=llama3_8b", "finetune=qlora", "trainer.micro_batch=64"],
        ["model=llama3_8b", "objective=long_short", "trainer.micro_batch=8"],
        ["model=llama3_8b", "trainer.precision=16-mixed", "trainer.micro_batch=8"],
    ],
)
def test_what_to_change_is_what_train_takes(overrides):
    """Every piece of advice, typed behind the command, is planned as it was said."""
    overrides = [*overrides, "pose.target_len=16384", "pose.train_len=4096"]
    training, tried = planned(*overrides), set()
    for gpu in GPUS:
        for one in advise(training, gpu):
            if one.overrides not in tried:
                assert planned(*overrides, *one.overrides).memory["total"] == pytest.approx(one.total)
                tried.add(one.overrides)
    assert tried


def test_advice_is_of_the_weights_that_the_checkpoint_has(tmp_path):
    """In fp32 frozen ones stay in fp32, and what is not quantised too."""
    config = json.loads((ROOT / "assets" / "tiny" / "config.json").read_text())
    config |= {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        given = ("model=local", f"model.path={folder}", "pose.target_len=16384", "pose.train_len=256")
        training = planned(*given)
        by_name = {one.overrides: one for one in advise(training, GPUS[0])}
        lora, qlora = by_name["finetune=lora",], by_name["finetune=qlora",]
        assert lora.total == planned(*given, "finetune=lora").memory["total"]
        assert qlora.total == planned(*given, "finetune=qlora").memory["total"]


@pytest.mark.parametrize(
    ("given", "num_bytes"),
    [
        (("model=gptj_6b",), 4),
        (("model=llama7b",), 2),
        (("model=phi_2",), 2),
        (("model=local", "model.path=FOLDER"), 4),  # a config that does not say is of fp32
    ],
)
def test_frozen_weights_have_the_bits_of_the_checkpoint(given, num_bytes, tmp_path):
    write_gptj(tmp_path)
    given = [one.replace("FOLDER", str(tmp_path)) for one in given]
    assert planned(*given, "finetune=lora", "pose.target_len=16384").frozen_bytes == num_bytes


def test_a_folder_of_another_form_keeps_its_dtype(tmp_path):
    """GPT-J is read as Phi; the plan and the first lines of train.py know the bits of its weights."""
    for dtype, num_bytes in (("float16", 2), ("float32", 4)):
        write_gptj(tmp_path, torch_dtype=dtype)
        assert load_config(str(tmp_path)).dtype == getattr(torch, dtype)
        given = (f"model.path={tmp_path}", "finetune=lora", "pose.target_len=16384")
        assert planned("model=local", *given).frozen_bytes == num_bytes


def write_gptj(folder: Path, **more):
    config = {"model_type": "gptj", "n_embd": 4096, "n_layer": 2, "n_head": 16, "rotary_dim": 64, "n_positions": 2048}
    (folder / "config.json").write_text(json.dumps(config | more))


def test_ready_models_rotate_as_their_configs_say():
    """GPT-J turns 64 of the 256 dimensions of a head, Phi-2 32 of 80 (their config.json on the hub)."""
    found = {name: geometry_of(shape) for name, shape in SHAPES.items()}
    assert found["EleutherAI/gpt-j-6b"] == RopeGeometry(10_000.0, 64, 2048)
    assert found["microsoft/phi-2"] == RopeGeometry(10_000.0, 32, 2048)
    assert found["meta-llama/Meta-Llama-3-8B"] == RopeGeometry(500_000.0, 128, 8192)
    assert found["google/gemma-7b"].dim == 256 and found["Qwen/Qwen3-8B-Base"].dim == 128
    searched = yaml.safe_load((ROOT / "assets" / "factors" / "smollm2_135m_32k.yaml").read_text())["searched_for"]
    smollm2 = found["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert (smollm2.base, smollm2.dim, smollm2.window) == tuple(searched[key] for key in ("base", "dim", "window"))


# With what train.py says of each; the tests of holding and strategies have the rest of its words
REFUSED = {
    "finetune.optimizer=adamw8bit": ("finetune.optimizer=adamw8bit", "strategy=fsdp", "trainer.devices=2"),
    "finetune.weights_dtype=bfloat16": (
        "finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16", "strategy=ddp", "trainer.devices=2",
    ),
    "finetune.lora.frozen_dtype=nf4": ("finetune=qlora", "strategy=fsdp", "trainer.devices=2"),
    "objective=long_short": ("objective=long_short", "strategy=fsdp", "trainer.devices=2", "finetune=lora",
                             "finetune.lora.train_embeddings_and_norms=true"),
    "trainer.precision=16-mixed": ("trainer.precision=16-mixed", "strategy=fsdp", "trainer.devices=2"),
    "adamw8bit is not supported with trainer.precision=16-mixed": (
        "finetune.optimizer=adamw8bit", "trainer.precision=16-mixed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_train_refuses_is_not_planned(words, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find(name))
    with pytest.raises(ConfigError, match=re.escape(words)):
        planned(*REFUSED[words])
    if "16-mixed" in words:
        return  # a CPU has no fp16: Lightning takes another precision, or refuses it in its own words
    cfg = plan.compose_config([*REFUSED[words], "trainer.accelerator=cpu"])
    with pytest.raises(ConfigError) as error:
        trainer = build_trainer(cfg, tmp_path)
        config = models.model_config(cfg)
        check_holding(cfg, config, trainer)
        check_teacher(cfg, make(cfg.objective, Objective, "objective"), trainer)
    assert words.rpartition(" ")[2] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["finetune=lora", "finetune.lora.frozen_dtype=bfloat16", "strategy=zero2"],
            "finetune.lora.frozen_dtype=bfloat16",
        ),
        (["trainer.on_nonfinite=skip", "strategy=zero1"], "trainer.on_nonfinite=skip"),
        (["trainer.compile=true", "strategy=zero3"], "trainer.compile=true"),
        (["strategy=zero2", "strategy.offload_parameters=true"], "strategy.stage=3"),
        (["objective=long_short", "pose.train_len=4096"], "pose.train_len=4096 is above the 2048 tokens"),
        (["experiment=shape_7b", "finetune=qlora"], "model.path is null"),
        (["experiment=shape_7b", "objective=long_short"], "model.path is null"),
    ],
)
def test_what_train_refuses_by_keys_without_a_number_is_not_planned(overrides, words):
    """Nor advised."""
    model = [] if "experiment=shape_7b" in overrides else ["model=llama7b", "trainer.devices=2"]
    with pytest.raises(ConfigError, match=re.escape(words)):
        planned(*model, "pose.target_len=16384", *overrides)
    given = ("model=llama7b", "pose.target_len=16384", "trainer.on_nonfinite=skip")
    advice = {override for gpu in GPUS for one in advise(planned(*given), gpu) for override in one.overrides}
    assert advice and not any("zero" in override for override in advice)


@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_a_model_that_is_scaled_already_is_not_planned(method, tmp_path):
    """As train.py says it: the hours of a run that cannot be are of no use."""
    config = json.loads((ROOT / "assets" / "tiny" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ("model=local", f"model.path={tmp_path}", "pose.target_len=1024")
    with pytest.raises(ConfigError, match="already scaled"):
        planned(*given, f"rope={method}")
    assert planned(*given, "rope=none").target_len == 1024


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=self_distill", "pose.num_chunks=1"], ["objective=self_distill", "sampler PoSE"]),
        (["model=lama"], ["lama", "llama7b"]),
        (["trainer.micro_bach=2"], ["trainer.micro_bach"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
        (["trainer.devices=0"], ["trainer.devices=0"]),
        (["trainer.devices=3"], ["trainer.global_batch=16"]),
        (["model=llama7b", "pose.target_len=1024"], ["pose.target_len=1024", "2048"]),
        (["model=llama3_8b", "pose.target_len=32768", "rope=searched_smollm2"], ["base 100000, and here it is 500000"]),
        (["model=phi_2", "pose.target_len=8192", "rope=longrope", "rope.long_factor=[1,2]"], ["this model needs 16"]),
        (["model=local"], ["model.path"]),
        (["model=local", "model.path=/nowhere"], ["/nowhere"]),
        (["model.path=some.gguf"], ["some.gguf"]),
        (["strategy.name=deepspeed"], ["strategy=deepspeed", "zero3"]),
        (["finetune=lora", "finetune.lora.target_modules=[q]"], ["'q'", "q_proj"]),
        (
            ["finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16", "strategy=ddp"],
            ["finetune.weights_dtype=bfloat16", "without DDP"],
        ),
        (["--mfu=2"], ["--mfu=2"]),
    ],
)
def test_bad_input_is_an_error(overrides, words, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(overrides)
    shown = capsys.readouterr().err
    assert end.value.code == 1
    assert all(word in shown for word in words) and "Traceback" not in shown


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\nsys.argv = ['pose.plan', '--help']\n"
        "try: runpy.run_module('pose.plan', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--json" in shown and shown.endswith("0 False\n")


def test_train_says_two_lines(tmp_path, capsys):
    schema.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"cache_dir={tmp_path}/cache", "trainer.accelerator=cpu", "eval=none"])
    prepared = preflight.plan_training(cfg, tmp_path)
    capsys.readouterr()
    plan.say(cfg, prepared)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Plan        ") and "FLOPs" in first and "MFU" in second
    prepared.config.num_local_experts = 4  # a model of whose shape nothing is known
    plan.say(cfg, prepared)
    assert capsys.readouterr().out == ""


def test_garbage_of_an_earlier_measurement_is_no_part_of_a_peak():
    """The profiler counts what is given back if it was there when it was taken, in an earlier profile too."""

    def leave():
        cycle: list = [torch.ones(1 << 22)]
        cycle.append(cycle)
        gc.collect()  # from here on it is old, and no young collection meets it

    def step():
        gc.collect()
        torch.ones(1 << 20)

    assert cpu_peak(leave) == 16 << 20
    assert cpu_peak(step) == 4 << 20


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.nightly
def test_memory_of_a_training_is_what_is_planned(checkpointing, tmp_path):
    """All that the trainer's process allocates from loading the model to the last step: a width of 256 on the CPU."""
    init = {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    cfg = plan.compose_config(
        [
            "experiment=shape_7b", f"cache_dir={tmp_path}/cache", "trainer.accelerator=cpu", "pose.target_len=1024",
            "trainer.max_steps=2", "trainer.global_batch=4", "trainer.micro_batch=2", "trainer.precision=32-true",
            f"model.gradient_checkpointing={checkpointing}",
            *(f"model.init.{key}={size}" for key, size in init.items()),
        ]
    )  # fmt: skip
    run = Run(cfg, tmp_path)
    run.plan = preflight.plan_training(cfg, tmp_path)
    trainer = run.plan.trainer
    trainer.callbacks = [one for one in trainer.callbacks if type(one).__name__ not in ("Export", "Checkpoints")]
    assert plan.plan(cfg).memory["total"] == pytest.approx(cpu_peak(run.train), rel=0.05)
