"""The micro-batch that trainer.micro_batch=auto finds, and that nothing else is left of the search."""

import importlib.util
import json
import logging
from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.data.datamodule import PoseDataModule
from pose.errors import ConfigError
from pose.files import REPOSITORY
from pose.modeling import speed
from pose.modeling.attention import BACKENDS
from pose.positions import PoSE
from pose.training import micro_batch
from pose.training.micro_batch import MicroBatch, is_searched, largest, longest, rehearse
from pose.training.module import PoseModule

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
GLOBAL_BATCH = 8


# ----- how far to go -----


def search(peak, budget, candidates=(1, 2, 4, 8, 16, 32, 64), fails_above=None, **options):
    """What `largest` gives, and what it has tried; peak: bytes by the number of examples."""
    tried = []

    def peak_of(number):
        tried.append(number)
        return float("inf") if fails_above is not None and number > fails_above else peak(number)

    return largest(candidates, peak_of, peak(0), budget, **options), tried


@pytest.mark.parametrize(("budget", "wanted"), [(9, 1), (29, 1), (30, 2), (171, 16), (330, 32), (651, 64), (1e9, 64)])
def test_the_largest_that_the_budget_allows_is_found_in_few_steps(budget, wanted):
    """At 10 bytes an example above 10, of which a step reads all."""
    (found, peak), tried = search(lambda number: 10 + 10 * number, budget)
    assert (found, peak) == (wanted, 10 + 10 * wanted)
    assert len(tried) <= 3


def test_what_a_step_needs_once_is_not_taken_for_the_first_examples():
    """1 byte an example beside 50 that are there whatever the number: what the first needs forbids more at first."""
    (found, _), tried = search(lambda number: 10 + (50 + number if number else 0), 100)
    assert found == 32 and tried == [1, 2, 32]
    (found, _), tried = search(lambda number: 10 + (50 + number if number else 0), 100, careful=True)
    assert found == 1 and tried == [1], "2 might not fit, for all that is known"


def test_more_than_was_expected_is_not_taken():
    """From the fifth example on each needs ten times as much."""
    (found, _), tried = search(lambda number: number + 10 * max(number - 4, 0), 100)
    assert found == 8 and max(tried) > 8


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 63, 64])
@pytest.mark.parametrize("budget", [1e18, 40])
def test_where_memory_runs_out_fewer_are_taken(limit, budget):
    (found, _), _ = search(lambda number: float(number), budget, fails_above=limit)
    assert found == max(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= min(limit, budget))


def test_careful_never_runs_out_of_memory():
    """The highest point of a step may be another with more examples."""
    found = set()
    for peak in (lambda n: n, lambda n: 5 + 3 * n, lambda n: max(9 + n, 5 + 3 * n) if n else 4):
        for budget in range(8, 300):
            (number, _), tried = search(peak, budget, careful=True)
            assert all(peak(number) <= budget or number == 1 for number in tried)
            found.add(number)
    assert found == {1, 2, 4, 8, 16, 32, 64}


# ----- what is tried -----


@pytest.fixture
def make_data(tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} and {i} is {i}. " * 40}) + "\n" for i in range(9)))

    def make(**options):
        data = PoseDataModule(
            [file], TOKENIZER, PoSE(32, 64), num_examples=40, **{"micro_batch": 1} | options,
            global_batch=GLOBAL_BATCH, seed=5, cache_dir=tmp_path,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
        return data

    return make


def test_the_longest_examples_are_tried_and_all_their_tokens_are_scored(make_data):
    data = make_data(curriculum=[(0.5, 16)], synthetic={"copy": 1.0})
    assert data.dataset[0]["input_ids"].shape == (2, 16), "the first ones are short"
    batch = longest(data, 3)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (3, 32)
    assert len(batch["scored_at"]) == 3 * 31


class Weights(L.Callback):
    """Notes the examples of every batch, and the state of everything when the training starts."""

    def __init__(self):
        self.examples = []

    def on_train_start(self, trainer, pl_module):
        self.weights = [p.detach().clone() for p in pl_module.parameters()]
        self.gradients = [p.grad for p in pl_module.parameters()]
        self.states = [len(optimizer.state) for optimizer in trainer.optimizers]
        self.rates = [(g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups]
        self.random = torch.get_rng_state(), np.random.get_state()[1].tolist()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.examples.append(batch["input_ids"])


def fit(data, number, steps=3, optimizer="adamw", compiled=False, dropout=0.2):
    """Trains; number: of the micro-batch, or a MicroBatch. Module, trainer, and the Weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, attn_implementation=BACKENDS["sdpa"], attention_dropout=dropout,
        )
    )  # fmt: skip
    if compiled:
        speed.compile_layers(model)
    module = PoseModule(
        lambda strategy: model.train(), expected=None, target_len=64, betas=(0.9, 0.99), weight_decay=0.1,
        warmup_steps=0, max_steps=steps, schedule="linear", lr=1e-2, optimizer=optimizer,
    )  # fmt: skip
    notes, is_found = Weights(), isinstance(number, MicroBatch)
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=GLOBAL_BATCH // (1 if is_found else number),
        accelerator="cpu", devices=1, callbacks=[notes, *([number] if is_found else [])], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return module, trainer, notes


@pytest.fixture
def out_of_memory_above(monkeypatch):
    """Has a step with more examples run out of memory, in the middle of a backward pass."""

    def above(limit):
        honest, tried = rehearse, []

        def rehearse_(trainer, module, batch, passes):
            tried.append((len(batch["input_ids"]), passes))
            assert all(p.grad is None for p in module.parameters()), "or they would count in the next one's memory"
            if len(batch["input_ids"]) > limit:
                honest(trainer, module, longest(trainer.datamodule, 1), 1)
                module.losses(batch)[0].backward()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            honest(trainer, module, batch, passes)

        monkeypatch.setattr(micro_batch, "rehearse", rehearse_)
        return tried

    return above


@pytest.mark.parametrize("limit", [2, 8])
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        pytest.param(
            "adamw8bit",
            marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
        ),
    ],
)
def test_a_run_is_the_same_as_with_the_number_given(make_data, out_of_memory_above, caplog, limit, optimizer):
    """To the bit: weights, examples, random numbers; with dropout, weight decay and a schedule."""
    tried, said = out_of_memory_above(limit), []
    with caplog.at_level(logging.INFO):
        module, trainer, notes = fit(make_data(), MicroBatch(GLOBAL_BATCH, said.append), optimizer=optimizer)
    assert said == [limit] and trainer.accumulate_grad_batches == GLOBAL_BATCH // limit
    assert {number for number, _ in tried} >= {1, limit}
    assert all(passes == (1 if number == GLOBAL_BATCH else 2) for number, passes in tried[1:]), "gradients add up"
    assert [record.message for record in caplog.records if record.message.startswith(f"Micro-batch {limit}, the larg")]
    wanted, _, before = fit(make_data(micro_batch=limit), limit, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(notes.weights, before.weights, strict=True)), "no weight has moved"
    assert notes.states == before.states == [0] and notes.rates == before.rates
    assert notes.gradients == before.gradients == [None] * len(before.gradients)
    assert torch.equal(notes.random[0], before.random[0]) and notes.random[1] == before.random[1]
    assert len(notes.examples) == 3 * GLOBAL_BATCH // limit
    assert all(torch.equal(a, b) for a, b in zip(notes.examples, before.examples, strict=True))
    for (name, got), parameter in zip(module.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(got, parameter), name
    moved = [not torch.equal(a, b) for a, b in zip(before.weights, wanted.parameters(), strict=True)]
    assert all(moved), "and the training moves them"


def test_the_optimizer_makes_its_states_and_no_weight_moves(make_data, monkeypatch):
    """In a step as it is tried."""
    seen = []

    def watched(trainer, module, batch, passes):
        before = [p.detach().clone() for p in module.parameters()]
        rehearse(trainer, module, batch, passes)
        seen.append(len(trainer.optimizers[0].state))
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        assert len(before) == seen[-1] == sum(p.grad is not None for p in module.parameters())

    monkeypatch.setattr(micro_batch, "rehearse", watched)
    fit(make_data(), MicroBatch(GLOBAL_BATCH, lambda _: None), steps=1)
    assert len(seen) == 3, "1 for the states, 1, and 8, where nothing is short"


@pytest.mark.nightly
def test_what_was_compiled_for_other_numbers_is_forgotten(make_data, caplog, monkeypatch):
    """Another number would be compiled for any number of examples, as no run with a number given is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without half a minute of C++
    fit(make_data(), MicroBatch(GLOBAL_BATCH, lambda _: None), steps=2, compiled=True, dropout=0.0)
    assert not [record for record in caplog.records if "Compiled again" in record.message]


def test_memory_that_runs_out_with_one_example_is_the_runs_error(make_data, out_of_memory_above):
    out_of_memory_above(0)
    with pytest.raises(torch.OutOfMemoryError):
        fit(make_data(), MicroBatch(GLOBAL_BATCH, lambda _: None))


def test_where_it_is_searched():
    for device, wanted in (("cpu", False), ("cuda", True), ("mps", False)):
        assert is_searched(SimpleNamespace(root_device=torch.device(device))) is wanted


def test_deepspeed_wants_a_number(monkeypatch):
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    with pytest.raises(ConfigError, match=r"trainer\.micro_batch=auto .*DeepSpeed.*trainer\.micro_batch=N"):
        is_searched(strategy)
