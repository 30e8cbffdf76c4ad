"""Pipelines for two tasks that transformers has none for: `image-captioning` and `coca-vqa`.

They are registered by `import modeling_coca`. A folder or Hub repository written by `modeling_coca.hub` brings them along
for those who do not have the package: `pipeline("image-captioning", model=..., trust_remote_code=True)`.
"""

import importlib
import json
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import find_adapter_config_file

from .image_processing_pil_coca import load_rgb

ANSWER_HEAD = "CocaForVisualQuestionAnswering"


class _CocaPipeline(Pipeline):
    """What both have in common: a processor, and words that `generate` writes."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig()

    auto_classes: dict[str, str]  # name of a model class that can do the task -> Auto class that opens it

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.model).__name__ not in self.auto_classes:
            raise ValueError(
                f"The pipeline {self.task!r} needs a {' or a '.join(self.auto_classes)}, got a "
                f"{type(self.model).__name__}."
            )

    def _inputs(self, image: Any, text: str, timeout: float | None):
        images = [load_rgb(image, timeout=timeout)]
        return self.processor(images=images, text=[text], return_tensors="pt").to(dtype=self.dtype)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves model and processor with the code of both and of the pipeline, see `modeling_coca.hub`."""
        if not __package__.startswith("transformers_modules"):
            importlib.import_module(".hub", __package__).export_to_folder(
                self.model, self.processor, save_directory, **kwargs
            )
            return
        # This code has come with a checkpoint. Model and processor copy theirs themselves
        self.processor.save_pretrained(save_directory)
        custom_object_save(self, save_directory)
        self.model.save_pretrained(save_directory, **kwargs)


class CocaImageCaptioningPipeline(_CocaPipeline):
    """
    Captions for images, task `image-captioning`, by a [`CocaForConditionalGeneration`].

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import modeling_coca

    >>> captioner = pipeline("image-captioning", model="outputs/quickstart")  # doctest: +SKIP
    >>> captioner("fox.png")  # doctest: +SKIP
    [{'generated_text': 'a red fox'}]
    >>> captioner(["fox.png", "whale.png"], prompt="a photo of", num_beams=3, batch_size=2)  # doctest: +SKIP
    [[{'generated_text': 'a photo of a red fox'}], [{'generated_text': 'a photo of a blue whale'}]]
    ```
    """

    auto_classes = {"CocaForConditionalGeneration": "AutoModelForImageTextToText"}

    def __call__(self, images, **kwargs):
        """
        Args:
            images: a path, URL, base64 string or `PIL.Image.Image`; or a list, a torch data set or a generator of these.
            prompt (`str`, defaults to `""`): the beginning of every caption.
            timeout (`float`, *optional*): seconds to wait for an image from the web.
            batch_size (`int`, defaults to 1): images at a time, where there are several.
            **kwargs: of `generate`: `max_new_tokens`, `num_beams`, `num_return_sequences`, ...

        Returns:
            For each image a list of `{"generated_text": ...}`, as many as `num_return_sequences`, prompt included.
        """
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(self, prompt=None, timeout=None, generate_kwargs=None, **kwargs):
        preprocess = {"prompt": prompt, "timeout": timeout}
        forward = {**(generate_kwargs or {}), **kwargs}
        return {name: value for name, value in preprocess.items() if value is not None}, forward, {}

    def preprocess(self, image, prompt="", timeout=None):
        return self._inputs(image, prompt, timeout)

    def _forward(self, model_inputs, **generate_kwargs):
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=False)
        sequences = self.model.generate(**model_inputs, **generate_kwargs)
        return {"sequences": sequences.unflatten(0, (len(model_inputs["input_ids"]), -1))}

    def postprocess(self, model_outputs):
        texts = self.processor.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]


class AutoModelForCocaVqa:
    """Opens a checkpoint as what it was saved as, with a list of answers or with words."""

    @classmethod
    def from_pretrained(cls, name: str, **kwargs) -> PreTrainedModel:
        where = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")
        where = {key: kwargs[key] for key in where if key in kwargs}
        try:
            config = AutoConfig.from_pretrained(name, **where)
        except (OSError, ValueError):
            trust = where.pop("trust_remote_code", None)
            adapter = find_adapter_config_file(name, **where)
            if adapter is None:
                raise
            where.pop("revision", None)  # the adapter's
            with open(adapter, encoding="utf-8") as file:
                base_model = json.load(file)["base_model_name_or_path"]
            config = AutoConfig.from_pretrained(base_model, trust_remote_code=trust, **where)
        has_head = ANSWER_HEAD in (config.architectures or [])
        auto_class = AutoModelForVisualQuestionAnswering if has_head else AutoModelForImageTextToText
        return auto_class.from_pretrained(name, **kwargs)


class CocaVisualQuestionAnsweringPipeline(_CocaPipeline):
    """
    Answers to questions about images, task `coca-vqa`. A [`CocaForConditionalGeneration`] goes on writing after the
    question; a [`CocaForVisualQuestionAnswering`] chooses from its list of answers.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import modeling_coca

    >>> vqa = pipeline("coca-vqa", model="outputs/quickstart")  # doctest: +SKIP
    >>> vqa("fox.png", "what kind of thing is this?", top_k=2)  # doctest: +SKIP
    [{'answer': 'animal', 'score': 0.93}, {'answer': 'plant', 'score': 0.04}]
    ```
    """

    auto_classes = {
        "CocaForConditionalGeneration": "AutoModelForImageTextToText",
        ANSWER_HEAD: "AutoModelForVisualQuestionAnswering",
    }
    _non_generation_params = ("top_k",)

    def __call__(self, image, question=None, **kwargs):
        """
        Args:
            image: as in the captioning pipeline, without data sets and generators.
            question (`str` or list of them):
                One for all images, or one for each image. Several questions about one image are a list, too. Left out
                if the first argument has both: `{"image": ..., "question": ...}`, or a list, a torch data set or a
                generator of these.
            top_k (`int`, *optional*):
                Answers to give. Several from a model that writes come from a beam search. Defaults to 1 of those, and
                to 5 of a list of answers.
            function_to_apply (`"softmax"`, `"sigmoid"` or `"none"`, *optional*):
                From scores of a list of answers to probabilities. Defaults to the sigmoid where
                `config.problem_type` is `"multi_label_classification"`, and to the softmax.
            timeout, batch_size, **kwargs: as in the captioning pipeline.

        Returns:
            For each question a list of `{"answer": ..., "score": ...}`, the best first. The score is the probability of
            the answer: of all its tokens, for an answer that was written.
        """
        if question is None:
            return super().__call__(image, **kwargs)
        if isinstance(image, str | bytes) or not isinstance(image, list | tuple):
            if isinstance(question, str):
                return super().__call__({"image": image, "question": question}, **kwargs)
            image = [image] * len(question)
        elif isinstance(question, str):
            question = [question] * len(image)
        if len(image) != len(question):
            raise ValueError(f"There are {len(image)} images for {len(question)} questions: give one for each, or one.")
        pairs = [{"image": one, "question": text} for one, text in zip(image, question, strict=True)]
        return super().__call__(pairs, **kwargs)

    def _sanitize_parameters(self, top_k=None, function_to_apply=None, timeout=None, generate_kwargs=None, **kwargs):
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        if function_to_apply not in (None, "softmax", "sigmoid", "none"):
            raise ValueError(f'`function_to_apply` must be "softmax", "sigmoid" or "none", got {function_to_apply!r}.')
        forward = {**(generate_kwargs or {}), **kwargs}
        if not self.model.can_generate():
            if forward:
                raise ValueError(f"{type(self.model).__name__} does not generate: leave out {', '.join(forward)}.")
            postprocess = {"top_k": top_k, "function_to_apply": function_to_apply}
        else:
            forward["top_k"] = top_k
            postprocess = {}

        def given(parameters: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in parameters.items() if value is not None}

        return given({"timeout": timeout}), given(forward), given(postprocess)

    def preprocess(self, inputs, timeout=None):
        if not isinstance(inputs, dict) or not {"image", "question"} <= inputs.keys():
            raise ValueError('Give an image and a question, or {"image": ..., "question": ...}.')
        return self._inputs(inputs["image"], inputs["question"], timeout)

    def _forward(self, model_inputs, top_k=1, **generate_kwargs):
        if not self.model.can_generate():
            return {"logits": self.model(**model_inputs).logits}
        if top_k > 1:
            beams = max(top_k, generate_kwargs.get("num_beams", top_k))
            generate_kwargs |= {"num_beams": beams, "num_return_sequences": top_k}
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs, return_dict_in_generate=True, output_scores=True
        )
        outputs = self.model.generate(**model_inputs, **generate_kwargs)
        log_probs = self.model.compute_transition_scores(
            outputs.sequences, outputs.scores, outputs.get("beam_indices"), normalize_logits=True
        )
        answers = outputs.sequences[:, -log_probs.shape[1] :]
        ends = torch.isin(answers, answers.new_tensor(self.model.generation_config.eos_token_id))
        after_end = ends.cumsum(-1) - ends.long() > 0
        scores = log_probs.masked_fill(after_end, 0).sum(-1).exp()
        per_question = (len(model_inputs["input_ids"]), -1)
        return {"answers": answers.unflatten(0, per_question), "scores": scores.unflatten(0, per_question)}

    def postprocess(self, model_outputs, top_k=5, function_to_apply=None):
        if "answers" in model_outputs:
            answers = self.processor.batch_decode(model_outputs["answers"][0], skip_special_tokens=True)
            scores, order = model_outputs["scores"][0].float().sort(descending=True)
        else:
            answers, scores = self.model.config.id2label, model_outputs["logits"][0].float()
            if function_to_apply is None:
                several = self.model.config.problem_type == "multi_label_classification"
                function_to_apply = "sigmoid" if several else "softmax"
            if function_to_apply != "none":
                scores = scores.sigmoid() if function_to_apply == "sigmoid" else scores.softmax(-1)
            scores, order = scores.topk(min(top_k, len(scores)))
        ranked = zip(order.tolist(), scores.tolist(), strict=True)
        return [{"answer": answers[i].strip(), "score": score} for i, score in ranked]


if not __name__.startswith("transformers_modules"):  # code that came with a checkpoint is found by its config
    PIPELINE_REGISTRY.register_pipeline(
        "image-captioning", CocaImageCaptioningPipeline, AutoModelForImageTextToText, type="multimodal"
    )
    PIPELINE_REGISTRY.register_pipeline(
        "coca-vqa", CocaVisualQuestionAnsweringPipeline, AutoModelForCocaVqa, type="multimodal"
    )

__all__ = ["CocaImageCaptioningPipeline", "CocaVisualQuestionAnsweringPipeline"]
