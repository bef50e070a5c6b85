"""Extends the shipped model from 256 to 2,048 tokens with transformers' own Trainer: no Hydra, no Lightning.

python examples/transformers_trainer.py [--steps 200] [--out outputs/transformers_trainer]
"""

import argparse
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments

ASSETS = Path(__file__).resolve().parents[1] / "assets"
sys.path.insert(0, str(ASSETS.parent))  # so that it runs without `pip install .` too

from pose.data.collator import PoseCollator
from pose.data.documents import read_documents
from pose.data.tokenizer import token_bytes
from pose.evaluation.perplexity import Perplexity
from pose.evaluation.scoring import Scorer
from pose.modeling.export import export_model
from pose.modeling.guards import run_guards
from pose.modeling.load import build_model, load_config, load_tokenizer, rope_geometry, scale_config
from pose.positions import PoSE
from pose.rope import Yarn


def main(steps: int, out: str, base: str = f"{ASSETS}/tiny", target_len: int = 2048):
    config, tokenizer = load_config(base), load_tokenizer(base)
    geometry = rope_geometry(config)
    scaling = scale_config(config, Yarn(), target_len)  # before the model is built
    model = build_model(config, base)
    heldout, books = (
        [tokenizer(d.text, verbose=False).input_ids for d in read_documents(ASSETS / f"corpora/books.{part}.jsonl.gz")]
        for part in ("heldout", "train")
    )

    def show(when):
        task = Perplexity(heldout, ["book"], [256, target_len], windows=4, token_bytes=token_bytes(tokenizer))
        found = task.summarise({unit: task.measure(Scorer(model, 4096), unit) for unit in task.units()})
        print(when, {k: round(e.value, 1) for k, e in found.items() if k.startswith("tail_ppl")}, flush=True)

    class Guards(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            run_guards(model, scaling.frequencies(geometry, target_len), target_len, model.device)
            print("Guards passed", flush=True)

    pieces = [{"input_ids": b[i : i + target_len]} for b in books for i in range(0, len(b) - target_len, target_len)]
    show("Before:")
    arguments = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-4, warmup_steps=5, logging_steps=4,
        save_strategy="no", report_to="none", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, PoseCollator(PoSE(geometry.window, target_len)), pieces, callbacks=[Guards()]).train()
    show("After:")
    export_model(model, tokenizer, f"{out}/model")  # loads it back with plain transformers, and compares the logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="outputs/transformers_trainer")
    main(**vars(parser.parse_args()))
