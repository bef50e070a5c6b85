"""python -m pose.search on the shipped model: what it leaves, that it goes on, and that train.py takes it."""

import csv
import json
import math
import re
import shutil
import time

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from pose.app import schema
from pose.app.build import build_scaling
from pose.app.preflight import plan_training
from pose.app.search import BASELINES, _go_on, _is_unused, _order, _texts, _try, search
from pose.divisors import Candidate
from pose.errors import PoseError
from pose.evaluation.needle_fitness import NeedleAnswer, NeedleFitness
from pose.evaluation.scoring import Scorer
from pose.files import CONF
from pose.modeling.load import build_model, load_config, load_tokenizer, rope_geometry, scale_config
from pose.rope import Dynamic, Linear, LongRope, Yarn
from pose.tasks.needle_gain import MultiKeyPrompts
from pose.training.folder import alone_in

pytestmark = pytest.mark.slow
SMALL = (
    "pose.target_len=512", "search.population=4", "search.num_generations=2", "search.num_parents=2", "search.trials=2",
    "num_threads=1", "trainer.accelerator=cpu",
)  # fmt: skip


def command(folder, *overrides):
    texts = (f"search.{key}={folder.parent}/{key}.txt" for key in ("haystack", "heldout"))
    return ["-m", "pose.search", *SMALL, *texts, f"hydra.run.dir={folder}", *overrides]


def with_texts(folder):
    """A folder beside the texts that are hidden in."""
    for key, subject in (("haystack", "dog"), ("heldout", "cat")):
        lines = [f"The {subject} of house {i} has seen the {i % 7} other ones today." for i in range(300)]
        (folder / f"{key}.txt").write_text(" ".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(script):
    """Runs a script; its status, and what it printed."""

    def run_(*arguments):
        result = script(*arguments)
        return result.returncode, result.stdout + result.stderr

    return run_


@pytest.fixture
def hydra():
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    folder = with_texts(tmp_path_factory.mktemp("search")) / "whole"
    code, output = run(*command(folder, "eval.add_bos=true"))
    assert code == 0, output
    return folder, output


def test_what_a_search_leaves(found):
    folder, output = found
    factors = OmegaConf.load(folder / "factors.yaml")
    with (folder / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["generation"]) for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    best = min(rows, key=lambda row: float(row["nll"]))
    assert [float(x) for x in best["divisors"].split()] == list(factors.long_factor)
    answers = factors.needle_answers
    assert answers.searched.nll == float(best["nll"]) <= min(float(row["nll"]) for row in rows[:4])
    assert len(factors.long_factor) == 32 and factors.candidates == 12
    assert factors.searched_for.target_len == 512 and factors.searched_for.window == 256
    assert set(answers) == {
        "searched", "first generation", "linear", "ntk", "yarn", "ntk, rcd_shift", "yarn, rcd_shift"
    }  # fmt: skip
    with (folder / "needles.csv").open() as file:
        measured = [row for row in csv.DictReader(file) if row["text"] == "heldout"]
    assert {row["scaling"] for row in measured} == set(answers) and len(measured) == 2 * 4 * len(answers)
    nll = [float(row["nll"]) for row in measured if row["scaling"] == "searched"]
    assert answers.searched.heldout_nll == pytest.approx(sum(nll) / len(nll), rel=1e-9)
    assert answers["first generation"].nll == min(float(row["nll"]) for row in rows[:4])
    assert "held out" in output and "rope=searched" in output
    assert "eval.add_bos=true: has no part in a search" in " ".join(output.split())
    for key, where in (("nll", "on the text searched on"), ("heldout_nll", "on text that the search has not seen")):
        better = [name for name, row in answers.items() if name in BASELINES and row[key] < answers.searched[key]]
        said = " ".join(output.split())
        assert (f"{where}, what was found is worse than {', '.join(better)}:" in said) == bool(better)
    overfitted = answers["first generation"].heldout_nll < answers.searched.heldout_nll
    assert ("the best of its first generation is better than what was found" in said) == overfitted


@pytest.mark.nightly
def test_a_search_that_was_killed_goes_on_to_the_same_end(found, run, scripts, tmp_path):
    folder = with_texts(tmp_path) / "killed"
    process = scripts.start(*command(folder))
    file, end = folder / "search.csv", time.monotonic() + 120
    while time.monotonic() < end and not (file.exists() and len(file.read_text().splitlines()) > 6):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "factors.yaml").exists()
    with file.open("a") as broken:
        broken.write("2,1.0,8,1.0 1")  # half a line
    code, output = run(*command(folder))
    assert code == 0 and "Going on with" in output, output
    whole, _ = found
    for name in ("search.csv", "factors.yaml"):
        again, once = (
            [line for line in (one / name).read_text().splitlines() if not line.startswith("#")]
            for one in (folder, whole)
        )
        assert again == once


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.trials=3"], "trials=3, which was 2"),
        (["model.attention=eager"], "attention='eager', which was 'sdpa'"),
        (["search.attention_factor=1"], "attention_factor=1.0, which was 1.06"),
        (["search.add_bos=true"], "bos=0, which was None"),
        (["pose.target_len=200"], "pose.target_len=200 is not above the model's own window of 256"),
        (["search.haystack=nothing.txt"], "search.haystack: no documents file at"),
        (["search.heldout=nothing.txt"], "search.heldout: no documents file at"),
        (["search.mutation=2"], "search.mutation=2"),
        (["model.path=null"], "model.path is not set"),
        (["model.tokenizer=TOKENIZER"], "tokens of haystack="),
        (["rope=linear"], "rope (pose.rope.Linear) has no part in a search"),
        (["rope.factor=8"], "rope.factor=8 means nothing for rope=none"),
        (["trainer.accelerator=cuda:0"], "trainer.accelerator='cuda:0'"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu is not there: torch"),
        (["search.trials=1", "search.depths=[0,0.1,0.2,0.3,0.4]"], "has 5 places, and search.trials=1 has 4 needles"),
        (["search.heldout=${search.haystack}"], "by 100% of its lines: the winner is to be measured on text that"),
        (["search.haystack=[BOTH.txt,EMPTY.txt]", "search.heldout=LINES.txt"], "by 50% of its lines"),
        (["search.heldout=EMPTY.txt"], "EMPTY.txt is empty: give a text"),
        (["model.path=SCALED"], "the RoPE of model.path is scaled already (rope_type 'linear')"),
        (["model.path=SCALED", "search.population=0"], "search.baselines=false without search.methods measures it as"),
        (["search.methods={as it is:{rope:yarn}}"], "search.methods.as it is is the name of a row that is there"),
        (["model.path=FAST"], "there is nothing to search"),
        (["model.path=FAST", "search.population=0", "search.trials=3"], "trials=3, which was 2"),  # nothing is searched
        (["search.example_len=100"], "search.example_len=100 is too short for a question about needles"),
        (["search.example_len=513"], "search.example_len=513 is above pose.target_len=512"),
        (["search.example_len=500"], "example_len=500, which was None"),
        (["search.example_len=0"], "search.example_len=0"),
        (["search.population=1"], "search.population=1"),
        (["search.population=0", "search.baselines=false"], "search.baselines=false leaves none: give search.methods"),
        (["search.methods={yarn:{rope:yarn}}"], "search.methods.yarn is the name of a row that is there already"),
        (["search.methods=[yarn]"], "search.methods=['yarn'] is not accepted: give {NAME: {rope: yarn"),
        (["search.methods={a:yarn}"], "search.methods.a='yarn' is not accepted: give {rope: NAME}"),
        (["search.methods={a:{rope:yarm}}"], "search.methods.a.rope='yarm' is unknown: choose cope, "),
        (["search.methods={a:{rope:yarn,factro:2}}"], "search.methods.a.factro is not accepted"),
        (["search.methods={a:{rope:yarn,factor:-2}}"], "factor=-2"),
    ],
)
def test_what_cannot_be_searched_is_an_error_at_once(found, hydra, overrides, words, tmp_path, monkeypatch):
    folder, _ = found
    for name in ("TOKENIZER", "FAST", "SCALED"):
        shutil.copytree("assets/tiny", tmp_path / name)
    config = json.loads((tmp_path / "FAST" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 2.0  # every dimension turns within the window
    (tmp_path / "FAST" / "config.json").write_text(json.dumps(config))
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "SCALED" / "config.json").write_text(json.dumps(config))
    (tmp_path / "EMPTY.txt").write_text(" \n")
    (tmp_path / "LINES.txt").write_text("\n".join(f"Line {i} of the held-out text." for i in range(100, 300)))
    (tmp_path / "BOTH.txt").write_text("\n".join(f"Line {i} of the held-out text." for i in range(200)))
    tokenizer = json.loads((tmp_path / "TOKENIZER" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:2000]
    (tmp_path / "TOKENIZER" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("TOKENIZER", "FAST", "SCALED", "EMPTY.txt", "BOTH.txt", "LINES.txt"):
        overrides = [one.replace(name, str(tmp_path / name)) for one in overrides]
    monkeypatch.setattr("pose.modeling.load.build_model", lambda *_, **__: pytest.fail("the weights were read"))
    if "too short" in words:
        folder = with_texts(tmp_path) / "new"
        folder.mkdir()
    with pytest.raises(PoseError, match=re.escape(words)):
        search(compose("search", command(folder, *overrides)[2:]), folder)


def test_a_text_that_is_cut_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pose.app.search.CHARS", 1000)
    folder = with_texts(tmp_path)
    options = schema.SearchOptions(haystack=str(folder / "haystack.txt"), heldout=str(folder / "heldout.txt"))
    with caplog.at_level("INFO", logger="pose"):
        assert {len(text) for text in _texts(options).values()} == {1000}
    assert "search.haystack: the first 1,000 of" in caplog.text


def test_a_search_by_other_questions_is_another_search(found, hydra, tmp_path):
    """One of a version that did not say what it asked for."""
    shutil.copytree(found[0].parent, tmp_path / "texts")
    folder = tmp_path / "texts" / "whole"
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(
        json.dumps({key: settings[key] for key in settings if key != "questions of a text"})
    )
    with pytest.raises(PoseError, match=re.escape("questions of a text=4, which was None")):
        search(compose("search", command(folder)[2:]), folder)


def test_a_search_whose_words_are_others_now_does_not_go_on(found, hydra, tmp_path, monkeypatch):
    """Another version of the list of words, or of the code that hides needles, asks other questions."""
    shutil.copytree(found[0].parent, tmp_path / "texts")
    folder = tmp_path / "texts" / "whole"
    monkeypatch.setattr("pose.tasks.needle_gain.needle_word", lambda rng: f"quick-{rng.integers(10**6)}")
    with pytest.raises(PoseError, match="holds a search by an earlier version, of pose or of wonderwords"):
        search(compose("search", command(folder)[2:]), folder)


def test_short_examples_reach_the_target_by_their_position_ids(run, tmp_path):
    """What is measured of linear interpolation is what the fitness by itself has for it."""
    folder = with_texts(tmp_path) / "short"
    few = ("search.population=2", "search.num_generations=0", "search.depths=[0,0.4]")
    others = "search.methods={twice:{rope:linear,factor:32},dynamic:{rope:dynamic},7:{rope:yarn}}"
    code, output = run(*command(folder, "pose.target_len=4096", "search.example_len=500", others, *few))
    assert code == 0, output
    found = OmegaConf.load(folder / "factors.yaml")
    assert json.loads((folder / "settings.json").read_text())["example_len"] == 500
    config = load_config("assets/tiny")
    geometry = rope_geometry(config)
    model = build_model(config, "assets/tiny", "sdpa", torch.float32)
    prompts = MultiKeyPrompts(load_tokenizer("assets/tiny"), (tmp_path / "haystack.txt").read_text(), seed=0)
    fitness = NeedleFitness(Scorer(model), prompts, 500, [0.0, 0.4], 2, 4096)
    for name, method in {"linear": Linear(), "twice": Linear(factor=32.0), "dynamic": Dynamic()}.items():
        alone = fitness(method.resolve(geometry, 4096).frequencies(geometry, 4096))
        assert found.needle_answers[name].nll == pytest.approx(alone, rel=1e-5), name
        assert name in output
    assert found.needle_answers["7"] == found.needle_answers.yarn, "a number is a name too"


COMPARE = (
    "search.population=0", "search.baselines=false", "search.depths=[0,0.4]",
    "search.methods={yarn:{rope:yarn},twice:{rope:linear,factor:4}}",
)  # fmt: skip


def test_scalings_are_compared_without_a_search(hydra, tmp_path, monkeypatch):
    """By depth, each as the fitness by itself has it; what is measured is not measured again."""
    monkeypatch.setattr("pose.app.runtime.save_config", lambda *_: None)  # is of a process that Hydra began
    folder = with_texts(tmp_path) / "compared"
    folder.mkdir()
    assert search(compose("search", command(folder, *COMPARE)[2:]), folder) == {}
    assert not (folder / "factors.yaml").exists() and not (folder / "search.csv").exists()
    with (folder / "needles.csv").open() as file:
        rows = list(csv.DictReader(file))
    config = load_config("assets/tiny")
    geometry = rope_geometry(config)
    model = build_model(config, "assets/tiny", "sdpa", torch.float32)
    for seed, key in enumerate(("haystack", "heldout")):
        prompts = MultiKeyPrompts(load_tokenizer("assets/tiny"), (tmp_path / f"{key}.txt").read_text(), seed=seed)
        fitness = NeedleFitness(Scorer(model), prompts, 512, [0.0, 0.4], 2)
        for name, method in {"yarn": Yarn(), "twice": Linear(factor=4.0)}.items():
            answers = fitness.answers(method.resolve(geometry, 512).frequencies(geometry))
            found = [row for row in rows if (row["scaling"], row["text"]) == (name, key)]
            assert [(int(row["trial"]), float(row["depth"])) for row in found] == [(a.trial, a.depth) for a in answers]
            assert [float(row["nll"]) for row in found] == pytest.approx([a.nll for a in answers], rel=1e-5)
    assert len(rows) == 2 * 2 * 2 * 4 and {row["depth"] for row in rows} == {"0.0", "0.4"}
    measured = []
    monkeypatch.setattr(
        NeedleFitness,
        "answers",
        lambda _, one, __: measured.append(one) or [NeedleAnswer(0, depth, 1.0) for depth in (0.0, 0.4)] * 4,
    )
    more = "search.methods={again:{rope:yarn},three:{rope:linear,factor:3}}"
    search(compose("search", command(folder, *COMPARE[:-1], more)[2:]), folder)
    assert len(measured) == 2 and {one.inv_freq[0].item() for one in measured} == {1 / 3}, "three, on both texts"
    with (folder / "needles.csv").open() as file:
        after = list(csv.DictReader(file))
    again, kept = ([row for row in after if row["scaling"] in names] for names in (("again",), ("yarn", "twice")))
    assert again == [row | {"scaling": "again"} for row in rows if row["scaling"] == "yarn"]
    assert kept == rows, "what has taken an hour is not lost to a comparison of others"
    renamed = "search.methods={yarn:{rope:linear,factor:3}}"
    search(compose("search", command(folder, *COMPARE[:-1], renamed)[2:]), folder)
    with (folder / "needles.csv").open() as file:
        nll = {row["nll"] for row in csv.DictReader(file) if row["scaling"] == "yarn"}
    assert len(measured) == 2 and nll == {"1.0"}, "a name is of one scaling"


@pytest.mark.parametrize(
    "scaling",
    [
        Yarn(beta_slow=2.0, attention_factor=1.1),
        Linear(),
        LongRope(long_factor=[2.0] * 32, short_factor=[1.0] * 32, attention_factor=1.0),  # by length
    ],
    ids=["yarn", "linear", "mixed windows"],
)
@pytest.mark.parametrize("example_len", [None, 400])
def test_a_scaled_model_is_measured_as_it_is(hydra, tmp_path, monkeypatch, scaling, example_len):
    """With the answers that its scaling has on the unscaled model; texts reach beyond the window."""
    monkeypatch.setattr("pose.app.runtime.save_config", lambda *_: None)
    folder = with_texts(tmp_path) / "measured"
    folder.mkdir()
    scaled = tmp_path / "scaled"
    shutil.copytree("assets/tiny", scaled)
    config = load_config(str(scaled))
    resolved = scale_config(config, scaling, 512)
    config.save_pretrained(scaled)
    length = "null" if example_len is None else example_len
    as_it_is = (f"model.path={scaled}", *COMPARE[:3], f"search.example_len={length}")
    assert search(compose("search", command(folder, *as_it_is)[2:]), folder) == {}
    with (folder / "needles.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["text"] == "haystack"]
    plain = load_config("assets/tiny")
    model = build_model(plain, "assets/tiny", "sdpa", torch.float32)
    prompts = MultiKeyPrompts(load_tokenizer("assets/tiny"), (tmp_path / "haystack.txt").read_text(), seed=0)
    fitness = NeedleFitness(Scorer(model), prompts, example_len or 512, [0.0, 0.4], 2, 512)
    answers = fitness.answers(resolved.frequencies(rope_geometry(plain), 512))
    assert {row["scaling"] for row in rows} == {"as it is"}
    assert [float(row["nll"]) for row in rows] == pytest.approx([a.nll for a in answers], rel=1e-4)


def test_a_comparison_with_a_broken_line_is_named(hydra, tmp_path, monkeypatch):
    monkeypatch.setattr("pose.app.runtime.save_config", lambda *_: None)
    folder = with_texts(tmp_path) / "broken"
    folder.mkdir()
    (folder / "needles.csv").write_text("scaling,text,trial,depth,nll,frequencies\nyarn,haystack,one,0,1,a\n")
    with pytest.raises(PoseError, match=r"holds a search \(needles\.csv\) whose settings\.json is missing or damaged"):
        search(compose("search", command(folder, *COMPARE)[2:]), folder)
    monkeypatch.setattr("pose.app.search._check_folder", lambda *_: None)
    for content in (b"yarn,haystack,one,0,1,a\n", b"yarn,haystack,0,0,\xff,a\n", b"yarn\n"):
        (folder / "needles.csv").write_bytes(b"scaling,text,trial,depth,nll,frequencies\n" + content)
        with pytest.raises(PoseError, match=r"needles\.csv has a line that is none of a comparison"):
            search(compose("search", command(folder, *COMPARE)[2:]), folder)
    (folder / "needles.csv").write_text("yarn,haystack,0,0,1,a\n")
    with pytest.raises(PoseError, match=r"needles\.csv is no table of a comparison, which begins with scaling,text"):
        search(compose("search", command(folder, *COMPARE)[2:]), folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"0,1.5,1\n", "has a line that is none of a search"),
        (b"0,1.5,2,8.0 9.0\n", "first=2 is none of 2 divisors"),
        (b"0,1.5,-1,8.0 9.0\n", "first=-1 is none of 2 divisors"),
        (b"0,1.5,1,8.0 \xff\n", "has a line that is none of a search"),
        (None, "is no table of a search, which begins with generation,nll,first,divisors"),
    ],
)
def test_a_damaged_table_of_a_search_is_named(content, words, tmp_path):
    file = tmp_path / "search.csv"
    file.write_bytes(b"0,1.5,1,8.0 9.0\n" if content is None else b"generation,nll,first,divisors\n" + content)
    before = file.read_bytes()
    with pytest.raises(PoseError, match=r"Give another hydra\.run\.dir") as error:
        _go_on(file)
    assert words in str(error.value) + str(error.value.__cause__) and file.read_bytes() == before


@pytest.mark.parametrize("left", ["model", "checkpoints", "metrics.csv"])
def test_the_folder_of_a_training_is_left_alone(hydra, tmp_path, left):
    folder = with_texts(tmp_path) / "run"
    (folder / left).mkdir(parents=True)
    (folder / "config.yaml").write_text("of the training")
    with pytest.raises(PoseError, match=rf"holds what a training has left \({left}\)"):
        search(compose("search", command(folder)[2:]), folder)
    assert (folder / "config.yaml").read_text() == "of the training"


def test_two_searches_do_not_meet_in_one_folder(run, tmp_path):
    folder = with_texts(tmp_path) / "one"
    with alone_in(folder):
        code, output = run(*command(folder))
    assert code == 1 and f"another run is at work in hydra.run.dir={folder}" in " ".join(output.split()), output


def test_a_candidate_without_a_number_is_the_worst(tmp_path):
    tried, generations = {}, {}
    one, other = (Candidate(1, (2.0, factor)) for factor in (3.0, 4.0))
    (tmp_path / "search.csv").write_text("")
    _try([one, other], 0, tried, generations, {one: math.nan, other: 5.0}.get, tmp_path)
    assert tried == {one: math.inf, other: 5.0} and min(tried, key=_order(tried)) == other


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("pose.target_len=512", False), ("trainer.accelerator=cpu", False), ("search.trials=1", False),
        ("model=tiny", False),
        ("pose.train_len=64", True), ("pose=full", True), ("trainer.max_steps=1", True), ("+eval.x=1", True),
        ("~logger", True), ("data@data=books", True), ("eval_dtype=float32", False),
    ],
)  # fmt: skip
def test_what_has_no_part_in_a_search(override, wanted):
    assert _is_unused(override) == wanted


def test_a_run_goes_on_with_what_a_search_found_wherever_it_lies(found, hydra, tmp_path):
    """Its divisors are settings of the run; the folder that they were read from is none."""
    moved = shutil.copytree(found[0], tmp_path / "moved")
    given = ("rope=searched", "pose.target_len=512", "eval=none", "trainer.accelerator=cpu", "trainer.max_steps=1")
    here, there = (
        plan_training(compose("train", [*given, f"rope.factors={folder}"]), tmp_path / "run").settings
        for folder in (found[0], moved)
    )
    assert here == there and [key for key in here if key.startswith("rope.long_factor")]


@pytest.mark.nightly
def test_a_shorter_search_in_the_same_folder_is_as_short(found, run, tmp_path):
    """As it would be by itself: what a longer one has tried later is not a part of it."""
    shutil.copytree(found[0].parent, tmp_path / "texts")
    folder = tmp_path / "texts" / "whole"
    code, output = run(*command(folder, "search.num_generations=1"))
    assert code == 0, output
    with (folder / "search.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["generation"]) <= 1]
    factors = OmegaConf.load(folder / "factors.yaml")
    assert factors.candidates == 8 == len(rows)
    assert factors.needle_answers.searched.nll == min(float(row["nll"]) for row in rows)


def test_training_takes_what_was_found(found, run, tmp_path):
    """Its export is a plain folder with the same logits as the closed form; config.yaml needs no other file."""
    folder, _ = found
    settings = ("pose.target_len=512", "trainer.max_steps=1", "eval=none", "num_threads=1", "trainer.accelerator=cpu")
    code, output = run(
        "train.py", "rope=searched", f"rope.factors={folder}", *settings, f"hydra.run.dir={tmp_path}/run"
    )
    assert code == 0, output
    factors = OmegaConf.load(folder / "factors.yaml")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").rope.long_factor == factors.long_factor
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    config = load_config("assets/tiny")
    divisors = list(factors.long_factor)
    scaling = LongRope(long_factor=divisors, short_factor=divisors, attention_factor=factors.attention_factor)
    scale_config(config, scaling, 512)
    ours = build_model(config, "assets/tiny", "sdpa")
    ours.load_state_dict(plain.state_dict(), strict=False)  # of which W_q and W_k have the attention factor in them
    ours.model.rotary_emb.attention_scaling = 1.0
    tokens = torch.tensor(AutoTokenizer.from_pretrained("assets/tiny")("A text. " * 100)["input_ids"])[None, :400]
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, ours(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pose.target_len=1024"], "is of a search for target_len 512, and here it is 1024"),
        (["rope.factors=nowhere"], "rope.factors=nowhere cannot be read"),
        (["rope.factors=null"], "rope.factors is not set"),
        (["rope.factors=conf/rope/yarn.yaml"], "is no factors.yaml of a search"),
        (["rope.factors=conf/train.yaml"], "cannot be read: Interpolation key"),
        (["rope.mixed=1"], "rope.mixed=1"),
        (["+rope.searched_for=3"], "rope.searched_for=3"),
        (["rope.searched_for={base: '500'}"], "in which base, dim, window, target_len are numbers"),
        (["rope.short_factor=[5]"], "rope.short_factor"),
        (["rope.long_factor=[5]"], "which has divisors of its own"),
        (["rope.factors=DAMAGED", "rope.mixed=true"], "attention_factor=None is not accepted"),
    ],
)
def test_factors_that_do_not_belong_are_errors(found, hydra, overrides, words, tmp_path):
    folder, _ = found
    damaged = OmegaConf.load(folder / "factors.yaml")
    damaged.attention_factor = None
    OmegaConf.save(damaged, tmp_path / "factors.yaml")
    overrides = [one.replace("DAMAGED", str(tmp_path / "factors.yaml")) for one in overrides]
    given = ("rope=searched", f"rope.factors={folder}", "pose.target_len=512", *overrides)
    with pytest.raises(PoseError, match=re.escape(words)):
        cfg = compose("train", list(given))
        scale_config(load_config("assets/tiny"), build_scaling(cfg.rope), cfg.pose.target_len)


def test_mixed_windows_keep_short_texts(found, caplog):
    """Their attention factor too, unless one is given."""
    folder, _ = found
    searched = OmegaConf.load(folder / "factors.yaml").attention_factor
    assert searched > 1
    for given, expected in ((None, 1.0), (1.1, 1.1)):
        caplog.clear()
        node = OmegaConf.load("conf/rope/searched.yaml")
        node.factors, node.mixed, node.attention_factor = str(folder), True, given
        config = load_config("assets/tiny")
        scaling = scale_config(config, build_scaling(node), 512)
        assert config.rope_parameters["short_factor"] == [1.0] * 32 != config.rope_parameters["long_factor"]
        assert scaling.attention_factor == expected
        assert ("search again with search.attention_factor=1" in caplog.text) is (given is None)
