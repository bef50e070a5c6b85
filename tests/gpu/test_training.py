"""A training on a GPU: the largest micro-batch, the waits for the device, the kernels of attention."""

import json
import warnings

import lightning as L
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.data.datamodule import PoseDataModule
from pose.files import REPOSITORY
from pose.modeling import attention, speed
from pose.positions import PoSE
from pose.training.callbacks import Throughput
from pose.training.micro_batch import MicroBatch
from pose.training.module import PoseModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def make_data(tmp_path):
    tokenizer, file = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny"), tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} and {i} is {i}. " * 400}) + "\n" for i in range(9)))

    def make(micro_batch, global_batch=64):
        data = PoseDataModule(
            [file], tokenizer, PoSE(512, 1024), num_examples=100 * global_batch, micro_batch=micro_batch,
            global_batch=global_batch, seed=5, cache_dir=tmp_path,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
        return data

    return make


def fit(data, micro_batch, callbacks=(), steps=2, compiled=False, log_every=1):
    """Trains in bf16-mixed; micro_batch: None where a callback finds it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(data.tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, attn_implementation=attention.BACKENDS["sdpa"],
        )
    )  # fmt: skip
    speed.residuals_as_computed(model)
    if compiled:
        speed.compile_layers(model)
    module = PoseModule(
        lambda strategy: model.train(), expected=None, target_len=1024, betas=(0.9, 0.99), weight_decay=0.1,
        warmup_steps=0, max_steps=steps, schedule="constant", lr=1e-3,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=data.global_batch // (micro_batch or 1),
        accelerator="gpu", devices=1, precision="bf16-mixed", callbacks=list(callbacks), logger=False,
        gradient_clip_val=1.0, log_every_n_steps=log_every, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with attention.preferred_kernels(torch.device("cuda")):
        trainer.fit(module, data)
    return module.cpu()


@pytest.fixture
def little_memory():
    """1 GiB of the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_largest_micro_batch_that_fits_is_found_and_trains(make_data, little_memory, compiled):
    """What is free says more than may be used: memory runs out in the search, and not in the run."""
    numbers = []
    got = fit(make_data(1), None, [MicroBatch(64, numbers.append)], compiled=compiled)
    (number,) = numbers
    assert 1 < number < 64
    wanted = fit(make_data(number), number, compiled=compiled)
    for (name, weight), other in zip(got.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=2e-3, msg=name)  # two steps of 1e-3: sums by atomics
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):
        fit(make_data(2 * number), 2 * number, compiled=compiled)


@pytest.mark.slow
def test_train_py_writes_what_it_found(script, tmp_path):
    """The four examples of a step of the smoke run fit any GPU at once."""
    run = ("experiment=smoke", "eval=none", "trainer.devices=1", "trainer.micro_batch=auto")
    result = script("train.py", *run, f"hydra.run.dir={tmp_path}/run", fresh=True)  # CUDA outlives no fork
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Micro-batch 4, the largest divisor of 4 that fits" in result.stdout
    assert "micro_batch: 4\n" in (tmp_path / "run" / "config.yaml").read_text()


class Waits(L.Callback):
    """Counts the waits for the device in the steps from `begin` on."""

    def __init__(self, begin):
        self.begin, self.caught, self.steps = begin, None, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.begin and self.caught is None:
            self.recording = warnings.catch_warnings(record=True)
            self.caught = self.recording.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")
        self.recording.__exit__(None, None, None)
        self.steps = trainer.global_step - self.begin
        # The mode's own warning, once in a process, has the word too
        called = "called a synchronizing CUDA operation"
        self.where = [f"{w.filename}:{w.lineno}" for w in self.caught if called in str(w.message)]


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_waits_for_the_device_once(make_data, log_every, compiled):
    """Of two micro-batches each, with clipping, logging and throughput: from the batch's transfer to the next one's."""
    waits = Waits(begin=3)
    fit(make_data(2, 4), 2, [Throughput(), waits], steps=9, compiled=compiled, log_every=log_every)
    assert waits.steps == 6 and 1 <= len(waits.where) <= 6, waits.where


def kernels(function, *arguments):
    """The kernels of torch's SDPA that a call takes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function(*arguments)
    names = ("cudnn", "flash", "efficient")
    return {name for name in names for event in profiled.key_averages() if f"_scaled_dot_product_{name}" in event.key}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("num_kv_heads", [8, 4])
def test_cudnns_kernel_is_taken_where_it_exists(compiled, num_kv_heads):
    shape = (2, num_kv_heads, 256, 64)
    query = torch.randn(2, 8, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")

    def attend(query, key, value):
        return attention.sdpa(torch.nn.Module(), query, key, value, None, scaling=0.125)[0]

    torch.compiler.reset()  # or the number of heads of the case before makes this one's a symbol
    function = torch.compile(attend, fullgraph=True) if compiled else attend
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, num_kv_heads < 8)
    first = "cudnn" if torch.backends.cuda.can_use_cudnn_attention(parameters) else "flash"
    with attention.preferred_kernels(query.device):
        assert kernels(function, query, key, value) == {first}
        single = [x.detach().float() for x in (query, key, value)]
        assert kernels(attend, *single) <= {"efficient"}, "fp32 has neither"
        output = function(query, key, value)
    output.float().sum().backward()
    exact, _ = attention.eager(torch.nn.Module().eval(), *single, None, scaling=0.125)
    torch.testing.assert_close(output.float(), exact, atol=0.02, rtol=0.02)
