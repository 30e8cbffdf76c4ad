"""CoCa's processor: images and texts to the model's inputs, and generated ids back to text."""

from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import load_video, make_batched_videos

# CoCa continues a text; it holds no conversation. What was said so far is the prompt, and the image takes no tokens.
CHAT_TEMPLATE = """\
{%- set prompt = namespace(text='') -%}
{%- for message in messages if message['role'] != 'system' -%}
  {%- if message['content'] is string -%}
    {%- set prompt.text = prompt.text ~ ' ' ~ message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {%- set prompt.text = prompt.text ~ ' ' ~ part['text'] -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{{- prompt.text[1:] -}}
"""


class CocaProcessor(ProcessorMixin):
    """Wraps CoCa's image processor and tokenizer.

    Texts are padded to the longest of the batch, **on the left**: so a batch of prompts of unequal length ends in
    `<end_of_text>` in every row, which `generate` takes off before it goes on writing. Embeddings and losses do not
    depend on the side. Pass `padding_side="right"`, or use the tokenizer by itself, for the other one. A text longer
    than the model's context raises a `ValueError` unless `truncation=True`.

    `apply_chat_template` joins the text parts of a chat into one prompt (system messages are left out), so that the
    chat form of the `image-text-to-text` pipeline works: a question, or the beginning of a caption as the last message.
    `chat_template` is `None` all the same: by that attribute the pipeline tells models that expect a chat, and warns
    those who give plain text.

    Args:
        image_processor: `CocaImageProcessor` or `CocaImageProcessorPil`.
        tokenizer: `CocaTokenizer`.
        chat_template: Another Jinja template, for a model that was trained on chats.

    Example:

    ```python
    >>> from PIL import Image
    >>> from modeling_coca import CocaImageProcessor, CocaProcessor, CocaTokenizer

    >>> tokenizer = CocaTokenizer().train_new_from_iterator(["a photo of a red fox"] * 9, vocab_size=450)
    >>> processor = CocaProcessor(CocaImageProcessor(size=64), tokenizer)
    >>> image = Image.new("RGB", (80, 60), "red")
    >>> inputs = processor(images=[image, image], text=["a photo of", "a red"], return_tensors="pt")
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}  # [B, T], [B, T], [B, C, H, W]
    {'input_ids': (2, 5), 'attention_mask': (2, 5), 'pixel_values': (2, 3, 64, 64)}
    >>> processor.post_process_image_text_to_text(inputs["input_ids"])
    ['a photo of', 'a red']
    ```
    """

    text_kwargs = {"padding": True, "padding_side": "left"}

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """
        Images and texts, or videos and texts, to the model's inputs.

        Args:
            images, text: see [`ProcessorMixin`].
            videos: a video or a list of them: paths (decoded by PyAV), or frames as an array `(frames, height, width, 3)` or a
                list of `PIL.Image.Image`. `pixel_values` are then `(B, frames, channels, height, width)`.
            **kwargs: see [`ProcessorMixin`]; and `num_frames` (`int`, defaults to 8), the frames that are taken, at even
                distances, from each video that is given by its path.
        """
        num_frames = kwargs.pop("num_frames", 8)
        if videos is None:
            return super().__call__(images, text, audio=audio, **kwargs)
        if images is not None:
            raise ValueError("Give `images` or `videos`: each stands for the image.")
        clips = [
            load_video(clip, num_frames=num_frames)[0] if isinstance(clip, str) else clip
            for clip in make_batched_videos(videos)
        ]
        length = len(clips[0])
        if any(len(clip) != length for clip in clips):
            raise ValueError(f"`videos` must have equally many frames, got {[len(clip) for clip in clips]}.")
        inputs = super().__call__([frame for clip in clips for frame in clip], text, audio=audio, **kwargs)
        frames = inputs["pixel_values"]
        inputs["pixel_values"] = (
            [frames[i : i + length] for i in range(0, len(frames), length)]
            if isinstance(frames, list)
            else frames.reshape(len(clips), length, *frames.shape[1:])
        )
        return inputs

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """`ProcessorMixin.apply_chat_template`, with a template of its own where neither caller nor processor has one."""
        if chat_template is None and self.chat_template is None:
            chat_template = CHAT_TEMPLATE
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, and like the model's also for checkpoints of open_clip, CONCH and torchmultimodal."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            try:
                from modeling_coca.conversion import processor_for
            except ImportError:  # this file came from the Hub
                raise error from None
            return processor_for(pretrained_model_name_or_path, error, kwargs)


__all__ = ["CocaProcessor"]
