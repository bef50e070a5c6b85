"""From a folder or a bare config to a model with scaled RoPE, and frequencies that stay in fp32."""

import copy
import http.server
import io
import json
import math
import pickle
import shutil
import threading
import time

import huggingface_hub
import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

from pose.errors import CheckpointError, ConfigError, GuardError
from pose.modeling.checkpoints.hub import from_hub, hub_answers, is_available
from pose.modeling.load import (
    build_model,
    load_config,
    load_tokenizer,
    rope_geometry,
    scale_config,
)
from pose.modeling.rotary import keep_frequencies_fp32, rotary_modules, target_len_of
from pose.rope import NTK, Linear, RopeGeometry, Unscaled, Yarn, YarnRevised
from pose.training.module import PoseModule

BASE, HEAD_DIM, WINDOW, TARGET_LEN, FACTOR = 10_000.0, 16, 256, 2048, 8.0


def tiny_config(cls=LlamaConfig, **options):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return cls(**sizes | options)


def yarn_ramp():
    """gamma of the YaRN paper by the number of turns, on whole dimensions: 1 is left alone."""

    def dimension(turns):
        return HEAD_DIM * math.log(WINDOW / (turns * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    assert 0 <= low < high < HEAD_DIM // 2
    return np.clip((high - np.arange(HEAD_DIM // 2)) / (high - low), 0, 1)


THETA = BASE ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
YARN_ATTENTION = 0.1 * math.log(FACTOR) + 1
CLOSED_FORMS = [
    (Unscaled(), THETA, 1.0),
    (Linear(), THETA / FACTOR, 1.0),
    (NTK(), THETA * FACTOR ** (-2 * np.arange(HEAD_DIM // 2) / (HEAD_DIM - 2)), 1.0),
    (Yarn(), yarn_ramp() * THETA + (1 - yarn_ramp()) * THETA / FACTOR, YARN_ATTENTION),
    (YarnRevised(), 1 / (yarn_ramp() / THETA + (1 - yarn_ramp()) * FACTOR / THETA), YARN_ATTENTION),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny LLaMA's folder, without a tokenizer."""
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("scaling", "inv_freq", "factor"), CLOSED_FORMS, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_folder", [True, False])
def test_built_frequencies_equal_the_closed_form(checkpoint, scaling, inv_freq, factor, dtype, from_folder):
    """In the built model, at first and after a pass over short and over long positions."""
    config = load_config(str(checkpoint))
    scale_config(config, scaling, TARGET_LEN)
    model = build_model(config, str(checkpoint) if from_folder else None, "sdpa", dtype)
    assert model.dtype == dtype
    assert model.config.max_position_embeddings == TARGET_LEN
    (module,) = rotary_modules(model)
    for last_position in (None, 3, TARGET_LEN - 1, 3):
        if last_position is not None:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), position_ids=torch.tensor([[0, last_position]]))
        assert module.inv_freq.dtype == torch.float32
        np.testing.assert_allclose(module.inv_freq.double().numpy(), inv_freq, rtol=1e-6)
        assert module.attention_scaling == pytest.approx(factor, abs=1e-9)


def test_built_model_owns_its_config():
    """Two models built from one config with different backends keep their own."""
    config = tiny_config()
    first, second = (build_model(config, None, backend) for backend in ("sdpa", "eager"))
    assert first.config._attn_implementation == "pose_sdpa"
    assert second.config._attn_implementation == "pose_eager"


def test_explicit_factor_is_kept():
    config = tiny_config()
    assert scale_config(config, Linear(factor=4.0), TARGET_LEN).factor == 4.0
    (module,) = rotary_modules(build_model(config, None, "sdpa"))
    np.testing.assert_allclose(module.inv_freq.numpy(), THETA / 4, rtol=1e-6)


def test_partial_rotary_embedding_is_kept():
    """GPT-NeoX rotates a share of the dimensions; the closed form is over those alone."""
    config = tiny_config(GPTNeoXConfig, rope_parameters={"rope_theta": BASE, "partial_rotary_factor": 0.25})
    assert rope_geometry(config) == RopeGeometry(BASE, 4, WINDOW)
    scale_config(config, Linear(), TARGET_LEN)
    (module,) = rotary_modules(build_model(config, None, "sdpa"))
    np.testing.assert_allclose(module.inv_freq.numpy(), np.array([1, 0.01]) / FACTOR, rtol=1e-6)


def test_geometry_reads_head_dim_theta_and_scaling():
    assert rope_geometry(tiny_config()) == RopeGeometry(BASE, HEAD_DIM, WINDOW, "default")
    config = tiny_config(head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert rope_geometry(config) == RopeGeometry(5e5, 32, WINDOW, "default")
    scale_config(config, Yarn(), TARGET_LEN)
    assert rope_geometry(config) == RopeGeometry(5e5, 32, WINDOW, "yarn")


def test_target_below_the_window_is_refused():
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"target_len=255 is below .* 256 tokens"):
        scale_config(config, Linear(), WINDOW - 1)
    assert config.max_position_embeddings == WINDOW
    scale_config(config, Linear(), WINDOW)


def test_scaled_checkpoint_is_refused():
    """Any method but none: rope=none keeps the checkpoint's frequencies."""
    config = tiny_config()
    scale_config(config, Linear(), TARGET_LEN)
    before = dict(config.rope_parameters)
    for scaling in (Linear(), NTK(), Yarn(), YarnRevised()):
        with pytest.raises(ConfigError, match=r"already scaled.*'linear'.*rope=none"):
            scale_config(config, scaling, 2 * TARGET_LEN)
    assert dict(config.rope_parameters) == before
    scale_config(config, Unscaled(), 2 * TARGET_LEN)
    assert dict(config.rope_parameters) == before


def test_model_without_rope_is_refused():
    with pytest.raises(ConfigError, match="gpt2 model has no single rotary embedding"):
        scale_config(GPT2Config(n_embd=8, n_layer=1, n_head=2), Linear(), TARGET_LEN)


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such", "~/no/such", "no", "no/such/folder"])
def test_missing_folder_is_named(load, path):
    with pytest.raises(CheckpointError, match=f"no folder at {path}"):
        load(path)


@pytest.mark.parametrize(
    ("load", "message"),
    [(load_config, r"the config of {} cannot be loaded: \S"), (load_tokenizer, "{} holds no tokenizer")],
)
def test_folder_without_a_model_is_named(tmp_path, load, message):
    with pytest.raises(CheckpointError, match=message.format(tmp_path)):
        load(str(tmp_path))


def test_config_that_is_no_model_is_named(tmp_path):
    for content in ("{}", '{"model_type": "nothing-known"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=f"the config of {tmp_path} cannot be loaded"):
            load_config(str(tmp_path))


def test_folder_without_weights_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"the weights of {checkpoint} cannot be loaded"):
        build_model(tiny_config(), str(checkpoint), "sdpa")


def test_loaded_weights_are_the_checkpoints(checkpoint):
    wanted = load_file(checkpoint / "model.safetensors")
    got = build_model(load_config(str(checkpoint)), str(checkpoint), "eager").state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_missing_weights_are_named(checkpoint):
    """transformers would fill them with random numbers and go on."""
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights .*model\.layers\.1\.self_attn\.q_proj\.weight"):
        build_model(load_config(str(checkpoint)), str(checkpoint), "sdpa")


def test_weights_of_another_shape_are_refused(checkpoint):
    config = load_config(str(checkpoint))
    config.vocab_size = 77
    with pytest.raises(CheckpointError):
        build_model(config, str(checkpoint), "sdpa")


def test_tied_weights_are_not_missing(tmp_path):
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def protected_model():
    config = tiny_config()
    scale_config(config, YarnRevised(), TARGET_LEN)
    return build_model(config, None, "sdpa")


def cast_through_a_copy(model):
    return copy.deepcopy(model).to(torch.bfloat16)


def cast_through_a_pickle(model):
    return pickle.loads(pickle.dumps(model)).to(torch.bfloat16)


def cast_after_state_dict(model):
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    return model.to(torch.bfloat16)


def cast_inside_a_parent(model):
    return torch.nn.Sequential(torch.nn.ModuleDict({"model": model})).to(dtype=torch.bfloat16)[0]["model"]


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.half().float().bfloat16(),
        cast_through_a_copy,
        cast_through_a_pickle,
        cast_after_state_dict,
        cast_inside_a_parent,
    ],
    ids=["to", "bfloat16", "half", "float64", "device", "often", "deepcopy", "pickle", "state_dict", "parent"],
)
def test_casts_leave_frequencies_in_fp32(cast):
    """To the last bit, while every weight is cast."""
    model = protected_model()
    (module,) = rotary_modules(model)
    before = module.inv_freq.clone()
    cast_model = cast(model)
    (module,) = rotary_modules(cast_model)
    assert module.inv_freq.dtype == torch.float32
    assert torch.equal(module.inv_freq, before)
    assert all(parameter.dtype != torch.float32 for parameter in cast_model.parameters())
    assert module.inv_freq is dict(module.named_buffers())["inv_freq"]


def test_a_copy_is_its_own():
    """A cast of a copy touches the copy, and the original stays where it was."""
    model = protected_model()
    clone = copy.deepcopy(model).to("meta")
    assert rotary_modules(clone)[0].inv_freq.device.type == "meta"
    assert rotary_modules(model)[0].inv_freq.device.type == "cpu"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_moves_take_frequencies_along(dtype):
    model = protected_model().to("meta", dtype)
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "meta"
    assert rotary_modules(model)[0].inv_freq.dtype == torch.float32


def test_protecting_twice_is_harmless():
    model = protected_model()
    keep_frequencies_fp32(model)
    assert rotary_modules(model.bfloat16())[0].inv_freq.dtype == torch.float32


class Steps(L.Callback):
    """Notes the dtypes a step trains with."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.inv_freq = rotary_modules(pl_module)[0].inv_freq.clone()
        self.weights = next(pl_module.parameters()).dtype


def fit_one_step(model, scaling, tmp_path):
    module = PoseModule(
        lambda strategy: model,
        expected=scaling.frequencies(rope_geometry(tiny_config())),
        target_len=TARGET_LEN,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        max_steps=1,
    )
    tokens = torch.randint(101, (2, 16))
    positions = torch.cat([torch.arange(8), torch.arange(2000, 2008)]).expand(2, -1)
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    steps = Steps()
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=1,
        precision="bf16-true",
        logger=False,
        callbacks=[steps],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    return steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", [Linear(), YarnRevised()], ids=lambda s: s.name)
def test_lightning_bf16_true_leaves_frequencies_in_fp32(tmp_path, scaling):
    """A real step, with the guards on; without the protection the guards end the run."""
    config = tiny_config()
    scaling = scale_config(config, scaling, TARGET_LEN)
    model = build_model(config, None, "sdpa")
    (wanted,) = [module.inv_freq.clone() for module in rotary_modules(model)]
    steps = fit_one_step(model, scaling, tmp_path)
    assert steps.weights == torch.bfloat16
    assert torch.equal(steps.inv_freq, wanted)

    unprotected = AutoModelForCausalLM.from_config(config, attn_implementation="pose_sdpa")
    with pytest.raises(GuardError, match="inv_freq is bfloat16"):
        fit_one_step(unprotected, scaling, tmp_path)


def test_saved_config_holds_the_scaling(tmp_path):
    """What scale_config wrote is what a folder says."""
    config = tiny_config()
    scale_config(config, Yarn(), TARGET_LEN)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] == TARGET_LEN
    assert saved["rope_parameters"]["rope_type"] == "yarn"
    assert saved["rope_parameters"]["factor"] == FACTOR
    assert saved["rope_parameters"]["original_max_position_embeddings"] == WINDOW


@pytest.mark.parametrize("method", ["linear", "ntk"])
def test_an_extended_folder_remembers_its_window(tmp_path, method):
    """Linear and NTK leave no trace of it in transformers' own fields; scaling twice is refused."""
    scaling = {"linear": Linear(), "ntk": NTK()}[method]
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256)
    scale_config(config, scaling, 2048)
    config.save_pretrained(tmp_path)
    again = load_config(str(tmp_path))
    assert rope_geometry(again).window == 256 and again.max_position_embeddings == 2048
    with pytest.raises(ConfigError, match="already scaled"):
        scale_config(again, scaling, 4096)


def test_a_folder_that_was_trained_unscaled_remembers_its_window(tmp_path):
    """Its frequencies are the base model's, so that another scaling is by the window of that."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256)
    scale_config(config, Unscaled(), 256)
    assert not hasattr(config, "pose")
    scale_config(config, Unscaled(), 1024)
    config.save_pretrained(tmp_path)
    again = load_config(str(tmp_path))
    assert rope_geometry(again) == RopeGeometry(10_000.0, 16, 256) and again.max_position_embeddings == 1024
    assert scale_config(again, Yarn(), 4096).factor == 16
    scale_config(again, Unscaled(), 8192)
    assert rope_geometry(again).rope_type == "yarn", "what is scaled stays noted as it is"


def test_a_config_without_a_window_is_refused(tmp_path):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=2048)
    config.save_pretrained(tmp_path)
    load_config(str(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"has no max_position_embeddings in its config\.json, and 2048"):
        load_config(str(tmp_path))


def test_a_sliding_window_that_the_target_outgrows_is_refused():
    config = MistralConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, sliding_window=64)
    with pytest.raises(ConfigError, match=r"last 64 tokens only.*2048 \(pose.target_len\): give a copy of the folder"):
        scale_config(config, Yarn(), 2048)  # a target of 64 would be below the window
    config.sliding_window = 1024
    with pytest.raises(ConfigError, match=r"give a target of at most 1024, or a copy of the folder"):
        scale_config(config, Yarn(), 2048)
    config.sliding_window = None
    scale_config(config, Yarn(), 2048)


class Malicious:
    """What a pickle may run when it is opened."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code ran')",))


def test_weights_in_a_pickle_are_read_as_tensors(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    got = build_model(load_config(str(checkpoint)), str(checkpoint), "sdpa").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())
    torch.save(weights | {"more": Malicious()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"more than tensors.*pickled code is never run.*safetensors"):
        build_model(load_config(str(checkpoint)), str(checkpoint), "sdpa")


def test_pickled_code_is_not_run_where_weights_are_converted(tmp_path):
    GPTJConfig(n_embd=64, n_head=4, n_layer=1, rotary_dim=8).save_pretrained(tmp_path)
    torch.save({"lm_head.bias": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"more than tensors.*pickled code is never run"):
        build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa")


def add_code(folder, **names):
    """Makes config.json name code of the folder, which ends the process when it runs."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}} | names
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")


def test_code_of_a_folder_is_not_run_where_transformers_has_the_class(checkpoint, tmp_path):
    """Nor named in what is saved."""
    add_code(checkpoint)
    model = build_model(load_config(str(checkpoint)), str(checkpoint), "sdpa")
    assert type(model) is LlamaForCausalLM
    model.save_pretrained(tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_a_model_that_needs_code_of_its_own_is_refused(checkpoint):
    add_code(checkpoint, model_type="of_its_own")
    for load in (load_config, lambda path: build_model(tiny_config(), path, "sdpa")):
        with pytest.raises(CheckpointError, match=rf"{checkpoint} needs code of its own .*'of_its_own'.*never run"):
            load(str(checkpoint))


@pytest.mark.parametrize("with_tokenizer_json", [False, True])
def test_a_tokenizer_that_needs_code_of_its_own_is_refused(checkpoint, with_tokenizer_json):
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}}
    (checkpoint / "code.py").write_text("raise SystemExit('remote code ran')")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    if with_tokenizer_json:
        shutil.copy("assets/tiny/tokenizer.json", checkpoint)
    with pytest.raises(CheckpointError, match=r"needs code of its own .*tokenizer_config.json.*model\.tokenizer="):
        load_tokenizer(str(checkpoint))


@pytest.mark.parametrize("cls", [LlamaConfig, MistralConfig, Qwen2Config, PhiConfig, GPTNeoXConfig, GemmaConfig])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, cls):
    """transformers makes an empty one up for some of them."""
    tiny_config(cls).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no tokenizer .*model\.tokenizer="):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_in_sentencepieces_form(checkpoint):
    """As LLaMA's own folders have it, tokenizer.model alone; BOS and a space come first."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat in 1999", "a hat and a cat"] * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (checkpoint / "tokenizer.model").write_bytes(out.getvalue())
    own = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    tokenizer = load_tokenizer(str(checkpoint))
    for text in ("the cat sat in 1999", "  a hat\non a é mat "):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)
        assert tokenizer(text).input_ids == [1, *own.encode(text)]
        assert tokenizer.decode(own.encode(text)) == text


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch):
    """Without an answer an id fails within seconds; transformers alone would try for half a minute for each file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    hub_answers.cache_clear()
    try:
        assert from_hub("config", lambda path, revision, **options: options, "a/b", None) == {"local_files_only": True}
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match="the config of some-owner/some-model cannot be loaded: "):
            load_config("some-owner/some-model")
        with pytest.raises(CheckpointError, match="the tokenizer of some-owner/some-model cannot be loaded: "):
            load_tokenizer("some-owner/some-model")
        assert time.perf_counter() - start < 8
        assert not is_available("some-owner/some-model") and is_available("assets/tiny")
    finally:
        hub_answers.cache_clear()


@pytest.mark.parametrize("status", [200, 403])
def test_a_hub_that_answers_anything_is_there(monkeypatch, status):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub_answers.__wrapped__()
    finally:
        server.shutdown()


def test_an_id_in_the_local_cache_is_available(tmp_path, monkeypatch):
    """With a config and weights, and not with a config alone."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert not is_available("owner/name")
    (snapshot / "pytorch_model.bin").touch()
    assert is_available("owner/name")
    assert not is_available("owner/name", revision="v2")


def test_a_scaling_that_transformers_does_not_know_leads_to_the_importer(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "vanilla_ntk", "factor": 8.0}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"'vanilla_ntk', which transformers does not know.*pose\.modeling\.legacy"
    ):
        load_config(str(checkpoint))


def test_the_first_form_of_longrope_leads_to_the_importer(checkpoint):
    """transformers takes its name for longrope, and then misses a key of longrope's."""
    of_phi = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"model_type": "phi3", "rope_scaling": of_phi, "original_max_position_embeddings": WINDOW}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'su', which transformers does not know.*pose\.modeling\.legacy"):
        load_config(str(checkpoint))


def old_config(folder, rope_scaling, **options):
    """Gives a folder the keys that transformers 4 wrote."""
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_theta": BASE, "rope_scaling": rope_scaling} | options)
    )


@pytest.mark.parametrize(("longest", "target"), [(WINDOW, 4 * WINDOW), (4096, 4096)])
def test_the_window_of_yarn_is_its_factor_times_the_own_one(checkpoint, longest, target):
    """Many folders leave the model's own length in max_position_embeddings; the frequencies are as transformers'."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
    old_config(checkpoint, yarn, max_position_embeddings=longest)
    config = load_config(str(checkpoint))
    assert (rope_geometry(config).window, target_len_of(config)) == (WINDOW, target)
    (ours,) = rotary_modules(build_model(config, str(checkpoint), "sdpa"))
    (own,) = rotary_modules(LlamaForCausalLM.from_pretrained(checkpoint))
    assert torch.equal(ours.inv_freq, own.inv_freq) and ours.attention_scaling == own.attention_scaling


def test_the_window_that_we_noted_is_kept(tmp_path):
    """A factor beyond the target is no longer window."""
    config = tiny_config()
    scale_config(config, Yarn(factor=16.0), TARGET_LEN)
    config.save_pretrained(tmp_path)
    assert target_len_of(load_config(str(tmp_path))) == TARGET_LEN


def test_a_window_that_a_folder_does_not_tell_is_said(checkpoint, capsys):
    """Once for a folder."""
    old_config(checkpoint, {"type": "linear", "factor": 4.0})
    for _ in range(2):
        assert target_len_of(load_config(str(checkpoint))) == WINDOW
    said = capsys.readouterr().out
    assert said.count("Warning: ") == 1 and f"max_position_embeddings={WINDOW} is the window before or after" in said
