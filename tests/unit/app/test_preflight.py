"""What is refused before any weights are loaded, what a run says of its data, and what is worked out."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import MixtralConfig

from pose.app import preflight, schema
from pose.app.preflight import warn_of_dropout, warn_of_router_loss
from pose.app.run import Run
from pose.errors import CheckpointError, ConfigError, DataError, PoseError
from pose.training import loggers, micro_batch
from pose.training.callbacks import Export
from pose.training.checkpoints import Checkpoint
from pose.training.micro_batch import MicroBatch
from pose.training.objectives import LanguageModel, LongShort, SelfDistill
from pose.training.resume import _check_settings

CONF = Path(__file__).resolve().parents[3] / "conf"
schema.register()


@pytest.fixture
def plan(tmp_path):
    """Plans a run of the shipped model from overrides."""

    def plan_(*overrides, name="train"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(name, ["trainer.accelerator=cpu", *overrides])
        plan_.cfg = cfg
        return preflight.plan_training(cfg, tmp_path)

    return plan_


@pytest.fixture
def documents(tmp_path):
    """Writes a documents file."""

    def write(*lines):
        file = tmp_path / "documents.jsonl"
        file.write_text("".join(line + "\n" for line in lines))
        return f"data.documents={file}"

    return write


LONG = json.dumps({"text": "It was a truth universally acknowledged. " * 400})


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["pose.target_len=128"], ConfigError, ["pose.target_len=128", "256"]),
        (["pose.target_len=long"], ConfigError, ["pose.target_len='long'", "integer of at least 2"]),
        (["pose.target_len=2049.5"], ConfigError, ["pose.target_len=2049.5", "integer of at least 2"]),
        (["pose.target_len=''"], ConfigError, ["pose.target_len is empty"]),
        (["data.window_len=${rope.name}"], ConfigError, ["data.window_len cannot be worked out", "rope.name"]),
        (["pose.num_chunks=257"], ConfigError, ["pose.num_chunks=257", "pose.train_len=256"]),
        (["pose.num_chunks=0"], ConfigError, ["pose.num_chunks=0", "at least 1"]),
        (
            ["finetune.schedule=polynomial", "finetune.lr=1e-7"],
            ConfigError,
            ["finetune.lr=1e-07 is not above 1e-07", "finetune.schedule=linear"],
        ),
        (["pose.train_len=4096"], ConfigError, ["pose.target_len=2048", "pose.train_len=4096"]),
        (["pose.content=other"], ConfigError, ["pose.content='other'", "aligned"]),
        (["rope=linear", "rope.factor=0.5"], ConfigError, ["rope.factor=0.5", "at least 1"]),
        (["rope=none", "rope.factor=2"], ConfigError, ["rope.factor=2", "rope=none"]),
        (["rope=dynamic", "model.engine=llama.cpp"], ConfigError, ["llama.cpp", "dynamic", "docs/SERVING.md"]),
        (["rope=dynamic", "model.engine=vllm"], ConfigError, ["vllm gives NaN"]),
        (["trainer.global_batch=6", "trainer.micro_batch=4"], ConfigError, ["trainer.global_batch=6", "4"]),
        (["trainer.micro_batch=all"], ConfigError, ["trainer.micro_batch='all'", "at least 1"]),
        (["trainer.micro_batch=0"], ConfigError, ["trainer.micro_batch=0", "at least 1"]),
        (["trainer.max_steps=0"], ConfigError, ["trainer.max_steps=0"]),
        (["trainer.accelerator=abacus"], ConfigError, ["abacus"]),
        (["trainer.precision=fp16"], ConfigError, ["trainer.precision='fp16'", "bf16-mixed"]),
        (["trainer.devices=0"], ConfigError, ["trainer.devices=0", "at least 1"]),
        (["trainer.num_nodes=2"], ConfigError, ["trainer.num_nodes=2", "torchrun"]),
        (["strategy.name=fast"], ConfigError, ["trainer.accelerator=cpu", "strategy.name=fast"]),
        (["model.init={model_type:llama}"], ConfigError, ["model.init", "model.path=assets/tiny", "model.path=null"]),
        (["data.on_broken=skp"], ConfigError, ["data.on_broken='skp'", "skip"]),
        (["data.min_tokens=0"], ConfigError, ["data.min_tokens=0", "at least 1"]),
        (["data.max_documents=-1"], ConfigError, ["data.max_documents=-1"]),
        (["data.max_document_chars=0"], ConfigError, ["data.max_document_chars=0"]),
        (["data.heldout=5"], ConfigError, ["data.heldout=5"]),
        (["data.documents=5"], ConfigError, ["data.documents=5"]),
        (["data.documents=[]"], ConfigError, ["data.documents=[]"]),
        (["data.leave_out=[null]"], ConfigError, ["data.leave_out has None"]),
        (["data.documents={path:a.jsonl,text_fild:x}"], ConfigError, ["data.documents", "text_fild", "text_field"]),
        (["logger=wandb", "logger.tags=one"], ConfigError, ["logger.tags='one'", "logger.tags=[one,two]"]),
        (["logger=wandb", "logger.run_name=5"], ConfigError, ["logger.run_name=5", "text"]),
        (["trainer.accelerator=tpu"], ConfigError, ["trainer.accelerator='tpu'", "auto", "cpu", "gpu"]),
        (["model.path=null", "model.init=llama"], ConfigError, ["model.init='llama'", "model_type"]),
        (["model.attention=quick"], ConfigError, ["model.attention", "'quick'", "sdpa"]),
        (["model.attention=flash_attention_2"], ConfigError, ["flash_attention_2", "sdpa"]),
        (["model.export_dtype=int8"], ConfigError, ["model.export_dtype='int8'", "bfloat16"]),
        (["seed=-1"], ConfigError, ["seed=-1", "0 to 4294967295"]),
        (["seed=4294967296"], ConfigError, ["seed=4294967296", "0 to 4294967295"]),
        (["eval.seed=4294967296"], ConfigError, ["eval.seed=4294967296"]),
        (["watch.seed=-1"], ConfigError, ["watch.seed=-1"]),
        (["num_threads=0"], ConfigError, ["num_threads=0", "at least 1"]),
        (["data.num_workers=-1"], ConfigError, ["data.num_workers=-1", "at least 0"]),
        (["pose.train_len=1", "pose.num_chunks=1"], ConfigError, ["pose.train_len=1", "at least 2"]),
        (["+trainer.max_step=7"], ConfigError, ["trainer.max_step is no key", "trainer.max_steps"]),
        (["+zebra=7"], ConfigError, ["zebra is no key", "finetune"]),
        (["+finetune.lora.ranks=7"], ConfigError, ["finetune.lora.ranks is no key", "finetune.lora.rank"]),
        (["+pose.num_chunk=3"], ConfigError, ["pose.num_chunk", "num_chunks"]),
        (["+rope.beta=3"], ConfigError, ["rope.beta", "beta_fast"]),
        (["+strategy.stage=3"], ConfigError, ["strategy.stage", "name alone"]),
        (["strategy.name=null"], ConfigError, ["strategy.name=None", "auto", "ddp"]),
        (["~strategy.name"], ConfigError, ["strategy.name=None", "auto", "ddp"]),
        (["strategy.name=ddp_spawn"], ConfigError, ["strategy.name='ddp_spawn'", "ddp"]),
        (["logger.name=comet"], ConfigError, ["logger.name='comet'", "csv", "wandb"]),
        (["+logger.project=x"], ConfigError, ["logger.project", "csv"]),
        (["+data.synthetic.riddle=0.1"], ConfigError, ["data.synthetic.riddle is no key"]),
        (["finetune.betas=[0.9]"], ConfigError, ["finetune.betas=[0.9]"]),
        (["trainer.log_every_n_steps=0"], ConfigError, ["trainer.log_every_n_steps=0"]),
        (["data.curriculum=[5]"], ConfigError, ["data.curriculum", "5"]),
        (["data.curriculum=[[a,128]]"], ConfigError, ["data.curriculum", "['a', 128]"]),
        (
            ["experiment=pretrain_tiny", "model.init.hidden_size=65"],
            ConfigError,
            ["model.init={", "is not a model's config"],
        ),
        (["finetune.lr=0"], ConfigError, ["finetune.lr=0"]),
        (["finetune=lora", "finetune.lora.rank=0"], ConfigError, ["finetune.lora.rank=0", "at least 1"]),
        (["finetune=lora", "finetune.lora.target_modules=[q]"], ConfigError, ["lora.target_modules", "q_proj"]),
        (["finetune.lora.alpha=3"], ConfigError, ["finetune.lora.alpha=3", "finetune=lora"]),
        (["trainer.gradient_clip=-1"], ConfigError, ["trainer.gradient_clip=-1"]),
        (["trainer.precision=int3"], ConfigError, ["int3"]),
        (["finetune.schedule=steep"], ConfigError, ["finetune.schedule='steep'", "linear"]),
        (["data.synthetic.passkey=1.5"], ConfigError, ["data.synthetic.passkey=1.5"]),
        (["eval.tasks=[riddle]"], ConfigError, ["riddle", "passkey"]),
        (["eval.lengths=[60]"], ConfigError, ["60"]),
        (["eval.lengths=[999999]", "eval.tasks=[perplexity]"], DataError, ["999999", "books.heldout"]),
        (["model.path=/no/such/folder"], CheckpointError, ["/no/such/folder"]),
        (["model=local"], ConfigError, ["model.path", "folder"]),
        (["model.path=null"], ConfigError, ["model.init"]),
        (["data=jsonl"], ConfigError, ["data.documents"]),
        (["data=jsonl", "data.documents=nowhere.jsonl"], DataError, ["nowhere.jsonl"]),
    ],
)  # fmt: skip
def test_refused_with_a_clear_message(plan, overrides, error, words):
    with pytest.raises(error) as caught:
        plan(*overrides)
    assert isinstance(caught.value, PoseError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("overrides", [["rope=dynamic", "model.engine=transformers"], ["model.engine=llama.cpp"]])
def test_an_engine_that_serves_the_method_stops_nothing(plan, overrides):
    assert plan(*overrides).scaling.name in ("dynamic", "yarn")


def test_an_unknown_engine_is_refused_by_the_schema(plan):
    with pytest.raises(Exception, match=r"model\.engine='tgi' is unknown: choose transformers, vllm"):
        plan("model.engine=tgi")


def test_a_broken_line_is_named(plan, documents):
    with pytest.raises(DataError, match=r"documents\.jsonl, line 2"):
        plan("eval=none", "data=jsonl", documents(LONG, '{"text": "no end'))


def test_documents_that_are_too_short(plan, documents):
    with pytest.raises(DataError, match="none of the 1 documents is long enough"):
        plan("eval=none", "data=jsonl", documents('{"text": "short"}'))


@pytest.mark.parametrize("fold", [True, False])
def test_every_export_of_a_run_is_folded_or_none(plan, documents, fold):
    planned = plan(
        "data=jsonl", documents(LONG), "eval=none", f"model.export_fold={fold}", "watch.every_n_steps=1",
        "watch.tasks=[passkey]", "watch.best=passkey@2048",
    )  # fmt: skip
    exports = [callback for callback in planned.trainer.callbacks if isinstance(callback, Export)]
    exports.append(planned.watch.export)
    assert len(exports) == 2 and all(export.fold is fold for export in exports)


def test_a_scaled_checkpoint_is_not_scaled_again(plan, documents, tmp_path):
    first = plan("eval=none", "data=jsonl", documents(LONG))
    first.config.save_pretrained(tmp_path / "scaled")
    first.tokenizer.save_pretrained(tmp_path / "scaled")
    shutil.copy(CONF.parent / "assets" / "tiny" / "model.safetensors", tmp_path / "scaled")
    with pytest.raises(ConfigError, match="already scaled"):
        plan("eval=none", "data=jsonl", documents(LONG), f"model.path={tmp_path}/scaled")
    again = plan("eval=none", "data=jsonl", documents(LONG), f"model.path={tmp_path}/scaled", "rope=none")
    assert again.expected is None and again.config.rope_parameters == first.config.rope_parameters


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "accumulate"), [(16, 16, 1), (16, 4, 4), (64, 1, 64), (2, 16, 1)]
)
def test_gradient_accumulation_is_worked_out(plan, documents, global_batch, micro_batch, accumulate):
    planned = plan(
        "eval=none", "data=jsonl", documents(LONG),
        f"trainer.global_batch={global_batch}", f"trainer.micro_batch={micro_batch}",
    )  # fmt: skip
    assert planned.trainer.accumulate_grad_batches == accumulate
    assert plan.cfg.trainer.micro_batch == global_batch // accumulate, "what is used stands in config.yaml"
    assert planned.data.micro_batch * accumulate == global_batch
    assert len(planned.data.dataset) == global_batch * planned.trainer.max_steps


def test_the_model_trains_in_train_mode(plan, documents, tmp_path, capsys):
    """transformers recomputes activations, and drops out, only then."""
    overrides = ["eval=none", "data=jsonl", documents(LONG), "model.gradient_checkpointing=true"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    run = Run(cfg, tmp_path)
    run.plan = plan(*overrides)
    capsys.readouterr()
    model = run.load_for_training(run.plan.trainer.strategy)
    assert capsys.readouterr().out.startswith("Reading the weights of ")
    assert model.training and hasattr(model.model.layers[0].forward, "__wrapped__"), "its layers are recomputed"


def test_lengths_default_to_doublings(plan):
    assert plan("eval.tasks=[passkey]").suite.lengths == [256, 512, 1024, 2048]


def test_shipped_files_are_found_from_anywhere(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan("eval=none").geometry.window == 256


def test_wandb_is_offline_without_an_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not loggers.has_wandb_account()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert loggers.has_wandb_account()


def test_an_account_of_another_server_of_wandb_is_one(monkeypatch, tmp_path):
    """As `wandb login --host` leaves it; and what wandb itself looks at."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").write_text("machine wandb.example.org login user password secret\n")
    (tmp_path / "own").chmod(0o600)
    monkeypatch.setenv("NETRC", "~/own")
    assert not loggers.has_wandb_account(), "of the usual server there is none"
    with monkeypatch.context() as env:
        env.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        assert loggers.has_wandb_account()
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert loggers.has_wandb_account()
    settings.write_text("damaged")
    assert not loggers.has_wandb_account()
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "/token")
    assert loggers.has_wandb_account()


# ----- what trains on what -----


def lines(tmp_path, num, words=400, name="own.jsonl"):
    file = tmp_path / name
    rows = [
        {"id": f"{name}{i}", "text": f"{i}. " + "It was a truth universally acknowledged. " * words} for i in range(num)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.documents=[{book},nowhere.txt]"], ["data.leave_out=nowhere.txt"], ["data.heldout=nowhere.txt"],
        ["eval.documents=nowhere.txt"], ["watch.documents=[{book},nowhere.txt]", "watch.every_n_steps=2"],
    ],
)  # fmt: skip
def test_files_that_are_not_there_are_named_by_their_key_before_any_text_is_read(plan, tmp_path, overrides):
    cache = tmp_path / "cache"
    book = CONF.parent / "assets/corpora/books.heldout.jsonl.gz"
    given = [one.format(book=book) for one in overrides]
    with pytest.raises(DataError, match=f"^{given[0].partition('=')[0]}: no documents file at nowhere.txt"):
        plan(f"cache_dir={cache}", *given)
    assert not list(cache.rglob("*.bin"))
    if given[0].startswith("data.heldout"):
        plan(*given, "eval=none", "trainer.max_steps=1")  # nothing reads it


def test_a_run_says_how_many_tokens_and_epochs(plan, capsys):
    """16 examples of 256 tokens in 250 steps, three in five of them text, on 1,063,787 tokens."""
    plan("eval=none")
    out = capsys.readouterr().out
    assert "1,063,787 tokens in 5 documents; training takes 1,024,000 tokens, 60% of them text: 0.58 epochs" in out
    assert "Warning" not in out


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["trainer.precision=bf16-mixed", "eval_dtype=bfloat16", "eval=none"],
            "trainer.precision=bf16-mixed: this CPU",
        ),
        (["eval_dtype=bfloat16"], "eval_dtype=bfloat16: this CPU"),
        (
            ["trainer.precision=bf16-mixed", "eval_dtype=bfloat16"],
            "trainer.precision=bf16-mixed and eval_dtype=bfloat16: this CPU",
        ),
        (["trainer.precision=auto"], None),
    ],
)
def test_bf16_that_a_cpu_emulates_is_warned_of(plan, capsys, monkeypatch, overrides, named, has_bf16):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_bf16)
    planned = plan(*overrides)
    out = " ".join(capsys.readouterr().out.split())
    assert (f"Warning: {named}" in out) == (named is not None and not has_bf16) == ("AVX512_BF16" in out)
    if "auto" in overrides[0]:
        assert planned.trainer.precision == ("bf16-mixed" if has_bf16 else "32-true")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], None),
        (["rope.attention_factor=null"], ["rope.attention_factor=1.173", "do not see the original model"]),
        (["pose.train_len=512"], ["pose.train_len=512", "window of 256", "rope.long_factor like all others"]),
        (
            ["pose=pose", "rope.attention_factor=null"],
            ["window of 256", "PoSE trains on hardly any", "Choose pose=mix"],
        ),
        (["rope=dynamic", "~rope.attention_factor", "~rope.long_factor"], None),
        (["pose=short_pi"], ["skips no position, and rope=longrope leaves texts", "the model trains unscaled"]),
        (
            ["pose=short_pi", "rope=dynamic", "~rope.attention_factor", "~rope.long_factor"],
            ["skips no position, and rope=dynamic leaves texts"],
        ),
        (["pose=full", "rope=dynamic", "~rope.attention_factor", "~rope.long_factor"], None),
        (["pose=pose", "objective=self_distill"], None),
        (["pose=pose", "objective=long_short"], None),
        (["pose=pose", "objective=long_short", "objective.short_weight=0"], ["PoSE trains on hardly any"]),
        (
            ["pose=pose", "objective=self_distill", "rope.attention_factor=null"],
            ["holds for plain views (objective=self_distill) too"],
        ),
        (
            ["pose=pose", "objective=self_distill", "pose.train_len=512"],
            ["plain views (objective=self_distill) have pose.train_len=512 tokens"],
        ),
        (
            ["pose=pose", "objective=self_distill", "objective.weight=0"],
            ["objective=self_distill trains at plain positions alone", "positions of PoSE change nothing"],
        ),
        (
            ["pose=pose", "objective=long_short", "objective.lm_weight=0", "objective.skipped_weight=0"],
            ["objective=long_short trains at plain positions alone"],
        ),
    ],
)
def test_windows_that_are_not_mixed_are_warned_of(plan, documents, capsys, overrides, words):
    overrides = [*overrides, "eval=none", "data=jsonl", documents(*[LONG] * 40), "trainer.max_steps=11"]
    plan("experiment=mixed_windows_tiny", *overrides)
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if line.startswith("Warning")]
    if words is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and all(word in warnings[0] for word in words)


def test_a_teacher_is_the_same_files_when_a_run_goes_on(plan, tmp_path):
    """Another checkpoint of the same shape would be another teacher; under lm it is not read again."""
    folder = tmp_path / "original"
    shutil.copytree(CONF.parent / "assets" / "tiny", folder)
    given = (f"model.path={folder}", f"cache_dir={tmp_path}/cache", "eval=none")

    def settings(*overrides):
        return plan(*given, *overrides).settings

    key = "the files of model.path"
    before = settings("objective=long_short")
    assert key not in settings() and key not in settings("objective=long_short", "finetune=lora")
    assert settings("objective=long_short")[key] == before[key]
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4] + bytes(4))
    after = settings("objective=long_short")
    assert after[key] != before[key]
    with pytest.raises(ConfigError, match=f"{key}="):
        _check_settings(tmp_path, before, after)
    beside = settings("objective=long_short", "finetune=lora", "finetune.lora.train_embeddings_and_norms=true")
    assert beside[key] == after[key], "adapters leave the embeddings of model.path to the teacher"


def test_the_dtype_that_weights_are_held_in_is_the_same_when_a_run_goes_on(plan, tmp_path, monkeypatch):
    """By default it depends on the number of processes; a run that did not say it is taken at its word."""
    monkeypatch.setattr("pose.app.preflight.trained_dtype", lambda *_: torch.bfloat16)
    narrow = plan("eval=none", f"cache_dir={tmp_path}/cache").settings
    monkeypatch.undo()
    wide = plan("eval=none", f"cache_dir={tmp_path}/cache").settings
    key = "finetune.weights_dtype"
    assert (narrow[key], wide[key]) == ("bfloat16", "float32")
    for now, before in ((narrow, wide), (wide, narrow)):
        with pytest.raises(ConfigError, match=rf"{key}='{now[key]}', which was '{before[key]}'"):
            _check_settings(tmp_path, before, now)
        _check_settings(tmp_path, before | {key: "auto"}, now)


def test_text_that_is_seen_too_often_is_warned_of(plan, tmp_path, capsys):
    file = lines(tmp_path, 2)
    plan("eval=none", "data=jsonl", f"data.documents={file}", "trainer.max_steps=10", "finetune.warmup_steps=0")
    assert "Warning" not in capsys.readouterr().out
    plan("eval=none", "data=jsonl", f"data.documents={file}", "trainer.max_steps=100")
    out = capsys.readouterr().out
    assert "Warning: the text is seen" in out and "data=pile" in out and "trainer.max_steps" in out


def test_a_real_model_on_the_shipped_text_is_warned_of(plan, tmp_path, capsys):
    shutil.copytree(CONF.parent / "assets" / "tiny", tmp_path / "real")
    plan("eval=none", f"model.path={tmp_path}/real", "trainer.max_steps=1")
    out = capsys.readouterr().out
    assert (
        "Warning: " in out and "trains on the few texts that come with this repository" in out and "data=jsonl" in out
    )
    plan(
        "eval=none",
        f"model.path={tmp_path}/real",
        "trainer.max_steps=1",
        "finetune.warmup_steps=0",
        "data=jsonl",
        f"data.documents={lines(tmp_path, 2)}",
    )
    assert "Warning" not in capsys.readouterr().out


def test_perplexity_on_a_shipped_book_beside_ones_own_text_is_warned_of(plan, tmp_path, capsys):
    plan("eval=none", f"data.documents={lines(tmp_path, 2)}", "trainer.max_steps=1")
    assert "data.heldout=null sets some of your documents aside" in capsys.readouterr().out


@pytest.mark.parametrize("group", ["eval", "watch"])
def test_perplexity_on_text_that_is_trained_on_is_warned_of(plan, tmp_path, capsys, group):
    """By the text, wherever it stands; not where it is left out."""
    own = lines(tmp_path, 3)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(own).read_text().splitlines()[1] + "\n")
    measured = {
        "eval": ("eval.tasks=[perplexity]", "eval.lengths=[256]", f"eval.documents={other}"),
        "watch": ("eval=none", "watch.every_n_steps=1", "watch.tasks=[perplexity]", "watch.lengths=[256]",
                  f"watch.documents={other}"),
    }  # fmt: skip
    given = ("data=jsonl", f"data.documents={own}", "trainer.max_steps=1", *measured[group])
    plan(*given)
    assert f"Warning: {group}.documents: " in (out := " ".join(capsys.readouterr().out.split()))
    assert "is not of held-out text: leave it out with data.leave_out" in out
    plan(*given, f"data.leave_out={other}")
    assert "held-out text" not in capsys.readouterr().out


def test_of_ones_own_data_whole_documents_are_set_aside(plan, tmp_path, capsys):
    file = lines(tmp_path, 20)
    overrides = ["data=jsonl", f"data.documents={file}", "trainer.max_steps=1", "eval=perplexity", "eval.windows=1"]
    planned = plan(*overrides)
    measured = planned.suite.document_ids
    trained = [planned.data.dataset.documents[i].id for i in range(len(planned.data.dataset.documents))]
    assert len(measured) == 1 and len(trained) == 19
    assert not set(measured) & set(trained)
    assert "persuasion" not in "".join(measured)
    assert "1 of 20 documents" in capsys.readouterr().out
    again = plan(*overrides, "seed=5", "pose=stratified", "rope=ntk")
    assert again.suite.document_ids == measured, "the same for a whole sweep"
    assert planned.settings["data.documents"] == again.settings["data.documents"]
    more = plan(*overrides, "data.heldout_share=0.5")
    assert len(more.suite.document_ids) == 10
    assert more.settings["data.documents"] != planned.settings["data.documents"]
    whole = plan(*overrides, "eval=passkey")
    assert len(whole.data.dataset.documents) == 20, "nothing is measured on documents"


def test_a_run_on_own_data_is_watched_on_own_documents_that_it_does_not_train_on(plan, tmp_path):
    file = lines(tmp_path, 20)
    planned = plan(
        "data=jsonl", f"data.documents={file}", "trainer.max_steps=1", "eval=none", "watch.every_n_steps=1",
        "watch.tasks=[perplexity]", "watch.windows=1", "data.heldout_share=0.2",
    )  # fmt: skip
    trained = {planned.data.dataset.documents[i].id for i in range(len(planned.data.dataset.documents))}
    watched = set(planned.watch.suite.document_ids)
    own = {f"own.jsonl{i}" for i in range(20)}
    assert len(watched) == 4 and watched | trained == own and not watched & trained
    assert set(planned.watch.short.document_ids) == watched


def test_a_single_document_cannot_be_set_aside(plan, tmp_path):
    single = f"data.documents={lines(tmp_path, 1)}"
    with pytest.raises(DataError, match=r"1 of the 1 documents .*data\.heldout.*\(eval\.tasks=\[passkey\]\)"):
        plan("data=jsonl", single, "eval=perplexity")
    with pytest.raises(DataError, match=r"1 of the 1 documents .*\(watch\.tasks=\[passkey\]\)"):
        plan("data=jsonl", single, "eval=none", "watch.every_n_steps=1")
    with pytest.raises(ConfigError, match=r"eval\.documents is not set"):
        plan("data=jsonl", f"data.documents={lines(tmp_path, 3)}", "eval=perplexity", "data.heldout_share=0")


def test_what_is_set_aside_is_long_enough_for_all_who_measure_on_it(plan, tmp_path):
    """The longest window of eval and watch, and min_tokens of either."""
    file = f"data.documents={lines(tmp_path, 6)}"
    common = ["data=jsonl", file, "trainer.max_steps=1", "eval=perplexity", "eval.windows=1", "watch.every_n_steps=1"]
    for overrides, length, key in (
        (["eval.lengths=[256]", "watch.lengths=[512]"], 512, "watch.lengths"),
        (["eval.lengths=[512]", "watch.lengths=[256]"], 512, "eval.lengths"),
        (["eval.lengths=[512]", "watch.lengths=[256]", "watch.min_tokens=600"], 600, "watch.min_tokens"),
        (["eval.lengths=[512]", "eval.min_tokens=700", "watch.lengths=[600]"], 700, "eval.min_tokens"),
        (["eval.lengths=[512]", "watch.tasks=[passkey]", "watch.lengths=[600]"], 512, "eval.lengths"),
    ):
        aside = plan(*common, *overrides).data.set_aside
        assert (aside.long_enough, aside.asked_by) == (length, key)
    with pytest.raises(DataError, match=r"0 of the 6 documents .* have 900,000 tokens \(watch\.min_tokens\)"):
        plan(*common, "eval.lengths=[512]", "watch.min_tokens=900000")


def test_the_keys_of_the_training_data_stay_those_of_data(plan, documents):
    """Where a watch opens it first."""
    short = documents('{"text": "It was."}')
    common = ["data=jsonl", short, "eval=none", "watch.every_n_steps=1"]
    with pytest.raises(DataError, match=r"no document of at least 100000 tokens \(data\.min_tokens\)"):
        plan(*common, "data.min_tokens=100000")
    with pytest.raises(DataError, match=r"choose one with data\.text_field, or 'data\.documents=\{path"):
        plan(*common, "data.text_field=body", "watch.text_field=text")


def test_errors_of_evaluated_documents_name_the_keys_of_their_group(plan, documents, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"body": "x"}')
    for group, overrides in (("eval", ["eval=perplexity"]), ("watch", ["eval=none", "watch.every_n_steps=1"])):
        given = ["data=jsonl", documents(LONG), *overrides, f"{group}.documents={tmp_path}/other.jsonl"]
        with pytest.raises(DataError, match=rf"choose one with {group}\.text_field, or '{group}\.documents=\{{path"):
            plan(*given)
        with pytest.raises(DataError, match=rf"\({group}\.lengths\)"):
            plan(*given, f"{group}.text_field=body")


def test_documents_that_are_given_for_evaluation_are_taken(plan, tmp_path):
    own, other = lines(tmp_path, 3), lines(tmp_path, 2, name="other.jsonl")
    for key in ("data.heldout", "eval.documents"):
        planned = plan("data=jsonl", f"data.documents={own}", f"{key}={other}", "eval=perplexity", "eval.windows=1")
        assert planned.suite.document_ids == ["other.jsonl0", "other.jsonl1"]
        assert len(planned.data.dataset.documents) == 3


def test_examples_may_be_shorter_than_the_models_own_window(plan):
    """What counts for the scaling is target / window, as ever: here 1,024 / 256 with examples of 64."""
    planned = plan("pose.train_len=64", "pose.target_len=1024", "eval=none", "watch.every_n_steps=1")
    assert (planned.sampler.train_len, planned.scaling.factor, planned.geometry.window) == (64, 4.0, 256)
    assert planned.watch.short.lengths == [256], "what is kept is measured at the model's own window"
    example = planned.data.dataset[0]
    assert len(example["input_ids"]) == 64 and int(example["position_ids"].max()) > 256


# ----- classes that a config names -----


def test_another_class_is_refused_before_it_runs(plan, tmp_path):
    mark = tmp_path / "ran"
    popen = ["+rope.args=[touch," + str(mark) + "]", "rope._target_=subprocess.Popen"]
    for overrides in (
        popen,
        ["pose._target_=pathlib.Path"],
        ["pose._target_=pose.positions.PositionSampler"],
        ["pose=mix", "pose.sampler._target_=subprocess.Popen", f"+pose.sampler.args=[touch,{mark}]"],
        ["strategy=fsdp", "strategy._target_=subprocess.Popen"],
        ["rope._target_=pose.positions.PoSE"],
        ["rope._target_=os.system"],
        ["rope._target_=no.such.module"],
        ["rope._target_=null"],
    ):
        with pytest.raises(ConfigError, match=r"(rope|pose|pose\.sampler|strategy)\._target_='?.*"):
            plan("eval=none", *overrides)
    assert not mark.exists()


def test_a_nested_class_of_another_kind_is_refused(plan, tmp_path):
    mark = tmp_path / "ran"
    nested = "{_target_: subprocess.Popen, args: [touch, " + str(mark) + "]}"
    with pytest.raises(ConfigError, match=r"rope\.attention_factor\._target_=subprocess\.Popen is not accepted"):
        plan("eval=none", f"rope.attention_factor={nested}")
    assert not mark.exists()


# ----- empty values -----


@pytest.mark.parametrize(
    "key",
    [
        "data.text_field", "model.revision", "model.offline", "resume", "logger.name", "trainer.precision",
    ],
)  # fmt: skip
def test_an_empty_value_is_refused_by_its_key(plan, key):
    for value in ("''", "' '"):
        with pytest.raises(ConfigError, match=f"{key} is empty"):
            plan(f"{key}={value}")


def test_an_empty_value_inside_another_is_refused(plan):
    for override, key in (
        ("data.documents=[assets/corpora/books.train.jsonl.gz,'']", r"data\.documents\[1\]"),
        ("data.documents={path: ''}", r"data\.documents\.path"),
    ):
        with pytest.raises(ConfigError, match=f"{key} is empty"):
            plan(override)


@pytest.mark.parametrize("key", ["data.add_bos", "eval.add_bos", "watch.add_bos"])
def test_a_bos_that_the_tokenizer_has_not_is_refused_by_the_key_that_asks_for_it(plan, tmp_path, key):
    shutil.copytree(CONF.parent / "assets" / "tiny", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"bos_token": None}))
    with pytest.raises(ConfigError, match=rf"^{key} is true, but this tokenizer has no BOS token"):
        plan(
            "eval.tasks=[passkey]", "eval.lengths=[256]", "watch.every_n_steps=1", "watch.tasks=[passkey]",
            f"model.tokenizer={tmp_path}/tokenizer", f"{key}=true",
        )  # fmt: skip


def test_on_a_cpu_the_largest_micro_batch_is_1(plan, documents, capsys):
    planned = plan("eval=none", "data=jsonl", documents(LONG), "trainer.global_batch=6", "trainer.micro_batch=auto")
    assert plan.cfg.trainer.micro_batch == planned.data.micro_batch == 1
    assert planned.trainer.accumulate_grad_batches == 6
    assert "Micro-batch 1: trainer.micro_batch=auto" in capsys.readouterr().out
    assert not any(isinstance(one, MicroBatch) for one in planned.trainer.callbacks)


@pytest.mark.parametrize(("given", "wanted"), [(6, 3), (4, 2), (5, 2), (2, 1), (1, 1), (9, 3)])
def test_a_micro_batch_counts_both_views_of_an_example(plan, documents, capsys, given, wanted):
    """Brought down to a divisor of the batch."""
    planned = plan(
        "eval=none", "data=jsonl", documents(LONG), "objective=self_distill", "trainer.global_batch=6",
        f"trainer.micro_batch={given}",
    )  # fmt: skip
    assert planned.data.micro_batch == wanted and plan.cfg.trainer.micro_batch == 2 * wanted, "to be given again"
    assert planned.trainer.accumulate_grad_batches == 6 // wanted
    assert (
        f"Micro-batch {wanted}: the objective sees each example 2 times ({given} was given)" in capsys.readouterr().out
    )


def test_objectives_are_checked_before_anything_long(plan, documents):
    for objective, words in (
        ("objective.weight=-1", "objective.weight=-1"),
        ("pose=short_pi", "choose a sampler with skips"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan("eval=none", "data=jsonl", documents(LONG), "objective=self_distill", objective)
    with pytest.raises(ConfigError, match=r"objective.layers=\[99\]: this model has 6 layers"):
        plan("eval=none", "data=jsonl", documents(LONG), "objective=long_short", "objective.layers=[99]")


@pytest.mark.parametrize("objective", ["lm", "self_distill", "long_short"])
def test_a_teacher_does_not_see_beyond_its_window(plan, documents, objective):
    """The original model is at a loss there; without it examples may be longer than its window."""
    given = ("eval=none", "data=jsonl", documents(LONG), "pose.train_len=300", f"objective={objective}")
    if objective == "long_short":
        with pytest.raises(ConfigError, match=r"pose.train_len=300 is above the 256 tokens .* is made for"):
            plan(*given)
    else:
        assert plan(*given).sampler.train_len == 300


def test_a_teacher_that_was_extended_sees_as_far_as_that(plan, documents, tmp_path):
    folder = tmp_path / "extended"
    shutil.copytree(CONF.parent / "assets" / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    noted = {"rope": "linear", "window": 256, "factor": 2.0}
    rope = config["rope_parameters"] | {"rope_type": "linear", "factor": 2.0}
    changed = config | {"max_position_embeddings": 512, "pose": noted, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(changed))
    given = ("eval=none", "data=jsonl", documents(LONG), f"model.path={folder}", "rope=none", "objective=long_short")
    assert plan(*given, "pose.train_len=300").sampler.train_len == 300
    with pytest.raises(ConfigError, match=r"pose.train_len=600 is above the 512 tokens"):
        plan(*given, "pose.train_len=600")


@pytest.mark.parametrize("asked", [True, False])
def test_a_loss_of_experts_that_is_not_trained_is_said(asked, caplog):
    config = MixtralConfig(output_router_logits=asked, router_aux_loss_coef=0.02)
    warn_of_router_loss(config)
    assert ("router_aux_loss_coef=0.02), which is not trained here" in caplog.text) is asked


@pytest.mark.parametrize(
    ("objective", "of_model", "of_adapters", "named"),
    [
        (SelfDistill(), 0.1, 0.05, "attention_dropout of the model=0.1, finetune.lora.dropout=0.05"),
        (SelfDistill(), 0.0, 0.05, "(finetune.lora.dropout=0.05)"),
        (SelfDistill(), 0.0, 0.0, ""),
        (SelfDistill(0), 0.1, 0.05, ""),  # one view
        (LongShort(), 0.1, 0.05, ""),  # its teacher has none
        (LanguageModel(), 0.1, 0.05, ""),
    ],
)
def test_dropout_in_both_views_is_warned_of(objective, of_model, of_adapters, named, caplog):
    warn_of_dropout(objective, MixtralConfig(attention_dropout=of_model), of_adapters)
    assert (named in caplog.text) if named else not caplog.text


@pytest.mark.parametrize(("sampler", "is_warned_of"), [("pose", True), ("full", False)])
def test_layers_that_slide_are_warned_of(plan, documents, tmp_path, capsys, sampler, is_warned_of):
    """They count tokens, not positions: across a skip they see what is far away."""
    folder = tmp_path / "sliding"
    shutil.copytree(CONF.parent / "assets" / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = ["full_attention", "sliding_attention"] * (config["num_hidden_layers"] // 2)
    changed = {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "layer_types": kinds}
    (folder / "config.json").write_text(json.dumps(config | changed | {"sliding_window": 256}))
    plan("eval=none", "data=jsonl", documents(*[LONG] * 40), f"model.path={folder}", f"pose={sampler}")
    out = " ".join(capsys.readouterr().out.split())
    assert ("Warning: 3 of 6 layers of this model attend to the last 256 tokens alone" in out) is is_warned_of


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], None),
        (["data.synthetic={}"], None),
        (["pose.curriculum=[[0.5,1024]]"], None),
        (["pose=short_pi", "pose.curriculum=[[0.5,1024]]"], "pose.curriculum changes nothing with ShortPI"),
        (["rope.rcd_shift=true", "rope.rcd_periods=3"], None),
        (["rope.rcd_periods=3"], "rope.rcd_periods=3 changes nothing without rope.rcd_shift=true"),
        (["finetune.warmup_steps=10"], "takes the whole run (trainer.max_steps=4): the learning rate reaches 30%"),
        (["finetune.warmup_steps=3"], None),
        (["finetune.warmup_steps=10", "finetune.schedule=constant"], None),
        (["rope.factor=7"], "rope.factor=7 reaches 1,792 tokens, the window of 256 times the factor"),
        *[
            ([f"rope={name}", "rope.factor=2"], "leave rope.factor out, or give 8 or more")
            for name in ("linear", "ntk", "ntk_by_parts", "llama3", "yarn_revised")
        ],
        (["rope=ntk", "rope.factor=2", "rope.rcd_shift=true"], "leave rope.factor out, or give 8 or more"),
        (["pose.target_len=3000", "rope=linear"], None),
        (["rope=dynamic", "rope.factor=1"], None),
        (["pose.target_len=256"], "pose.target_len=256 is not above the 256 tokens that assets/tiny is made for"),
    ],
)
def test_what_changes_nothing_is_said(plan, documents, capsys, overrides, words):
    synthetic = [f"data.synthetic.{task}=0" for task in ("key_value", "copy", "passkey")]
    overrides = [part for one in overrides for part in (synthetic if one == "data.synthetic={}" else [one])]
    plan(
        "eval=none", "data=jsonl", documents(*[LONG] * 40), "trainer.max_steps=4", "finetune.warmup_steps=0", *overrides
    )
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert len(warnings) == (words is not None) and (words is None or words in warnings[0])


def test_a_model_of_random_weights_can_be_given_on_the_command_line(plan, documents):
    sizes = "hidden_size:32,num_hidden_layers:1,num_attention_heads:2,intermediate_size:32"
    made = f"model.init={{model_type:llama,{sizes}}}"
    own = ["model.path=null", "model.tokenizer=assets/tiny", made, "+model.init.max_position_embeddings=256"]
    config = plan("eval=none", "data=jsonl", documents(*[LONG] * 40), *own).base
    assert (config.hidden_size, config.max_position_embeddings) == (32, 256)


def test_the_watch_asks_other_prompts_than_the_evaluation(plan, documents):
    """Or a model chosen by watch.best would be measured on what it was chosen by."""
    plan("eval=none", "data=jsonl", documents(*[LONG] * 40))
    assert plan.cfg.watch.seed != plan.cfg.eval.seed


def test_where_it_is_searched_the_largest_micro_batch_stays_open(plan, documents, monkeypatch):
    """Until the model is there; of a number that was found before and no longer divides the batch, too."""
    monkeypatch.setattr(micro_batch, "DEVICES", ("cpu",))
    planned = plan("eval=none", "data=jsonl", documents(LONG), "trainer.global_batch=6", "trainer.micro_batch=auto")
    assert plan.cfg.trainer.micro_batch == "auto" and planned.trainer.accumulate_grad_batches == 6
    assert [one.global_batch for one in planned.trainer.callbacks if isinstance(one, MicroBatch)] == [6]


@pytest.mark.parametrize(
    ("found", "wanted"), [("2", 2), ("4", "auto"), ("auto", "auto"), ("[", "auto"), (None, "auto")]
)
def test_a_run_that_goes_on_takes_the_micro_batch_it_found(tmp_path, monkeypatch, found, wanted):
    monkeypatch.setattr(micro_batch, "DEVICES", ("cpu",))
    if found is not None:
        (tmp_path / "config.yaml").write_text(f"trainer:\n  micro_batch: {found}\n")
    cfg = OmegaConf.create({"trainer": {"micro_batch": "auto", "global_batch": 6}})
    trainer = SimpleNamespace(world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "step-1", 1, {})
    number = preflight.choose_micro_batch(cfg, trainer, checkpoint)
    assert cfg.trainer.micro_batch == wanted and number == (2 if wanted == 2 else 1)
    assert trainer.accumulate_grad_batches == 6 // number
