"""Train a CoCa on real pictures in a few minutes, and see what it learned: captions, search, zero-shot, answers.

    make quickstart
    python examples/quickstart/run.py --output_dir outputs/quickstart --train_minutes 5.5

The default design is a frozen, pretrained image encoder (EfficientNet-Lite0, whose features are computed once) with
trainable attentional poolers, text layers and decoder. `--design scratch` trains CoCa's own ViT with everything else.
Writes the model, `metrics.json` and `index.html` into `--output_dir`.
"""

import copy
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from build import build_model, build_processor
from encoder import IMAGE_MEAN, IMAGE_STD, load_efficientnet_lite0
from page import EMOJI_CREDITS, write_page
from pairs import Rows, load_pairs, questions_of
from results import answer_questions, build_page, class_embeddings, embed_queries, evaluate_split, evaluator_of
from transformers import (
    AutoImageProcessor,
    AutoModel,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modeling_coca import (
    CocaForConditionalGeneration,
    CocaProcessor,
)
from modeling_coca.training import CocaDataCollator, CocaTrainer, ImageAugmentation, compute_features

logger = logging.getLogger("quickstart")

# EfficientNet-Lite0's feature maps before the last: they still know colours, and so skin tones
FEATURE_LAYERS = [0, 1, 2, 3]
# No flip, as some captions say "facing right"; colours stay, as captions name them, and skin tones
VIEWS = {"zoom": (0.85, 1.1), "shift": 0.06, "rotate": 8.0}
FREE_QUERIES = ("a red heart", "a building", "a flag", "a face")  # texts that are no caption


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where model, metrics and page go."})
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Where pictures and features are kept."})
    design: str = field(
        default="frozen",
        metadata={"help": "Image encoder: pretrained and frozen, or from scratch.", "choices": ["frozen", "scratch"]},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pictures and captions instead of the emoji: a Hub id, or a folder (imagefolder)."},
    )
    image_column: str = "image"
    text_column: str = "text"
    max_text_length: int = field(default=40, metadata={"help": "Longest text in tokens; longer captions are cut."})
    vision_model: str | None = field(
        default=None, metadata={"help": "Frozen encoder from the Hub instead, e.g. google/vit-base-patch16-224."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels: 128 for the frozen encoder, 64 from scratch."}
    )
    views: int = field(default=3, metadata={"help": "Augmented views of each training picture (frozen encoder)."})
    train_minutes: float = field(default=5.5, metadata={"help": "Time for training; the schedule is fitted to it."})
    max_steps: int | None = field(default=None, metadata={"help": "Number of steps instead."})
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    width: int = 128
    layers: int = field(default=3, metadata={"help": "Unimodal layers, and as many multimodal ones."})
    question_share: float = field(default=0.15, metadata={"help": "Share of rows that are a question and its answer."})
    seed: int = 0


class StopAt(TrainerCallback):
    """Ends training in time on a machine that slows down after the schedule was made."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.monotonic() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.end


def fit_steps(args: QuickstartArguments, model, rows: Rows, collator: CocaDataCollator) -> int:
    """How many steps fit into the time, from a few steps of a copy of the model."""
    trial = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW([p for p in trial.parameters() if p.requires_grad], fused=True)
    loader = torch.utils.data.DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collator)
    seconds = []
    for _, batch in zip(range(14), loader, strict=False):
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            loss = trial(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - start)
    step = float(np.median(seconds[4:])) * 1.1  # loading the data, clipping, logging
    return max(50, int(args.train_minutes * 60 * 0.95 / step))


def train(args: QuickstartArguments, model, rows: Rows, processor: CocaProcessor) -> float:
    """Trains in place; returns the seconds that it took."""
    collator = CocaDataCollator(
        processor,
        prefix_column="question",
        truncation=True,
        image_hidden_states_column=None if rows.features is None else "features",
    )
    steps = args.max_steps or fit_steps(args, model, rows, collator)
    logger.info(f"{steps} steps of {args.batch_size}, {steps * args.batch_size / len(rows):.1f} epochs")
    trainer = CocaTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(args.output_dir) / "checkpoints"),
            per_device_train_batch_size=args.batch_size,
            max_steps=steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * steps),
            weight_decay=args.weight_decay,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_drop_last=True,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        data_collator=collator,
        train_dataset=rows,
        callbacks=[StopAt(args.train_minutes * 60)],
    )
    start = time.monotonic()
    trainer.train()
    return time.monotonic() - start


def main() -> None:
    (args,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.design == "scratch" and args.vision_model is not None:
        raise ValueError(
            "`--vision_model` names a frozen encoder, `--design scratch` has none: leave out one of the two."
        )
    set_seed(args.seed)
    out, cache = Path(args.output_dir), Path(args.cache_dir)
    data = load_pairs(args.dataset_name, args.cache_dir, args.image_column, args.text_column, args.seed)
    held_out = sorted((split for split in data if split != "train"), key=lambda split: not split.startswith("test"))

    encoder = None
    if args.design == "frozen" and args.vision_model is None:
        encoder = load_efficientnet_lite0()
    elif args.design == "frozen":
        encoder = AutoModel.from_pretrained(args.vision_model, trust_remote_code=False).eval().requires_grad_(False)
    image_size = args.image_size or (128 if encoder is not None else 64)
    mean, std, feature_layers = IMAGE_MEAN, IMAGE_STD, FEATURE_LAYERS
    if args.vision_model is not None:
        image_processor = AutoImageProcessor.from_pretrained(args.vision_model, trust_remote_code=False)
        mean, std, feature_layers = image_processor.image_mean, image_processor.image_std, None
        image_size = args.image_size or encoder.config.image_size
    processor = build_processor(data["train"], image_size, mean, std, args.max_text_length)
    features = dict.fromkeys(data)
    if encoder is not None:
        names = [args.dataset_name or "emoji", args.vision_model or "efficientnet-lite0"]
        folder = cache / "features" / "-".join(name.strip("/").replace("/", "--") for name in names)
        for split in data:
            views = args.views if split == "train" else 1
            features[split] = compute_features(
                data[split],
                encoder,
                processor.image_processor,
                folder / f"{split}-{image_size}px-{views}views.npy",
                views=views,
                augmentation=ImageAugmentation(**VIEWS, size=image_size),
                feature_layers=feature_layers,
                seed=args.seed,
                desc=split,
            )

    model = build_model(processor.tokenizer, encoder, image_size, feature_layers, args.width, args.layers, args.dropout)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(f"{trainable / 1e6:.1f} M trainable of {total / 1e6:.1f} M parameters")
    seconds = train(args, model, Rows(data["train"], features["train"], args.question_share), processor)

    model.save_pretrained(out)
    processor.save_pretrained(out)
    model = CocaForConditionalGeneration.from_pretrained(out).eval().requires_grad_(False)
    processor = CocaProcessor.from_pretrained(out, backend="pil")

    on_train = evaluator_of(processor, data["train"], features["train"])
    captions = sorted({caption for split in data.values() for caption in split["caption"]})
    all_captions, candidates = (
        {caption: i for i, caption in enumerate(captions)},
        on_train.encode_texts(model, captions),
    )
    classes = class_embeddings(model, on_train, data["train"]) if "group" in data["train"].features else None
    metrics, outputs = {}, {}
    for split in held_out:
        evaluator = evaluator_of(processor, data[split], features[split])
        metrics[split], outputs[split] = evaluate_split(
            model, evaluator, data[split], all_captions, candidates, classes
        )
        logger.info(f"{split}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics[split].items()))
    first = held_out[0]
    answers = answer_questions(model, processor, data[first], questions_of(data[first]), features[first])
    if answers:
        metrics[first]["answer_exact"] = float(np.mean([a["answer"] == a["truth"] for a in answers]))
    train_embeds, train_captions = on_train.encode_images(model), list(data["train"]["caption"])
    nearest = (outputs[first]["embeds"] @ train_embeds.T).argmax(dim=-1).tolist()
    same = [train_captions[i] == caption for i, caption in zip(nearest, data[first]["caption"], strict=True)]
    metrics[first]["i2i_r1"] = float(np.mean(same))
    metrics |= {"train_seconds": seconds, "design": args.design, "trainable_parameters": trainable}
    is_emoji = args.dataset_name is None
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    queries = embed_queries(model, on_train, data[first], FREE_QUERIES if is_emoji else ())
    results = build_page(metrics, outputs, answers, queries, train_embeds, data, EMOJI_CREDITS if is_emoji else ())
    logger.info(f"Trained in {seconds:.0f} s. Open {write_page(out / 'index.html', results)}")


if __name__ == "__main__":
    main()
