"""Train a CoCa from scratch on images with captions, with a tokenizer of its own.

    python examples/pretrain.py --config_name hub_configs/coca-tiny --image_size 64 --vocab_size 3000 \\
        --dataset_name my_pictures --text_column caption --zoom 0.9 1.1 --shift 0.05 \\
        --output_dir outputs/pretrained --num_train_epochs 10 --per_device_train_batch_size 128 --learning_rate 1e-3

Large data are read on the way, by several processes, from WebDataset shards:

    accelerate launch examples/pretrain.py --config_name hub_configs/coca-base --train_files "shards/{0000..0999}.tar" \\
        --streaming --image_column jpg --text_column txt --dataloader_num_workers 8 --max_steps 100000 ...
"""

from dataclasses import dataclass, field

from transformers import AutoConfig

from modeling_coca.evaluation import CaptioningEvaluator, RetrievalEvaluator
from modeling_coca.training import CocaDataCollator, CocaTrainer
from modeling_coca.training.recipe import (
    DataArguments,
    ModelArguments,
    apply_freezing,
    callbacks_of,
    load_splits,
    new_model,
    new_processor,
    parse_arguments,
    prepare_rows,
    run,
)


@dataclass
class PretrainArguments:
    config_name: str = field(metadata={"help": "Folder, or id of the Hub, with the config.json of the sizes."})
    vocab_size: int = field(default=32000, metadata={"help": "At most so many tokens."})
    max_text_length: int = field(default=76, metadata={"help": "In tokens; longer captions are cut."})
    tokenizer_rows: int = field(default=1_000_000, metadata={"help": "Rows that the tokenizer is trained on."})


def main(args: list[str] | None = None) -> dict[str, float]:
    pretrain, data, arguments, training = parse_arguments(
        PretrainArguments, DataArguments, ModelArguments, args=args, learning_rate=1e-3, per_device_train_batch_size=64
    )
    splits = load_splits(data, training, text_column=data.text_column)
    config = AutoConfig.from_pretrained(pretrain.config_name, trust_remote_code=False)
    processor = new_processor(
        splits.train,
        training,
        data.text_column,
        vocab_size=pretrain.vocab_size,
        max_text_length=pretrain.max_text_length,
        image_size=arguments.image_size or config.vision_config.image_size,
        limit=pretrain.tokenizer_rows,
    )
    model = new_model(pretrain.config_name, processor, arguments)
    apply_freezing(model, arguments)
    rows = prepare_rows(splits, data, training, model.model.vision_model, processor.image_processor)

    shared = {"text_column": data.text_column, "truncation": True, **rows.image_columns}
    trainer = CocaTrainer(
        model=model,
        args=training,
        data_collator=CocaDataCollator(processor, **shared),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        callbacks=callbacks_of(arguments),
    )
    if rows.evaluation is not None:
        for evaluator in (RetrievalEvaluator, CaptioningEvaluator):
            trainer.add_callback(evaluator(processor, rows.evaluation, batch_size=128, **shared))
    return run(trainer, processor, splits)


if __name__ == "__main__":
    main()
