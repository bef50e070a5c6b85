"""An export is a plain Hugging Face folder: the same logits without pose, whole or not there."""

import json
import logging
import os
import re
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import Chunk, WeightConverter

import pose.modeling.export.check
import pose.modeling.export.weights
from pose.errors import GuardError, TrainingError
from pose.modeling.export import export_model, verify_export
from pose.modeling.export.check import ask, compare
from pose.modeling.export.weights import Weights
from pose.modeling.load import build_model, load_config, rope_geometry, scale_config
from pose.modeling.lora import LoraOptions, add_lora
from pose.rope import (
    NTK,
    Cope,
    Drope,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NTKByParts,
    Theta,
    Unscaled,
    Yarn,
    YarnRevised,
)

WINDOW, TARGET_LEN, VOCAB = 256, 2048, 101
DIVISORS = tuple(1.3**i for i in range(8))
METHODS = {
    s.name: s
    for s in (
        Unscaled(), Linear(), NTK(), Yarn(), YarnRevised(), Dynamic(), NTKByParts(), Llama3(),
        LongRope(long_factor=DIVISORS), Theta(theta=77_000.0), Drope(attention_factor=1.2), Cope(num_tapered=5),
    )
}  # fmt: skip
METHODS |= {f"{s.name}_shifted": s for s in (NTK(rcd_shift=True), Yarn(rcd_shift=True), YarnRevised(rcd_shift=True))}
ONE_LIST = ("yarn_revised", "cope", "ntk_shifted", "yarn_shifted", "yarn_revised_shifted")  # equal lists of divisors
# By transformers' type: where the export says what the window was.
SAYS_WINDOW = {"yarn", "llama3", "longrope"}

PLAIN_LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokens = torch.load("tokens.pt")
logits = {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    assert AutoTokenizer.from_pretrained(name).model_max_length == tokens.shape[1]
    with torch.no_grad():
        logits[name] = [model(ids).logits for ids in (tokens, tokens[:, :64])]
assert not [module for module in sys.modules if module.split(".")[0] == "pose"]
torch.save(logits, "logits.pt")
"""


def make_model(scaling, seed=0, attention="sdpa", **options):
    """A random model whose logits depend much on its positions."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    scale_config(config, scaling, TARGET_LEN)
    torch.manual_seed(seed)
    return build_model(config, None, attention).eval()


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", model_max_length=WINDOW)


@pytest.fixture
def exported(tmp_path, tokenizer):
    model = make_model(Yarn())
    export_model(model, tokenizer, tmp_path / "model")
    return model, tmp_path / "model"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@torch.no_grad()
def test_plain_transformers_gives_the_same_logits(script, tmp_path, tokenizer):
    """Every method, over the whole new window and over a short text, in a process without pose."""
    tokens = torch.randint(VOCAB, (1, TARGET_LEN), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    wanted = {}
    for name, scaling in METHODS.items():
        model = make_model(scaling)
        wanted[name] = [model(ids).logits for ids in (tokens, tokens[:, :64])]
        export_model(model, tokenizer, tmp_path / name)
    result = script("-c", PLAIN_LOAD, *METHODS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    got = torch.load(tmp_path / "logits.pt")
    for name in METHODS:
        for a, b in zip(got[name], wanted[name], strict=True):
            folded = name.startswith("yarn_") or name == "drope"  # rounded once more: export/test_fold.py
            assert (a - b).abs().max() < (5e-5 if folded else 1e-5), name
    for name in METHODS:  # and the methods are not all the same to these models
        others = [wanted[other][0] for other in METHODS if other != name]
        assert all((wanted[name][0] - other).abs().max() > 0.1 for other in others)


@torch.no_grad()
def test_mixed_windows_export_as_two_lists_and_leave_short_texts_to_the_original(tmp_path, tokenizer):
    model = make_model(LongRope(long_factor=DIVISORS, attention_factor=1.0))
    export_model(model, tokenizer, tmp_path / "model")
    parameters = json.loads((tmp_path / "model" / "config.json").read_text())["rope_parameters"]
    assert (parameters["short_factor"], parameters["long_factor"]) == ([1.0] * 8, list(DIVISORS))
    assert parameters["original_max_position_embeddings"] == WINDOW
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    original, long = make_model(Unscaled()), make_model(LongRope(long_factor=DIVISORS, short_factor=DIVISORS))
    for parameter, same in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(parameter, same)
    tokens = torch.randint(VOCAB, (1, TARGET_LEN), generator=torch.Generator().manual_seed(0))
    for length in (TARGET_LEN, 64, WINDOW, WINDOW + 1):  # up and down: transformers switches its lists on the way
        got, wanted = plain(tokens[:, :length]).logits, model(tokens[:, :length]).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5)
        is_original = (original(tokens[:, :length]).logits - got).abs().max() < 5e-5
        assert is_original == (length <= WINDOW)
        assert (long(tokens[:, :length]).logits - got).abs().max() > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_config_and_tokenizer_name_the_window(tmp_path, tokenizer, name):
    export_model(make_model(METHODS[name]), tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    parameters = config["rope_parameters"]
    # transformers' `dynamic` reads the model's own window from max_position_embeddings
    assert config["max_position_embeddings"] == (WINDOW if name == "dynamic" else TARGET_LEN)
    assert config["dtype"] == "float32"
    assert "auto_map" not in config
    assert "pose_" not in (tmp_path / "model" / "config.json").read_text()
    assert rope_geometry(load_config(str(tmp_path / "model"))).window == WINDOW
    if parameters["rope_type"] in SAYS_WINDOW:  # that of equal lists: export/test_rope.py
        assert parameters["original_max_position_embeddings"] == (TARGET_LEN if name in ONE_LIST else WINDOW)
    if name in ("linear", "yarn", "dynamic", "llama3", "ntk_by_parts"):
        assert parameters["factor"] == TARGET_LEN / WINDOW
    if name == "ntk":  # b * s^(d/(d-2)), d = 16
        assert parameters["rope_theta"] == pytest.approx(10_000 * 8 ** (16 / 14))
    if name in ("ntk", "theta"):
        assert parameters["rope_type"] == "default"
    saved_tokenizer = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert saved_tokenizer["model_max_length"] == TARGET_LEN
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_dtype_of_the_weights(tmp_path, tokenizer, dtype, tied):
    """The model in memory keeps its own, and the folder passes its check."""
    model = make_model(Linear(), tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tokenizer, tmp_path / "model", dtype)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, before[name].to(dtype))
    assert saved.keys() | {"lm_head.weight"} == before.keys()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    verify_export(model, tmp_path / "model", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_transformers_keeps_in_fp32_is_saved_so(tmp_path, tokenizer, dtype):
    """The biases of a router, which choose the experts: in 16 bits these would be the same."""
    config = Glm4MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
        first_k_dense_replace=1, max_position_embeddings=WINDOW, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    scale_config(config, Linear(), TARGET_LEN)
    torch.manual_seed(0)
    model = build_model(config, None, "sdpa").eval()
    bias = next(b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    bias.copy_(4.5 + 0.001 * torch.arange(8))
    export_model(model, tokenizer, tmp_path / "model", dtype)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    kinds = {name.endswith("e_score_correction_bias"): tensor.dtype for name, tensor in saved.items()}
    assert kinds == {True: torch.float32, False: dtype}
    (found,) = (tensor for name, tensor in saved.items() if name.endswith("e_score_correction_bias"))
    assert torch.equal(found, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_saved_once(tmp_path, tokenizer, dtype):
    export_model(make_model(Linear(), tie_word_embeddings=True), tokenizer, tmp_path / "model", dtype)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def of_experts():
    """Mixtral's checkpoints have each expert apart, the model has them stacked."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=WINDOW,
    )  # fmt: skip
    scale_config(config, Linear(), TARGET_LEN)
    return build_model(config, None, "sdpa").eval()


def merged_in_checkpoints():
    """Two layers of the model are one in its checkpoints: neither can be written without the other."""
    model = make_model(Linear())
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.gate_up_proj.weight", names, operations=[Chunk(dim=0)])]
    return model


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: make_model(Yarn()),
        lambda: make_model(Yarn(), tie_word_embeddings=True),
        of_experts,
        merged_in_checkpoints,
    ],
    ids=["llama", "tied", "experts", "merged"],
)
def test_the_files_are_those_of_save_pretrained(tmp_path, monkeypatch, make, size):
    monkeypatch.setattr(pose.modeling.export.weights, "SHARD_SIZE", size)
    model = make()
    model.save_pretrained(tmp_path / "wanted", max_shard_size=size)
    (tmp_path / "got").mkdir()
    Weights(model, torch.float32).write(tmp_path / "got", is_writer=True)
    wanted, got = (
        {file.name: load_file(file) for file in (tmp_path / name).glob("*.safetensors")} for name in ("wanted", "got")
    )
    merged = [{name: tensor for file in files.values() for name, tensor in file.items()} for files in (wanted, got)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
    assert (len(got) > 1) == (size == "100KB")
    if make is not of_experts:  # transformers does not part what was stacked in memory
        assert {file: set(tensors) for file, tensors in got.items()} == {
            f: set(tensors) for f, tensors in wanted.items()
        }
        index = [tmp_path / name / "model.safetensors.index.json" for name in ("wanted", "got")]
        assert size == "5GB" or index[0].read_text() == index[1].read_text()
    if make is not merged_in_checkpoints:  # which no class of transformers reads
        (tmp_path / "got" / "config.json").write_text((tmp_path / "wanted" / "config.json").read_text())
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "got").state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_adapters_are_merged(tmp_path, tokenizer):
    """W + alpha / rank * B A, under the names of the model without them; in memory they stay apart."""
    model = make_model(Yarn())
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, LoraOptions(rank=2, alpha=6.0, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        parts = {name: p.normal_() for name, p in model.named_parameters() if "lora" in name}
    export_model(model, tokenizer, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == base.keys() and any("lora" in name for name in model.state_dict())
    for name, tensor in saved.items():
        change = [part for key, part in parts.items() if key.startswith(name.removesuffix("weight") + "lora")]
        wanted = base[name] + 3 * change[1] @ change[0] if change else base[name]
        torch.testing.assert_close(tensor, wanted)
        assert bool(change) == ("q_proj" in name or "down_proj" in name)


def anonymous_mib() -> float:
    """Memory of this process that no file stands for."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read as Linux tells it")
def test_an_export_holds_one_file_of_weights_at_a_time(tmp_path, tokenizer, monkeypatch):
    """Of 180 MB: not all weights that a strategy has put together, and beside them those of the model loaded back."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=640, intermediate_size=2560, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    scale_config(config, Yarn(), 64)
    model = build_model(config, None, "sdpa")
    monkeypatch.setattr(pose.modeling.export.weights, "SHARD_SIZE", "30MB")
    monkeypatch.setattr(pose.modeling.export.weights, "full_weight", lambda parameter: parameter.detach().clone())
    export_model(make_model(Yarn()), tokenizer, tmp_path / "small")  # what is imported and allocated once
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.003):
            seen.append(anonymous_mib())

    before, watcher = anonymous_mib(), threading.Thread(target=watch)
    watcher.start()
    try:
        export_model(model, tokenizer, tmp_path / "model")
    finally:
        done.set()
        watcher.join()
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 5
    assert max(seen) - before < 90, "MiB, of 175 in all"


@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("disk full")])
def test_a_writer_that_fails_still_gives_its_parts_to_the_others(tmp_path, monkeypatch, error):
    """They wait for them in a collective operation, from which nothing else can free them."""
    gathered = []
    weights = Weights(make_model(Yarn()), torch.float32)

    def gather(parameter):
        gathered.append(parameter)
        return parameter.detach()

    def fail(*_):
        raise error

    monkeypatch.setattr(pose.modeling.export.weights, "SHARD_SIZE", "100KB")
    monkeypatch.setattr(pose.modeling.export.weights, "full_weight", gather)
    monkeypatch.setattr(pose.modeling.export.weights, "save_file", fail)
    with pytest.raises(type(error), match="disk full"):
        Weights(weights.model, torch.float32).write(tmp_path, is_writer=True)
    assert len(gathered) == len(list(weights.model.parameters()))


@pytest.mark.parametrize("is_writer", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("model.embed_tokens.weight", torch.nan, "model.embed_tokens.weight has values that are not finite"),
        ("model.norm.weight", torch.inf, "its logits are not finite"),
        ("lm_head.weight", 1e6, "its logits are worth .*e.* nats per token of random text, where guessing costs 4.6"),
        ("model.layers.1.mlp.down_proj.weight", 1e30, "its logits are all the same"),  # the last norm overflows
    ],
)
def test_a_training_that_broke_the_model_is_no_fault_of_the_export(tmp_path, tokenizer, name, value, what, is_writer):
    """As with finetune.lr=1e3: every process says so, nothing is written, and what to lower is named."""
    model = make_model(Yarn())
    with torch.no_grad():
        weight = dict(model.named_parameters())[name]
        if 1e6 <= value < torch.inf:
            weight.mul_(value)
        else:  # of the embeddings a row that no check happens to read
            used = {i for p in pose.modeling.export.check._probes(model) for i in p.input_ids[0].tolist()}
            free = min(set(range(VOCAB)) - used) if weight.ndim == 2 else 0
            weight[free] = value
    with pytest.raises(TrainingError, match=rf"broken the model(.|\n)*{what}(.|\n)*finetune\.lr") as error:
        export_model(model, tokenizer, tmp_path / "model", is_writer=is_writer)
    assert error.value.is_everywhere and error.value.anew and os.listdir(tmp_path) == []


def test_an_export_says_what_it_does_and_what_was_checked(tmp_path, tokenizer, caplog, capsys):
    with caplog.at_level(logging.INFO):
        export_model(make_model(Yarn()), tokenizer, tmp_path / "model")
    writing, checking, checked = (record.message for record in caplog.records if record.name.startswith("pose"))
    assert re.fullmatch(r"Writing the model \(0\.000\d+ GB, float32\) \.\.\.", writing)
    assert "Checking" in checking
    assert re.fullmatch(
        rf"Checked     {tmp_path}/model, loaded by transformers alone: its logits differ from the trained model's by "
        rf"at most \S+ standard deviations \(0.01 accepted\) on a text of 64 tokens, on a text of {WINDOW + 64} "
        r"tokens, at positions spread over the window, at the last positions \(\d+ s\)",
        checked,
    )
    bars = capsys.readouterr().err
    for title in ("Asking the trained model", "Checking the export"):
        assert title in bars
    export_model(make_model(Yarn()), tokenizer, tmp_path / "model", progress=False)
    assert "the" not in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", [True, False])
def test_verify_passes_on_a_sound_export(tmp_path, tokenizer, name, mode):
    model = make_model(METHODS[name]).train(mode)
    export_model(model, tokenizer, tmp_path / "model")
    verify_export(model, tmp_path / "model")
    assert model.training is mode


def test_verify_passes_on_a_model_trained_in_bf16(tmp_path, tokenizer):
    model = make_model(Yarn()).to(torch.bfloat16)
    export_model(model, tokenizer, tmp_path / "model", torch.bfloat16)
    verify_export(model, tmp_path / "model", torch.bfloat16)


def test_verify_ignores_dropout(tmp_path, tokenizer):
    model = make_model(Yarn(), attention_dropout=0.5).train()
    export_model(model, tokenizer, tmp_path / "model")
    verify_export(model, tmp_path / "model")


def test_verify_catches_other_weights(exported):
    model, folder = exported
    verify_export(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GuardError, match=rf"loaded from {folder} gives other logits .* standard deviations"):
        verify_export(model, folder)


def test_verify_tells_rounding_from_other_weights(exported):
    """A GPU's kernels make 1.2e-3 standard deviations, and so does a factor of 1.0005; bf16 weights 2e-2 and more."""
    model, folder = exported
    weights = load_file(folder / "model.safetensors")
    scaled = {name: tensor * 1.0005 if name == "lm_head.weight" else tensor for name, tensor in weights.items()}
    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in weights.items()}
    save_file(scaled, folder / "model.safetensors", {"format": "pt"})
    assert 1e-3 < compare(folder, ask(model), torch.float32).difference < 5e-3
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GuardError, match=r"0\.01 is expected"):
        verify_export(model, folder)


@pytest.mark.parametrize(
    ("key", "index", "where"),
    [
        ("short_factor", -1, "on a text of 64 tokens"),
        ("long_factor", -1, f"on a text of {WINDOW + 64} tokens"),
        ("long_factor", 0, "on a text of"),
        ("attention_factor", None, "on a text of 64 tokens"),
    ],
)
def test_verify_looks_at_texts_on_both_sides_of_the_window(tmp_path, tokenizer, key, index, where):
    model = make_model(LongRope(long_factor=DIVISORS))
    export_model(model, tokenizer, tmp_path / "model")
    config_file = tmp_path / "model" / "config.json"
    config = json.loads(config_file.read_text())
    for parameters in (config["rope_parameters"], config["rope_scaling"]):
        if index is None:
            parameters[key] *= 1.02
        else:
            parameters[key][index] *= 1.5
    config_file.write_text(json.dumps(config))
    with pytest.raises(GuardError, match=where):
        verify_export(model, tmp_path / "model")


def test_verify_looks_at_positions_up_to_the_end(tmp_path, tokenizer, monkeypatch):
    """With no room for a text beyond the window, and with a model whose rotation is wrong from 1,000 on."""
    monkeypatch.setattr("pose.modeling.export.check.CPU_FLOPS", 0)
    model = make_model(Yarn())
    export_model(model, tokenizer, tmp_path / "model")
    verify_export(model, tmp_path / "model")
    rotary, places = model.model.rotary_emb, []

    def wrong_far_out(x, position_ids):
        places.append(position_ids.max().item())
        return type(rotary).forward(rotary, x, position_ids + 3 * (position_ids >= 1000))

    monkeypatch.setattr(rotary, "forward", wrong_far_out)
    with pytest.raises(GuardError, match="at positions spread over the window"):
        verify_export(model, tmp_path / "model")
    assert places == [63, TARGET_LEN - 1, TARGET_LEN - 1]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"none"}))
def test_verify_catches_a_lost_scaling(tmp_path, tokenizer, name):
    model = make_model(METHODS[name])
    export_model(model, tokenizer, tmp_path / "model")
    config_file = tmp_path / "model" / "config.json"
    config = json.loads(config_file.read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(key, None)
    config_file.write_text(json.dumps(config))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(GuardError, match="gives other logits"):
            verify_export(model, tmp_path / "model", dtype)


def test_verify_catches_weights_that_are_not_finite(exported):
    """NaN compares as neither more nor less."""
    model, folder = exported
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GuardError, match="differ by nan"):
        verify_export(model, folder)


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fault", ["weights", "file"])
def test_a_wrong_export_never_has_the_name(tmp_path, tokenizer, monkeypatch, fault, existing):
    """It is checked before it is put in its place; the old folder stays, and the wrong one can be looked at."""
    folder = tmp_path / "model"
    if existing:
        export_model(make_model(Linear()), tokenizer, folder)
        before = contents(folder)
    model = make_model(Yarn())
    write = Weights.write

    def write_another(weights, partial, is_writer):
        write(weights, partial, is_writer)
        saved = load_file(partial / "model.safetensors")
        save_file(saved | {"lm_head.weight": 1.1 * saved["lm_head.weight"]}, partial / "model.safetensors")
        if fault == "file":
            (partial / "model.safetensors").unlink()

    monkeypatch.setattr(Weights, "write", write_another)
    message = "gives other logits" if fault == "weights" else "model.safetensors"
    with pytest.raises(GuardError, match=rf"{message}(.|\n)*nothing was put at {folder}\.$") as error:
        export_model(model, tokenizer, folder)
    assert f"{folder}.rejected" in str(error.value) and f"{tmp_path}/.model" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["model", "model.rejected"][1 - existing :]
    assert (tmp_path / "model.rejected" / "tokenizer.json").is_file()
    if existing:
        assert contents(folder) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[...] can't allocate memory: you tried"),
    ],
    ids=str,
)
def test_memory_that_runs_out_in_the_check_is_no_fault_of_the_export(tmp_path, tokenizer, monkeypatch, capsys, error):
    def no_room(*args):
        raise error

    monkeypatch.setattr("pose.modeling.export.folder.compare", no_room)
    with pytest.raises(type(error)) as caught:
        export_model(make_model(Linear()), tokenizer, tmp_path / "model")
    assert caught.value is error
    assert os.listdir(tmp_path) == ["model.unchecked"] and (tmp_path / "model.unchecked" / "config.json").is_file()
    assert f"it is kept, unchecked, as {tmp_path}/model.unchecked" in capsys.readouterr().out


def test_only_the_writer_writes(tmp_path, tokenizer):
    export_model(make_model(Linear()), tokenizer, tmp_path / "model", is_writer=False)
    assert os.listdir(tmp_path) == []


def test_export_replaces_a_folder(exported, tokenizer):
    """Nothing of the old one is left, nor anything beside it."""
    old_model, folder = exported
    (folder / "stale.bin").write_text("old")
    model = make_model(Yarn(), seed=1)
    export_model(model, tokenizer, str(folder))
    assert not (folder / "stale.bin").exists()
    assert os.listdir(folder.parent) == ["model"]
    verify_export(model, folder)
    with pytest.raises(GuardError):
        verify_export(old_model, folder)


def test_an_interrupted_replacement_keeps_the_old_folder(exported, tokenizer, monkeypatch):
    _, folder = exported
    before, rename, failed = contents(folder), Path.rename, []

    def fail(self, target):
        if self.name.startswith(".") and not failed:
            failed.append(self)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        export_model(make_model(Yarn(), seed=1), tokenizer, folder)
    assert os.listdir(folder.parent) == ["model"] and contents(folder) == before


def test_what_a_kill_left_behind_is_cleared(exported, tokenizer):
    """A half-written folder; and between its two renames a replacement has the old folder as `.model.old`."""
    model, folder = exported
    folder.rename(folder.with_name(".model.old"))
    folder.with_name(".model.abcdef").mkdir()
    export_model(model, tokenizer, folder)
    assert os.listdir(folder.parent) == ["model"]
    verify_export(model, folder)


@pytest.mark.parametrize(("limit", "exported_limit"), [(WINDOW, TARGET_LEN), (9999, 9999), (None, None)])
def test_generation_config(tmp_path, tokenizer, limit, exported_limit):
    """Token ids stay, and no limit of the old window is left."""
    model = make_model(Yarn())
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[0, 2], pad_token_id=3, do_sample=True, top_p=0.9, max_length=limit
    )
    export_model(model, tokenizer, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1, [0, 2], 3)
    assert saved["do_sample"] is True and saved["top_p"] == 0.9
    assert saved.get("max_length") == exported_limit
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    made = loaded.generate(torch.arange(WINDOW + 10)[None] % VOCAB, do_sample=False, max_new_tokens=3, eos_token_id=-1)
    assert made.shape[1] == WINDOW + 13


def test_a_generation_config_that_contradicts_itself_does_not_end_the_export(tmp_path, tokenizer, capsys):
    """Published checkpoints have some (a temperature without sampling), and transformers does not save them."""
    model = make_model(Yarn())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.generation_config.temperature = 0.7
    export_model(model, tokenizer, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1, 2, 3)
    assert "temperature" not in saved
    assert "only its token ids are exported" in capsys.readouterr().out


def test_export_makes_parent_folders(tmp_path, tokenizer):
    export_model(make_model(Linear()), tokenizer, tmp_path / "a" / "b" / "model")
    assert (tmp_path / "a" / "b" / "model" / "config.json").is_file()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_export_leaves_nothing_half_done(tmp_path, tokenizer, monkeypatch, error, existing):
    folder = tmp_path / "model"
    if existing:
        export_model(make_model(Linear()), tokenizer, folder)
        before = contents(folder)

    def fail(*_, **__):
        raise error("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(error):
        export_model(make_model(Yarn(), seed=1), tokenizer, folder)
    if existing:
        assert os.listdir(tmp_path) == ["model"]
        assert contents(folder) == before
    else:
        assert os.listdir(tmp_path) == []
