"""What fine-tuning on new pictures forgets of old ones, by how it is done.

    python benchmarks/forgetting.py --emoji_cache outputs/cache --output_dir outputs/forgetting --figure benchmarks/forgetting.png

A small CoCa on a frozen EfficientNet-Lite0 learns emoji by two artists (Noto, Fluent) and is then fine-tuned to caption
those of a third (Twemoji), in each of the ways that `examples/finetune_captioning.py` offers. Asked of each model:
captions of the new artist's held-out drawings, and zero-shot classification and search among the old ones' held-out
drawings. Results go to `results.json` in the output folder, and into a plot.

`--emoji_cache` is where the quickstart keeps its emoji (`--cache_dir` there).
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import datasets
import torch

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.evaluation import CaptioningEvaluator, RetrievalEvaluator, ZeroShotClassificationEvaluator
from modeling_coca.training import FeatureDataset, compute_features, interpolate

EXAMPLES = Path(__file__).parents[1] / "examples"
OLD, NEW = ("noto", "fluent"), ("twemoji",)
FEATURES = "image_hidden_states"
VIEWS = "--feature_views 2 --zoom 0.85 1.1 --shift 0.06 --rotate 8"
CAPTION_ONLY = "--contrastive_loss_weight 0"
METHODS = {
    "captions only": f"{CAPTION_ONLY} --freeze vision_model",
    "both losses": "--freeze vision_model",
    "captions, only the decoder": f"{CAPTION_ONLY} --freeze vision_model model.image_pooler model.text_model",
    "captions, LoRA of rank 8": f"{CAPTION_ONLY} --freeze vision_model --lora_rank 8 --learning_rate 2e-3",
    "both losses, LoRA of rank 8": "--freeze vision_model --lora_rank 8 --learning_rate 2e-3",
}
INTERPOLATED = ("captions only", "both losses")
ALPHAS = (0.2, 0.4, 0.6, 0.8)
SIZES = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_multimodal_layers": 3,
        "num_attention_heads": 4,
        "dropout": 0.1,
    },
    "num_query_tokens": 16,
    "num_pooler_attention_heads": 4,
    "projection_dim": 128,
}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(args: argparse.Namespace) -> dict[str, datasets.DatasetDict]:
    """The old and the new artists' drawings, each with those held out in any way as its test split."""
    sys.path.insert(0, str(EXAMPLES / "quickstart"))
    from emoji_data import load_emoji

    emoji = load_emoji(args.emoji_cache)
    held_out = datasets.concatenate_datasets([emoji[split] for split in ("validation", "test_style", "test_comp")])
    parts = {}
    for name, styles in (("old", OLD), ("new", NEW)):
        parts[name] = datasets.DatasetDict(
            {
                split: rows.select([i for i, style in enumerate(rows["style"]) if style in styles])
                for split, rows in (("train", emoji["train"]), ("test", held_out))
            }
        )
        parts[name].save_to_disk(args.output_dir / "data" / name)
    return parts


class Judge:
    """Figures of a model: captions of the new drawings, zero-shot and search among the old ones."""

    def __init__(self, model, processor: CocaProcessor, parts: dict[str, datasets.DatasetDict], folder: Path):
        layers = model.config.vision_feature_layers
        rows = {}
        for name, part in parts.items():
            features = compute_features(
                part["test"],
                model.model.vision_model,
                processor.image_processor,
                folder / f"{name}-test.npy",
                feature_layers=layers,
            )
            rows[name] = FeatureDataset(part["test"], features)
        old, new = parts["old"]["train"], rows["new"]
        members: dict[str, list[str]] = {}
        for group, caption in sorted(set(zip(old["group"], old["caption"], strict=True))):
            members.setdefault(group, []).append(caption)
        # A class is described by the names of its members, evenly chosen
        templates = [lambda group, i=i: members[group][i * len(members[group]) // 50] for i in range(50)]
        captions = sorted({caption for part in parts.values() for rows in part.values() for caption in rows["caption"]})
        shared = {"image_hidden_states_column": FEATURES, "batch_size": 128, "truncation": True}
        self.evaluators = [
            CaptioningEvaluator(processor, new, text_column="caption", name="new", **shared),
            CaptioningEvaluator(processor, rows["old"], text_column="caption", name="old", **shared),
            RetrievalEvaluator(
                processor, rows["old"], text_column="caption", extra_texts=captions, name="old", **shared
            ),
            ZeroShotClassificationEvaluator(
                processor,
                rows["old"],
                label_column="group",
                class_names=sorted(members),
                templates=templates,
                name="old",
                **shared,
            ),
        ]

    def __call__(self, model) -> dict[str, float]:
        return {name: value for evaluator in self.evaluators for name, value in evaluator(model).items()}


def load(folder: Path) -> CocaForConditionalGeneration:
    return CocaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


def arguments(args: argparse.Namespace, data: str, out: Path, epochs: float, more: str) -> list[str]:
    return [
        *("--dataset_name", str(args.output_dir / "data" / data), "--eval_split", "test", "--max_eval_samples", "8"),
        *("--text_column", "caption", "--feature_cache", str(args.output_dir / f"features-{data}")),
        *("--output_dir", str(out), "--num_train_epochs", str(epochs), "--per_device_train_batch_size", "128"),
        *("--attn_implementation", "eager", "--bf16", "True", "--save_strategy", "no", "--report_to", "none"),
        *("--use_cpu", str(not torch.cuda.is_available()), "--seed", str(args.seed), *VIEWS.split(), *more.split()),
    ]


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    x, y = "old_zero_shot_top1", "new_cider_d"
    before = results["before"]
    axes.axvspan(100 * before[x] - 1, 100 * before[x] + 1, color="0.92", label="within one point of before")
    for name in INTERPOLATED:
        path_between = [before, *(results[f"{name}, alpha {alpha}"] for alpha in ALPHAS), results[name]]
        axes.plot([100 * r[x] for r in path_between], [r[y] for r in path_between], "o--", markersize=4, linewidth=1)
    for name, figures in results.items():
        if "alpha" not in name:
            axes.plot(100 * figures[x], figures[y], "s", color="black", markersize=6)
            right = figures[x] > before[x] + 0.05  # no room for a label there
            place = {"xytext": (-7, 6), "ha": "right"} if right else {"xytext": (6, 6)}
            axes.annotate(name, (100 * figures[x], figures[y]), textcoords="offset points", fontsize=9, **place)
    axes.set_xlabel("old drawings: zero-shot accuracy among nine groups, %")
    axes.set_ylabel("new drawings: CIDEr-D of the captions")
    axes.margins(x=0.15, y=0.1)
    axes.legend(loc="lower left", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji_cache", type=Path, default=Path("outputs/cache"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/forgetting"))
    parser.add_argument("--figure", type=Path, default=Path("outputs/forgetting/forgetting.png"))
    parser.add_argument("--base_epochs", type=float, default=10)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning_rate", default="1e-3")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    parts = prepare(args)

    encoder, config, base = (args.output_dir / name for name in ("encoder", "config", "before"))
    script("prepare_data").save_encoder(encoder)
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps({"model_type": "coca", **SIZES}))
    if not (base / "model.safetensors").is_file():
        more = f"--vision_model {encoder} --config_name {config} --vision_feature_layers 0 1 2 3 --vocab_size 3000"
        more += " --max_text_length 40 --learning_rate 2e-3"
        script("train_frozen_encoder").main(arguments(args, "old", base, args.base_epochs, more))
    before = load(base)
    judge = Judge(before, CocaProcessor.from_pretrained(base, backend="pil"), parts, args.output_dir / "features-test")

    results_path = args.output_dir / "results.json"  # after an interruption, what is in it is not done again
    results: dict[str, dict[str, float]] = json.loads(results_path.read_text()) if results_path.is_file() else {}

    def keep(name: str, model: CocaForConditionalGeneration) -> None:
        if name not in results:
            results[name] = judge(model)
            results_path.write_text(json.dumps(results, indent=2))

    keep("before", before)
    for name, options in METHODS.items():
        out = args.output_dir / name.replace(" ", "-").replace(",", "")
        if not (out / "model.safetensors").is_file():
            more = f"--model_name_or_path {base} --learning_rate {args.learning_rate} {options}"
            script("finetune_captioning").main(arguments(args, "new", out, args.epochs, more))
        after = load(out)
        keep(name, after)
        for alpha in ALPHAS if name in INTERPOLATED else ():
            keep(f"{name}, alpha {alpha}", interpolate(before, after, alpha))
    plot(results, args.figure)
    print("| | new: captions right | new: CIDEr-D | old: zero-shot | old: image to text R@1 | old: captions right |")
    print("|---|---|---|---|---|---|")
    for name, r in results.items():
        columns = ("new_caption_exact", "new_cider_d", "old_zero_shot_top1", "old_i2t_r1_all", "old_caption_exact")
        print(f"| {name} | " + " | ".join(f"{r[column]:.3f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
