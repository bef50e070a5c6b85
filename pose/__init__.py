"""Context window extension of RoPE language models by positional skip-wise training (PoSE).

For your own training loop, or transformers' Trainer (examples/transformers_trainer.py), nothing of Hydra or
Lightning is needed. `folder` is a Hugging Face folder or a hub id, `documents` a list of {"input_ids": tokens}:

    from torch.utils.data import DataLoader
    from pose.data.collator import PoseCollator
    from pose.modeling.export import export_model
    from pose.modeling.guards import run_guards
    from pose.modeling.load import build_model, load_config, load_tokenizer, rope_geometry, scale_config
    from pose.positions import PoSE
    from pose.rope import Yarn

    config = load_config(folder)
    geometry = rope_geometry(config)
    scaling = scale_config(config, Yarn(), target_len)  # before the model is built
    model = build_model(config, folder).train()
    run_guards(model, scaling.frequencies(geometry, target_len), target_len, model.device)
    collator = PoseCollator(PoSE(geometry.window, target_len))  # a new layout whenever it meets a document
    for batch in DataLoader(documents, batch_size=2, shuffle=True, collate_fn=collator):
        model(**batch).loss.backward()  # and your optimizer
    export_model(model, load_tokenizer(folder), "extended")  # loaded back with plain transformers and compared

    pose.positions         samplers: which tokens of a document an example shows, and their position ids
    pose.coverage          which relative distances a sampler covers
    pose.rope              scaling methods, and their form in transformers' own terms
    pose.modeling.load     config -> scaled config -> model
    pose.modeling.lora     adapters
    pose.modeling.guards   checks of the model that is about to train
    pose.modeling.export   a plain Hugging Face folder
    pose.data.collator     batches for any DataLoader
    pose.evaluation        perplexity, passkeys
"""
