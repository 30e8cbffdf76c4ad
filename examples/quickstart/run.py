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
from emoji_data import load_emoji
from encoder import load_efficientnet_lite0
from features import compute_features
from page import write_page
from results import answer_questions, build_page, embed_queries, evaluate_split
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoModel, HfArgumentParser, PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaImageProcessorPil,
    CocaProcessor,
    CocaTokenizer,
)
from modeling_coca.training import CocaDataCollator, CocaTrainer, freeze

logger = logging.getLogger("quickstart")

# EfficientNet-Lite0's feature maps before the last: they still know colours, and so skin tones
FEATURE_LAYERS = [0, 1, 2, 3]


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where model, metrics and page go."})
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Where pictures and features are kept."})
    design: str = field(
        default="frozen",
        metadata={"help": "Image encoder: pretrained and frozen, or from scratch.", "choices": ["frozen", "scratch"]},
    )
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


class Rows(TorchDataset):
    """Training rows: a view of the picture, and its caption, or at times a question about it with the answer."""

    def __init__(self, dataset, features: np.ndarray | None, question_share: float):
        self.images = None if features is not None else dataset["image"]
        self.features = None if features is None else np.ascontiguousarray(features)
        self.captions, self.questions = dataset["caption"], dataset["qa"]
        self.captions, self.questions = list(self.captions), list(self.questions)
        self.question_share = question_share

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        row = {"question": "", "text": self.captions[index]}
        if self.questions[index] and torch.rand(()) < self.question_share:
            pick = self.questions[index][int(torch.randint(len(self.questions[index]), ()))]
            row = {"question": pick["question"], "text": pick["answer"]}
        if self.features is None:
            return {"image": self.images[index], **row}
        return {"features": self.features[index, int(torch.randint(self.features.shape[1], ()))], **row}


class StopAt(TrainerCallback):
    """Ends training in time on a machine that slows down after the schedule was made."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.monotonic() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.end


def load_frozen_encoder(name: str | None) -> PreTrainedModel:
    if name is None:
        return load_efficientnet_lite0()
    return AutoModel.from_pretrained(name).eval().requires_grad_(False)


def build_processor(dataset, image_size: int) -> CocaProcessor:
    """A tokenizer of the training texts' own words, and an image processor with the encoder's normalisation."""
    texts = set(dataset["caption"])
    for questions in dataset["qa"]:
        texts.update(text for pair in questions for text in pair.values())
    tokenizer = CocaTokenizer(model_max_length=40).train_new_from_iterator(sorted(texts), vocab_size=3000)
    image_processor = CocaImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CocaProcessor(image_processor, tokenizer)


def build_model(
    args: QuickstartArguments, tokenizer: CocaTokenizer, encoder: PreTrainedModel | None, image_size: int
) -> CocaForConditionalGeneration:
    if encoder is None:
        vision_config = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
        vision_config |= {"image_size": image_size, "patch_size": 8}
    else:
        vision_config = encoder.config
    config = CocaConfig(
        vision_config=vision_config,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": args.width,
            "intermediate_size": 4 * args.width,
            "num_hidden_layers": 2 * args.layers,
            "num_multimodal_layers": args.layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 41,
            "dropout": args.dropout,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_feature_layers=FEATURE_LAYERS if encoder is not None and args.vision_model is None else None,
        num_query_tokens=16,
        num_pooler_attention_heads=4,
        projection_dim=128,
    )
    # Eager: for texts of a dozen tokens the fused CPU kernels' backward pass takes several times as long
    model = CocaForConditionalGeneration._from_config(config, attn_implementation="eager")
    if encoder is not None:
        model.model.vision_model.load_state_dict(encoder.state_dict())
        freeze(model, "vision_model")
    return model


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
    set_seed(args.seed)
    out, cache = Path(args.output_dir), Path(args.cache_dir)
    data = load_emoji(cache)

    encoder = load_frozen_encoder(args.vision_model) if args.design == "frozen" else None
    image_size = args.image_size or (128 if encoder is not None else 64)
    features = dict.fromkeys(data)
    if encoder is not None:
        feature_layers = None if args.vision_model else FEATURE_LAYERS
        name = (args.vision_model or "efficientnet-lite0").replace("/", "--")
        for split in data:
            views = args.views if split == "train" else 1
            path = cache / "features" / f"{name}-{image_size}px-{views}views-{split}.npy"
            features[split] = compute_features(
                data[split], encoder, image_size, views, args.seed, path, feature_layers, desc=split
            )

    processor = build_processor(data["train"], image_size)
    model = build_model(args, processor.tokenizer, encoder, image_size)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"{trainable / 1e6:.1f} M trainable of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    )
    seconds = train(args, model, Rows(data["train"], features["train"], args.question_share), processor)

    model.save_pretrained(out)
    processor.save_pretrained(out)
    model = CocaForConditionalGeneration.from_pretrained(out).eval()
    processor = CocaProcessor.from_pretrained(out, backend="pil")

    all_captions = sorted({caption for split in data.values() for caption in split["caption"]})
    metrics, outputs = {}, {}
    for split in ("test_style", "test_comp", "validation"):
        metrics[split], outputs[split] = evaluate_split(model, processor, data[split], features[split], all_captions)
        logger.info(f"{split}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics[split].items()))
    answers = answer_questions(model, processor, data["test_style"], features["test_style"])
    metrics["test_style"]["answer_exact"] = float(np.mean([a["answer"] == a["truth"] for a in answers]))
    metrics |= {"train_seconds": seconds, "design": args.design, "trainable_parameters": trainable}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    queries = embed_queries(model, processor, data)
    page = write_page(out / "index.html", build_page(metrics, outputs, answers, queries, data))
    logger.info(f"Trained in {seconds:.0f} s. Open {page}")


if __name__ == "__main__":
    main()
