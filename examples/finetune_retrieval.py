"""Fine-tune a CoCa for search: images by texts, texts by images.

By default the captioning loss is off and with it the decoder's compute; the saved model still has its decoder, as it was.
A contrastive loss learns from the other pairs of a batch, so large batches pay: `--contrastive_chunk_size` computes
the exact loss of a large batch in the memory of a small one.

    python examples/finetune_retrieval.py --model_name_or_path outputs/quickstart --dataset_name my_pictures \\
        --text_column caption --output_dir outputs/search --num_train_epochs 5 \\
        --per_device_train_batch_size 1024 --contrastive_chunk_size 64
"""

from dataclasses import dataclass, field

from modeling_coca.evaluation import RetrievalEvaluator
from modeling_coca.training import CocaDataCollator, CocaTrainer, freeze_unused
from modeling_coca.training.recipe import (
    DataArguments,
    ModelArguments,
    callbacks_of,
    load_model,
    load_splits,
    parse_arguments,
    prepare_rows,
    run,
)


@dataclass
class RetrievalArguments:
    contrastive_chunk_size: int | None = field(default=None, metadata={"help": "Rows whose activations are in memory."})


def main(args: list[str] | None = None) -> dict[str, float]:
    retrieval, data, arguments, training = parse_arguments(
        RetrievalArguments, DataArguments, ModelArguments, args=args, learning_rate=1e-4, caption_loss_weight=0.0
    )
    splits = load_splits(data, training, text_column=data.text_column)
    model, processor = load_model(arguments)
    rows = prepare_rows(
        splits,
        data,
        training,
        model.model.vision_model,
        processor.image_processor,
        model.config.vision_feature_layers,
    )

    shared = {"text_column": data.text_column, "truncation": True, **rows.image_columns}
    collator = CocaDataCollator(processor, **shared)
    freeze_unused(model, collator([row for row, _ in zip(rows.train, range(2), strict=False)]))  # what DDP asks for
    trainer = CocaTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        callbacks=callbacks_of(arguments),
        contrastive_chunk_size=retrieval.contrastive_chunk_size,
    )
    if rows.evaluation is not None:
        trainer.add_callback(RetrievalEvaluator(processor, rows.evaluation, batch_size=128, **shared))
    return run(trainer, processor, splits)


if __name__ == "__main__":
    main()
