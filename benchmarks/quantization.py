"""Size, speed and drift of a CoCa on the CPU, in int8 and half precision, by PyTorch and by ONNX Runtime.

    python benchmarks/quantization.py outputs/quickstart --dataset outputs/quickstart_cache/emoji --split test_style \\
        --text_column caption
    python benchmarks/quantization.py hub_configs/coca-vit-b-32  # random weights, noise for images

Prints a table of: the folder's size, milliseconds of one CPU core an image for its embedding and for its greedy caption (the
image encoded anew; what other processes do meanwhile does not count, run it with `OMP_NUM_THREADS=1`),
cosines of image and text embeddings with those of fp32 (mean, least), and the share of captions that are word for word those
of fp32. With a data set that has captions, the share that is right as well.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, BitsAndBytesConfig, TorchAoConfig

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.exporting import export


class TorchModel:
    def __init__(self, model: CocaForConditionalGeneration, max_new_tokens: int):
        self.model, self.max_new_tokens = model.eval(), max_new_tokens

    @torch.inference_mode()
    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).image_embeds

    @torch.inference_mode()
    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)

    @torch.inference_mode()
    def caption(self, pixel_values: torch.Tensor) -> list[list[int]]:
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        return self.model.generate(pixel_values, **options).tolist()


class OnnxModel:
    def __init__(self, folder: Path, config, max_new_tokens: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.sessions = {p.stem: onnxruntime.InferenceSession(p, options) for p in folder.glob("*.onnx")}
        self.config, self.max_new_tokens = config, max_new_tokens

    def run(self, part: str, **inputs) -> list[np.ndarray]:
        return self.sessions[part].run(None, {name: np.asarray(value) for name, value in inputs.items()})

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.run("image_encoder", pixel_values=pixel_values)[0])

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.run("text_encoder", input_ids=input_ids, attention_mask=attention_mask)[0])

    def caption(self, pixel_values: torch.Tensor) -> list[list[int]]:
        config, batch = self.config, len(pixel_values)
        image_cache = self.run("image_encoder", pixel_values=pixel_values)[1]
        heads = config.num_attention_heads
        cache = np.zeros((2 * config.num_hidden_layers, batch, heads, 0, config.hidden_size // heads), np.float32)
        ids = np.full((batch, 1), config.bos_token_id)
        for _ in range(self.max_new_tokens):
            inputs = {"input_ids": ids[:, -1:], "attention_mask": np.ones_like(ids), "image_cache": image_cache}
            if config.shifted_cls_mask:
                shifted = np.pad(ids[:, :-1] != config.pad_token_id, ((0, 0), (1, 0)), constant_values=True)
                inputs["text_attention_mask"] = shifted.astype(np.int64)
            logits, cache = self.run("text_decoder", **inputs, text_cache=cache)
            ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
            if (ids == config.eos_token_id).any(axis=1).all():
                break
        return ids.tolist()


def variants(folder: str, scratch: Path, pixel_values: torch.Tensor, max_new_tokens: int):
    """Name, where its weights are, and a function that opens it."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    def by_torch(name: str, **options):
        model = CocaForConditionalGeneration.from_pretrained(folder, **options)
        model.save_pretrained(scratch / name)
        return TorchModel(model, max_new_tokens)

    def by_onnx(name: str, **options):
        model = CocaForConditionalGeneration.from_pretrained(folder).eval()
        export(model, pixel_values, **options).save_pretrained(scratch / name)
        return OnnxModel(scratch / name, model.config.text_config, max_new_tokens)

    kept = ["lm_head", ".*_projection"]  # by default it would be the last layer of the class
    quantized = {
        "torchao int8 weights": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept),
        "torchao int8 weights and activations": TorchAoConfig(
            Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept
        ),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept),
    }
    yield "fp32", lambda name: by_torch(name)
    yield "bf16", lambda name: by_torch(name, dtype=torch.bfloat16)
    for name, config in quantized.items():
        yield name, lambda name, config=config: by_torch(name, quantization_config=config, device_map="cpu")
    yield "ONNX fp32", lambda name: by_onnx(name)
    # Convolutions are left out: dynamic quantisation makes them slower, and ruins small ones
    int8 = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"])
    yield "ONNX int8", lambda name: by_onnx(name, quantizer=OnnxRuntimeQuantizer(int8))


def milliseconds(function: Callable, batches: list[torch.Tensor]) -> tuple[float, list]:
    function(batches[0])  # warm
    start = time.process_time()
    outputs = [function(batch) for batch in batches]
    return 1000 * (time.process_time() - start) / sum(map(len, batches)), outputs


def captions_of(ids: list[list[int]], eos: int) -> list[tuple[int, ...]]:
    return [tuple(row[: row.index(eos)] if eos in row else row) for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or of a config alone: random weights")
    parser.add_argument("--dataset", help="folder written by `datasets`' save_to_disk, with an `image` column")
    parser.add_argument("--split", default="test")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="names of variants, by default all")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        scratch, folder, answers = Path(scratch), args.model, None
        if not list(Path(folder).glob("*.safetensors")):
            config = AutoConfig.from_pretrained(folder)
            folder = str(scratch / "random")
            CocaForConditionalGeneration(config).save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        eos = config.text_config.eos_token_id
        if args.dataset:
            import datasets

            rows = datasets.load_from_disk(args.dataset)[args.split].shuffle(seed=0).select(range(args.images))
            processor = CocaProcessor.from_pretrained(args.model)
            pixels = processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"]
            texts = processor(text=list(rows[args.text_column]), return_tensors="pt")
            answers = captions_of(texts["input_ids"].tolist(), eos)
            answers = [tuple(token for token in row if token != config.text_config.pad_token_id) for row in answers]
        else:
            size = config.vision_config.image_size
            pixels = torch.randn(args.images, 3, size, size)
            ids = torch.randint(3, config.text_config.vocab_size - 2, (args.images, 12))
            texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches = list(pixels.split(args.batch_size))
        print(
            "| | MB | ms an image, embedding | ms an image, caption | cosine of images | cosine of texts | captions as in fp32 "
            "| captions right |\n|---|---|---|---|---|---|---|---|"
        )
        expected = None
        for name, build in variants(folder, scratch, pixels[:1], args.max_new_tokens):
            if args.only and name not in {"fp32", *args.only}:
                continue
            model = build(name)
            size = sum(file.stat().st_size for file in (scratch / name).iterdir() if file.suffix != ".json") / 1e6
            embedding_time, image_embeds = milliseconds(model.embed_images, batches)
            caption_time, ids = milliseconds(model.caption, batches)
            captions = captions_of([row for batch in ids for row in batch], eos)
            found = torch.cat(image_embeds).float(), model.embed_texts(**texts).float(), captions
            expected = expected or found
            cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(found[:2], expected[:2], strict=True)]
            same = np.mean([a == b for a, b in zip(captions, expected[2], strict=True)])
            right = (
                "" if answers is None else f"{np.mean([a == b for a, b in zip(captions, answers, strict=True)]):.3f}"
            )
            print(
                f"| {name} | {size:.1f} | {embedding_time:.1f} | {caption_time:.1f} "
                + "".join(f"| {c.mean():.5f}, {c.min():.5f} " for c in cosines)
                + f"| {same:.3f} | {right} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
