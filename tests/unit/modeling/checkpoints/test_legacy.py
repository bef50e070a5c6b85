"""The importer of older folders: fabricated ones, against a forward pass written anew with the old formulas."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pose.app.legacy import main
from pose.errors import CheckpointError
from pose.modeling.checkpoints.legacy import import_folder, modernise
from pose.modeling.load import build_model, load_config, rope_geometry
from pose.modeling.rotary import target_len_of

WINDOW, FACTOR, HEAD_DIM = 64, 8.0, 16
THETA = 10_000.0 ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)


def old_folder(folder, rope_scaling, safetensors=True, **options):
    """A tiny LLaMA of random weights as older programs left it: 2 layers, 4 heads of 16, 2 of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"], raw["dtype"]
    raw |= {"torch_dtype": "float32", "transformers_version": "4.31.0", "rope_scaling": rope_scaling}
    (folder / "config.json").write_text(json.dumps(raw | options))
    if not safetensors:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": WINDOW, "bos_token": "<s>", "auto_map": {"AutoTokenizer": ["x.X", None]}})
    )
    for name in ("modeling_llama.py", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"):
        (folder / name).write_text("left behind")
    return folder, {name: tensor.double() for name, tensor in model.state_dict().items()}


def norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def forward(weights, tokens, positions, inv_freq, attention_factor):
    """The logits of a LLaMA, in float64 and from the papers alone."""
    angles = torch.from_numpy(positions.numpy()[:, None] * np.tile(inv_freq, 2))
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor

    def rotate(x):
        half = HEAD_DIM // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    hidden = weights["model.embed_tokens.weight"][tokens]
    causal = torch.ones(len(tokens), len(tokens)).tril().bool()
    for layer in range(2):
        w = {name.split(f"layers.{layer}.")[-1]: value for name, value in weights.items() if f"layers.{layer}." in name}
        x = norm(hidden, w["input_layernorm.weight"])
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj.weight"].T).view(len(tokens), -1, HEAD_DIM).transpose(0, 1) for name in "qkv"
        )
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = rotate(q) @ rotate(k).transpose(1, 2) / HEAD_DIM**0.5
        mixed = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        hidden = hidden + mixed.transpose(0, 1).reshape(len(tokens), -1) @ w["self_attn.o_proj.weight"].T
        x = norm(hidden, w["post_attention_layernorm.weight"])
        gate, up = x @ w["mlp.gate_proj.weight"].T, x @ w["mlp.up_proj.weight"].T
        hidden = hidden + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return norm(hidden, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


# ----- the formulas of the released code (dwzhu-pku/PoSE, src/my_modeling_llama.py), and of standard YaRN -----


def yarn_mask():
    """1 where a dimension is left alone: before the one that turns 32 times in the window; 0 from 1 turn on."""

    def dimension(turns):
        return HEAD_DIM * math.log(WINDOW / (turns * 2 * math.pi)) / (2 * math.log(10_000))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), HEAD_DIM - 1)
    return 1 - np.clip((np.arange(HEAD_DIM // 2) - low) / (high - low), 0, 1)


NTK_FREQUENCIES = (10_000.0 * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2))) ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
REVISED = THETA / ((1 - yarn_mask()) * FACTOR + yarn_mask())
STANDARD = THETA / FACTOR * (1 - yarn_mask()) + THETA * yarn_mask()
MSCALE = 0.1 * math.log(FACTOR) + 1
LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 8.0, 9.0]


def dynamic_frequencies(length):
    base = 10_000.0 * (FACTOR * length / WINDOW - (FACTOR - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))
    return base ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)


YARN = {"type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW}
SCALED_LEN = int(WINDOW * FACTOR)
# (rope_scaling, max_position_embeddings, arguments, inv_freq, attention factor, name)
FORMS = {
    "none": (None, SCALED_LEN, {}, THETA, 1.0, None),
    "linear of the released code": (
        {"type": "linear", "factor": FACTOR}, SCALED_LEN, {"window": WINDOW}, THETA / 8, 1.0, "linear",
    ),
    "linear of transformers": (
        {"type": "linear", "factor": FACTOR}, WINDOW, {"window": WINDOW}, THETA / 8, 1.0, "linear",
    ),
    "vanilla_ntk": ({"type": "vanilla_ntk", "factor": FACTOR}, SCALED_LEN, {}, NTK_FREQUENCIES, 1.0, "ntk"),
    "ntk": ({"rope_type": "ntk", "factor": FACTOR}, WINDOW, {"window": WINDOW}, NTK_FREQUENCIES, 1.0, "ntk"),
    "dynamic": ({"type": "dynamic", "factor": FACTOR}, WINDOW, {}, dynamic_frequencies(SCALED_LEN), 1.0, "dynamic"),
    "yarn of the released code": (YARN, SCALED_LEN, {"yarn": "revised"}, REVISED, MSCALE, "yarn_revised"),
    "standard yarn": (YARN, SCALED_LEN, {"yarn": "standard"}, STANDARD, MSCALE, "yarn"),
    "yarn of Nous": (YARN | {"finetuned": True}, SCALED_LEN, {}, STANDARD, MSCALE, "yarn"),
    "yarn of transformers 4": (
        {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW, "attention_factor": 1.3},
        WINDOW, {}, STANDARD, 1.3, "yarn",
    ),
    "longrope": (
        {"type": "su", "long_factor": LONG, "short_factor": [1] * 8, "original_max_position_embeddings": WINDOW},
        SCALED_LEN, {}, THETA / LONG, math.sqrt(1 + math.log(8) / math.log(64)), "longrope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("safetensors", [True, False])
def test_an_old_folder_gives_the_logits_of_its_formulas(tmp_path, form, safetensors):
    """At positions up to the window that it was extended to, in plain transformers and in this package."""
    rope_scaling, max_positions, arguments, inv_freq, attention_factor, name = FORMS[form]
    old, weights = old_folder(tmp_path / "old", rope_scaling, safetensors, max_position_embeddings=max_positions)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    import_folder(old, tmp_path / "new", **arguments)

    tokens = torch.randint(101, (32,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(16), torch.arange(SCALED_LEN - 16, SCALED_LEN)])
    wanted = forward(weights, tokens, positions, inv_freq, attention_factor)
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32),
        build_model(load_config(str(tmp_path / "new")), str(tmp_path / "new"), "sdpa"),
    ]
    for model in models:
        with torch.no_grad():
            logits = model(
                tokens[None], position_ids=positions[None], attention_mask=torch.ones(1, 32), use_cache=False
            ).logits[0]
        assert ((logits - wanted).abs().max() / wanted.std()).item() < 1e-3

    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"], "transformers 4 and MLX read it there"
    if (kind := raw["rope_parameters"]["rope_type"]) != "default":
        assert raw["rope_scaling"]["type"] == kind
    config = load_config(str(tmp_path / "new"))
    assert target_len_of(config) == SCALED_LEN
    assert config.max_position_embeddings == (WINDOW if name == "dynamic" else SCALED_LEN)
    if name is None:
        assert not hasattr(config, "pose") and config.rope_parameters["rope_type"] == "default"
    else:
        assert (config.pose["rope"], config.pose["window"], config.pose["factor"]) == (name, WINDOW, FACTOR)
        assert rope_geometry(config).window == WINDOW
    assert raw["dtype"] == "float32"
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text()) == {
        "model_max_length": SCALED_LEN, "bos_token": "<s>"
    }  # fmt: skip
    weights_file = "model.safetensors" if safetensors else "pytorch_model.bin"
    assert {f.name for f in (tmp_path / "new").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer_config.json", weights_file
    }  # fmt: skip
    assert (tmp_path / "new" / weights_file).stat().st_ino == (old / weights_file).stat().st_ino
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["new", "old"], "nothing half-written is left"


def raw(rope_scaling, **options):
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    return sizes | {"rope_scaling": rope_scaling} | options


@pytest.mark.parametrize("old", [None, {"type": "linear", "factor": 2.0}])
def test_a_config_without_a_window_is_not_imported(old):
    """LLaMA's class would say 2,048."""
    config = raw(old)
    del config["max_position_embeddings"]
    with pytest.raises(
        CheckpointError, match=r"has no max_position_embeddings in its config\.json, and 2048, the default"
    ):
        modernise(config, window=2048)


def test_yarn_of_a_model_the_released_code_has_no_class_for_is_the_standard_one():
    config = modernise(raw(YARN, model_type="qwen2", rope_theta=1e6))
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["rope_theta"] == 1e6


def test_a_base_of_its_own_and_llama3_are_kept():
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = modernise(raw(llama3, rope_theta=500_000.0, max_position_embeddings=131_072))
    assert config.rope_parameters == llama3 | {"rope_theta": 500_000.0}
    assert config.max_position_embeddings == 131_072
    assert config.pose == {"rope": "llama3", "window": 8192, "factor": 8.0}
    # Llama-3.2: its factor is not the ratio of its windows
    config = modernise(raw(llama3 | {"factor": 32.0}, rope_theta=500_000.0, max_position_embeddings=131_072))
    assert config.max_position_embeddings == 131_072
    config = modernise(raw(llama3, rope_theta=500_000.0, max_position_embeddings=8192))
    assert config.max_position_embeddings == 65_536, "where the config has the window before"


@pytest.mark.parametrize(
    ("old", "arguments", "message"),
    [
        (raw(YARN), {}, "say --yarn revised or --yarn standard"),
        (raw(YARN), {"yarn": "new"}, "yarn='new' is not accepted: give revised or standard"),
        (raw({"type": "linear", "factor": 8.0}), {}, "say --window 512 or --window 64"),
        (raw({"type": "ntk", "factor": 8.0}), {}, "say --window 512 or --window 64"),
        (raw({"type": "yarn", "factor": 8.0}), {"yarn": "standard"}, "say --window 512 or --window 64"),
        (raw({"type": "linear", "factor": 8.0}, max_sequence_length=77), {}, "say --window 512 or --window 64"),
        (raw({"type": "linear", "factor": 8.0}), {"window": -1}, "--window -1 is not accepted"),
        (
            raw({"type": "linear", "factor": 8.0}, num_attention_heads=0),
            {},
            "config.json has 0 under 'num_attention_heads'",
        ),
        (raw({"type": "linear", "factor": 8.0}, hidden_size="x"), {}, "config.json has 'x' under 'hidden_size'"),
        (raw({"type": "xpos", "factor": 2.0}), {}, "the type 'xpos', which is not known: default, linear, ntk,"),
        (raw({"type": "linear"}), {}, "it has no factor"),
        (raw({"type": "linear", "factor": "8"}), {}, "config.json has '8' under 'rope_scaling.factor'"),
        (raw({"type": "dynamic", "factor": 2.0, "alpha": 9}), {}, "it has keys beside those that are known"),
        (raw({"type": "dynamic", "factor": 2.0}), {"window": 256}, "its window is max_position_embeddings=512"),
        (
            raw({"type": "vanilla_ntk", "factor": 8.0}, rope_theta=5e5),
            {},
            "rope_theta=500000.0 is not what the released",
        ),
        (raw(YARN, rope_theta=5e5), {"yarn": "revised"}, "rope_theta=500000.0 is not what the released"),
        (raw({"type": "su", "long_factor": [1] * 7}), {}, "rope.long_factor has 7 numbers, and this model needs 8"),
        (raw(None, model_type="baichuan"), {}, "baichuan"),
        (raw({"type": "linear", "factor": 8.0}, model_type="gptj"), {}, "a gptj folder cannot be imported"),
        (raw(None, model_type=["llama"]), {}, "config.json has model_type=['llama'], where a string is expected"),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 4}, {}, "a bloom model has no max_position_embeddings"),
        (raw(None, rope_parameters={"rope_theta": 1e4}), {}, "of transformers 5 already"),
    ],
)
def test_what_cannot_be_imported_is_named(old, arguments, message):
    with pytest.raises(CheckpointError) as error:
        modernise(old, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"max_sequence_length": 64}, 64),  # the model's own, as LLaMA's first folders have it
        ({"max_sequence_length": 4096}, 512),  # the extended one, as Vicuna's have it
        ({"original_max_position_embeddings": 128}, 128),
    ],
)
def test_a_window_that_the_folder_tells_is_taken(options, window):
    config = modernise(raw({"type": "linear", "factor": 8.0}, **options))
    assert rope_geometry(config).window == window and target_len_of(config) == max(512, 8 * window)


def test_what_links_lead_to_is_not_copied_out_of_elsewhere(tmp_path):
    """A key of the user, behind a name that a stranger chose; nor weights."""
    old, _ = old_folder(tmp_path / "old", {"type": "vanilla_ntk", "factor": FACTOR}, max_position_embeddings=SCALED_LEN)
    (tmp_path / "secret").write_text("a private key")
    (old / "notes.txt").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=rf"notes\.txt is a link to {tmp_path}/secret, outside its folder"):
        import_folder(old, tmp_path / "new")
    (old / "notes.txt").unlink()
    (old / "model.safetensors").rename(tmp_path / "weights")
    (old / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is a link to {tmp_path}/weights"):
        import_folder(old, tmp_path / "new")
    (old / "model.safetensors").unlink()
    (tmp_path / "weights").rename(old / "weights")
    (old / "model.safetensors").symlink_to("weights")  # inside
    import_folder(old, tmp_path / "new")
    assert not (tmp_path / "new" / "model.safetensors").is_symlink()


def test_a_folder_of_the_hubs_cache_is_imported(tmp_path):
    """Which is made of links to the blobs beside it, and to nothing else."""
    old, _ = old_folder(tmp_path / "old", {"type": "vanilla_ntk", "factor": FACTOR}, max_position_embeddings=SCALED_LEN)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(old.iterdir())):
        shutil.copy(file, repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    import_folder(snapshot, tmp_path / "new")
    assert build_model(load_config(str(tmp_path / "new")), str(tmp_path / "new"), "sdpa")
    (tmp_path / "secret").touch()
    (snapshot / "notes.txt").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link"):
        import_folder(snapshot, tmp_path / "other")


def test_shards_and_their_index_are_imported_and_other_weights_left(tmp_path):
    old, _ = old_folder(tmp_path / "old", {"type": "vanilla_ntk", "factor": FACTOR}, max_position_embeddings=SCALED_LEN)
    weights = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    (old / "parts").mkdir()
    save_file(weights, old / "parts" / "a.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/a.safetensors")}
    (old / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(weights, old / "pytorch_model.bin")
    import_folder(old, tmp_path / "new")
    assert not (tmp_path / "new" / "pytorch_model.bin").exists()
    model = build_model(load_config(str(tmp_path / "new")), str(tmp_path / "new"), "sdpa")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_folders_that_cannot_be_imported_are_named_and_nothing_is_left(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing/config\.json cannot be read: No such file"):
        import_folder(tmp_path / "nothing", tmp_path / "new")
    old, _ = old_folder(tmp_path / "old", YARN)
    with pytest.raises(CheckpointError, match="old exists: give a new folder"):
        import_folder(old, old)
    with pytest.raises(CheckpointError, match="--yarn revised"):
        import_folder(old, tmp_path / "new")
    (old / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it has none of model"):  # training_args.bin is none
        import_folder(old, tmp_path / "new", "revised")
    assert [f.name for f in tmp_path.iterdir()] == ["old"]


def test_what_the_system_refuses_is_named(tmp_path, monkeypatch):
    old, _ = old_folder(tmp_path / "old", YARN)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=rf"cannot be imported to {tmp_path}/file/new: .*{tmp_path}/file"):
        import_folder(old, tmp_path / "file" / "new", "revised")

    def refused(*args):
        raise PermissionError(13, "Permission denied", "old/merges.txt")

    (old / "merges.txt").write_text("")
    monkeypatch.setattr("pose.modeling.checkpoints.legacy.shutil.copy", refused)
    with pytest.raises(CheckpointError, match=r"Permission denied \(old/merges\.txt\)"):
        import_folder(old, tmp_path / "new", "revised")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "old"]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    old, _ = old_folder(tmp_path / "old", YARN, max_position_embeddings=SCALED_LEN)
    arguments = ["legacy", str(old), str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "--yarn revised" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--yarn", "revised"])
    main()
    assert str(tmp_path / "new") in capsys.readouterr().out
    assert load_config(str(tmp_path / "new")).pose["rope"] == "yarn_revised"
