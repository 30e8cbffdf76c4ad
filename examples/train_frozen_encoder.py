"""Train CoCa's poolers, text layers and decoder on top of a pretrained image encoder that stays as it is.

The encoder sees each image once: its features are computed beforehand, for a few augmented views, and kept in a file.

    python examples/train_frozen_encoder.py --vision_model google/vit-large-patch16-224 \\
        --config_name hub_configs/coca-frozen-vit-large --dataset_name my_pictures --text_column caption \\
        --feature_cache outputs/features --feature_views 3 --zoom 0.85 1.1 --shift 0.06 --rotate 8 \\
        --output_dir outputs/frozen --num_train_epochs 30 --per_device_train_batch_size 128
"""

from dataclasses import dataclass, field

from transformers import AutoImageProcessor, AutoModel

from modeling_coca.evaluation import CaptioningEvaluator, RetrievalEvaluator
from modeling_coca.training import CocaDataCollator, CocaTrainer, freeze
from modeling_coca.training.recipe import (
    DataArguments,
    ModelArguments,
    apply_freezing,
    callbacks_of,
    image_side,
    load_splits,
    new_model,
    new_processor,
    parse_arguments,
    prepare_rows,
    run,
)


@dataclass
class FrozenEncoderArguments:
    vision_model: str = field(metadata={"help": "A vision model of the Hub, or its folder."})
    config_name: str = field(metadata={"help": "Folder, or id of the Hub, with the config.json of all other sizes."})
    vision_feature_layers: list[int] | None = field(
        default=None, metadata={"help": "Earlier layers whose features are joined to the last one's, e.g. 0 1 2 3."}
    )
    vocab_size: int = field(default=20000, metadata={"help": "At most so many tokens."})
    max_text_length: int = field(default=76, metadata={"help": "In tokens; longer captions are cut."})


def main(args: list[str] | None = None) -> dict[str, float]:
    frozen, data, arguments, training = parse_arguments(
        FrozenEncoderArguments, DataArguments, ModelArguments, args=args, learning_rate=1e-3
    )
    splits = load_splits(data, training, text_column=data.text_column)
    encoder = AutoModel.from_pretrained(frozen.vision_model, trust_remote_code=False)
    encoder = getattr(encoder, "vision_model", encoder)  # the image half of a CLIP
    images = AutoImageProcessor.from_pretrained(frozen.vision_model, trust_remote_code=False)
    processor = new_processor(
        splits.train,
        training,
        data.text_column,
        vocab_size=frozen.vocab_size,
        max_text_length=frozen.max_text_length,
        image_size=arguments.image_size or image_side(images),
        image_mean=images.image_mean,
        image_std=images.image_std,
    )
    model = new_model(
        frozen.config_name, processor, arguments, encoder, vision_feature_layers=frozen.vision_feature_layers
    )
    freeze(model, "vision_model")
    apply_freezing(model, arguments)
    rows = prepare_rows(
        splits, data, training, model.model.vision_model, processor.image_processor, frozen.vision_feature_layers
    )

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
