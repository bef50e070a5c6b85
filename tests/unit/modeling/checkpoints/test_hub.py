"""Which files a checkpoint's weights are read from, by this package and by transformers, and which are refused."""

import itertools
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJConfig, LlamaConfig, LlamaForCausalLM

from pose.errors import CheckpointError
from pose.modeling.checkpoints.hub import from_hub, read_weights
from pose.modeling.load import build_model, load_config

FORMS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A very small LLaMA, whose weights tell nothing of where they come from."""
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=16)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def write(folder, form, number, shard=None):
    """Weights in one of the four forms, with a number in the last norm; `shard` is where those of an index lie."""
    weights = load_file(folder.parent / "weights.safetensors") | {"model.norm.weight": torch.full((8,), float(number))}
    name = form.removesuffix(".index.json")
    if form != name:
        name = shard or f"shard-{name}"
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (folder / form).write_text(json.dumps(index))
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(weights, folder / name, {"format": "pt"}) if ".safe" in form else torch.save(weights, folder / name)


def number_read_by_us(folder):
    return dict(from_hub("weights", read_weights, str(folder), None))["model.norm.weight"][0].item()


def number_of(model):
    return model.model.norm.weight[0].item()


@pytest.mark.parametrize("forms", [c for n in range(1, 5) for c in itertools.combinations(FORMS, n)], ids=str)
def test_our_reader_and_transformers_pick_the_same_file(folder, forms):
    """Of those that are there; and it is the first one in transformers' order."""
    (folder / "model.safetensors").rename(folder.parent / "weights.safetensors")
    for form in forms:
        write(folder, form, FORMS.index(form))
    own = LlamaForCausalLM.from_pretrained(folder)
    built = build_model(load_config(str(folder)), str(folder), "sdpa")
    assert number_read_by_us(folder) == number_of(own) == number_of(built) == FORMS.index(forms[0])


def test_shards_in_a_subfolder_are_read(folder):
    (folder / "model.safetensors").rename(folder.parent / "weights.safetensors")
    write(folder, FORMS[1], 7, "parts/a.safetensors")
    assert number_read_by_us(folder) == number_of(build_model(load_config(str(folder)), str(folder), "sdpa")) == 7


@pytest.mark.parametrize("form", [FORMS[1], FORMS[3]])
@pytest.mark.parametrize("where", ["../outside", "parts/../../outside", "{}/outside", 7, "", None])
def test_an_index_that_names_files_elsewhere_is_refused_by_every_path(folder, form, where):
    """Before anything of them is read: the file there is whole, and transformers alone would take it."""
    (folder / "model.safetensors").rename(folder.parent / "weights.safetensors")
    write(folder, form, 1)
    (folder / "parts").mkdir()
    (shard,) = folder.glob("shard-*")
    shard.rename(folder.parent / "outside")
    where = where.format(folder.parent) if isinstance(where, str) else where
    index = json.loads((folder / form).read_text())
    (folder / form).write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], where)}))
    config = LlamaConfig(**SIZES)
    for load in (
        lambda: load_config(str(folder)),
        lambda: build_model(config, str(folder), "sdpa"),
        lambda: number_read_by_us(folder),
    ):
        with pytest.raises(CheckpointError, match=rf"{form} has .* in 'weight_map', where a file inside its folder"):
            load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds a list where a JSON object is expected"),
        ("{", "is not valid JSON"),
        ('{"metadata": {}}', "has nothing under 'weight_map'"),
        ('{"metadata": {}, "weight_map": []}', r"has \[\] under 'weight_map'"),
        ('{"metadata": {}, "weight_map": {}}', "empty 'weight_map'"),
        ('{"weight_map": {"a": "b"}}', "has nothing under 'metadata'"),
        ('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', r"b\.safetensors cannot be read: No such file"),
    ],
)
def test_an_index_that_is_none_is_named(folder, content, words):
    (folder / "model.safetensors").unlink()
    (folder / FORMS[1]).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        load_config(str(folder))
    with pytest.raises(CheckpointError, match=words):
        build_model(LlamaConfig(**SIZES), str(folder), "sdpa")


def test_converted_weights_are_checked_too(tmp_path):
    """Those of GPT-J, which transformers does not read."""
    GPTJConfig(n_embd=64, n_head=4, n_layer=1, rotary_dim=8).save_pretrained(tmp_path / "model")
    torch.save({}, tmp_path / "outside.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.bin"}}
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'\.\./outside\.bin'.*a file inside its folder"):
        build_model(load_config(f"{tmp_path}/model"), f"{tmp_path}/model", "sdpa")


@pytest.mark.parametrize("kind", ["mode", "folder", "link to nothing"])
def test_weights_that_cannot_be_read_are_named_as_that(folder, monkeypatch, kind):
    """Not as missing; and no other file is taken in their place."""
    file = folder / "model.safetensors"
    file.rename(folder.parent / "weights.safetensors")
    write(folder, FORMS[2], 1)
    if kind == "mode":  # which the administrator, as whom tests may run, is not bound by
        file.touch()
        own_open = open

        def refuse(path, *args, **options):
            if str(path) == str(file):
                raise PermissionError(13, "Permission denied", str(path))
            return own_open(path, *args, **options)

        monkeypatch.setattr("builtins.open", refuse)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("nowhere")
    for load in (lambda: load_config(str(folder)), lambda: build_model(LlamaConfig(**SIZES), str(folder), "sdpa")):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors cannot be read: (Permission denied|it is a fol)"
        ):
            load()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]])
def test_damaged_weights_are_an_error_that_names_them(folder, form, content):
    (folder / "model.safetensors").unlink()
    (folder / form).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{folder}(: it)? (cannot be loaded|lacks weights)"):
        build_model(load_config(str(folder)), str(folder), "sdpa")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", r"adapters beside its weights \(adapter_config\.json\).*merge them first"),
        ("shard-00000-model-00001-of-00002.safetensors", "part of a distributed checkpoint.*save the model whole"),
    ],
)
def test_weights_of_which_transformers_would_read_others_are_refused(folder, name, words):
    """With adapters it reads the model that these name; of parts of a distributed checkpoint, all."""
    (folder / name).write_text('{"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=words):
        load_config(str(folder))


def test_a_hub_id_whose_owner_is_a_local_folder_is_asked_for(tmp_path, monkeypatch):
    """And where neither is there, the error speaks of both."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("owner")
    cache = tmp_path / "cache"
    snapshot = cache / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "max_position_embeddings": 256})
    )
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert load_config("owner/name").hidden_size == 64
    with pytest.raises(CheckpointError, match=r"there is no folder at owner/typo, and as a hub id .* cannot be loaded"):
        load_config("owner/typo")
    (tmp_path / "owner" / "type").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no folder at owner/typo \(beside it: type\), and as a hub id"):
        load_config("owner/typo")
    with pytest.raises(CheckpointError) as error:  # a name alone is no path
        load_config("typo")
    assert "beside it" not in str(error.value)


def test_what_libraries_raise_is_readable(tmp_path):
    """Errors of classes that say nothing alone, and control characters of what they quote."""

    def load(path, **_):
        raise KeyError("a\x1b[2Jb")

    with pytest.raises(CheckpointError) as error:
        from_hub("config", load, str(tmp_path), None)
    assert str(error.value) == f"the config of {tmp_path} cannot be loaded: KeyError: 'a\\x1b[2Jb'"

    def load_other(path, **_):
        raise ValueError("a\x1b[2Jb")

    with pytest.raises(CheckpointError, match=r"loaded: a\[2Jb$"):
        from_hub("config", load_other, str(tmp_path), None)
