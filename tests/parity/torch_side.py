"""The other side: transformers' own model on torch, with every stage recorded by hooks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    LlamaTokenizer,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoImageProcessor,
    LlavaNextVideoProcessor,
)

from llavanext_cli.weights.hf_names import LLAMA, TOWER
from tests.parity.cases import Case

transformers.logging.set_verbosity_error()  # it calls LlavaNextVideoImageProcessor deprecated, once a use
torch.set_num_threads(1)  # matrices this small are computed faster than handed to another thread

CLASSES = {
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
FORMS = {"llama": (SYSTEM, "USER: {} ASSISTANT:", " {}</s>"), "mistral": ("", "[INST] {} [/INST]", " {} </s>")}
"""Of a language model: what begins the text, a question and an answer, as the authors' training code writes them."""
EOS = 2


class Reference:
    """transformers' model of one folder, in float32, unpadded, one sample at a time.

    Raises:
        AssertionError: transformers misses weights in the folder, or knows nothing of some.
    """

    def __init__(self, folder: Path):
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        self.model, info = CLASSES[kind].from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        left = {key: sorted(value) for key, value in info.items() if value}
        assert not left, f"transformers and {folder} do not agree: {left}"
        self.model.eval()
        config = self.config = self.model.config
        if config.vision_feature_select_strategy == "full":
            leave_class_tokens_out_of_grids(self.model.model)
        side = config.vision_config.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        self.images = LlavaNextImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **sizes)
        self.videos = LlavaNextVideoImageProcessor(**sizes)
        # the processor divides by 4, the square of stride 2, and is wrong about its own pooler on odd sides
        patches = side // config.vision_config.patch_size
        self.frame_tokens = (patches // getattr(config, "spatial_pool_stride", 1)) ** 2
        self.tokenizer = LlamaTokenizer.from_pretrained(folder)
        # without its constructor, which wants torchvision; counting needs these attributes only
        self.counter = object.__new__(LlavaNextVideoProcessor)
        self.counter.image_processor, self.counter.patch_size = self.images, config.vision_config.patch_size
        self.counter.num_additional_image_tokens = int(config.vision_feature_select_strategy == "full")

    def inputs(self, case: Case, *, labels: bool = True) -> dict[str, Any]:
        """The arguments of the model. Pixels are transformers' own; ids and labels are those of the case."""
        sample = case.encoded
        made: dict[str, Any] = {
            "input_ids": torch.tensor(sample.input_ids[None].astype(np.int64)),
            "attention_mask": torch.ones(1, sample.length, dtype=torch.long),
        }
        if labels:
            made["labels"] = torch.tensor(sample.labels[None].astype(np.int64))
        return made | self.media([case])

    def media(self, cases: list[Case]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        images = [image for case in cases for image in case.images]
        videos = [frames for case in cases for frames in case.videos]
        if images:
            made |= dict(self.images(images, return_tensors="pt", do_pad=True))
        if videos:
            made["pixel_values_videos"] = self.videos(videos, return_tensors="pt")["pixel_values_videos"]
        return made

    def ids_and_labels(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """The conversation as one text, tokenised whole; and labels from the lengths of its beginnings.

        Placeholders are repeated as transformers' processor repeats them.
        """
        side = self.config.vision_config.image_size
        images = [self.counter._get_number_of_features(*size, side, side) for size in case.sizes]
        counts = {"<image>": images, "<video>": [self.frame_tokens * len(frames) for frames in case.videos]}
        text, question, answer = FORMS[self.config.text_config.model_type]
        spans = []
        for turn in case.sample.turns:
            if turn.role == "user":
                text += question.format(turn.text)
            else:
                begin = len(self.tokenizer(_repeated(text, counts)).input_ids)
                text += answer.format(turn.text)
                spans.append((begin, len(self.tokenizer(_repeated(text, counts)).input_ids)))
        ids = np.array(self.tokenizer(_repeated(text, counts)).input_ids, np.int32)
        labels = np.full_like(ids, -100)
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
        return ids, labels

    def tiles(self, case: Case) -> np.ndarray:
        """`float32[G + F, 3, R, R]`, what the two image processors make of the case."""
        side = self.config.vision_config.image_size
        parts = [np.zeros((0, 3, side, side), np.float32)]
        parts += [self.images(image, return_tensors="np")["pixel_values"][0] for image in case.images]
        parts += [self.videos(list(frames), return_tensors="np")["pixel_values_videos"][0] for frames in case.videos]
        return np.concatenate(parts)

    def stages(self, case: Case) -> dict[str, np.ndarray]:
        """Everything from pixels to the loss, by the names of stages.py."""
        with torch.no_grad(), self.recording() as record:
            out = self.model(**self.inputs(case))
        width, vision = self.config.text_config.hidden_size, self.config.vision_config.hidden_size
        rows = lambda name, last: np.concatenate(  # noqa: E731
            [np.zeros((0, last), np.float32), *[value.reshape(-1, last) for value in record.pop(name, [])]]
        )
        ids, labels = self.ids_and_labels(case)
        return {
            "pixels": self.tiles(case),
            "ids": ids,
            "labels": labels,
            "tower": rows("tower", vision),
            "pooled": rows("pooled", vision),
            "projected": rows("projected", width),
            **{name: values[0][0] for name, values in record.items()},
            "logits": out.logits[0].numpy(),
            "loss": out.loss.numpy(),
        }

    @contextmanager
    def recording(self):
        """Record what the modules return, in the order of their calls: images first, then videos."""
        record: dict[str, list[np.ndarray]] = {}
        inner, config = self.model.model, self.config

        def keep(name, pick=lambda out: out):
            def hook(module, args, out):
                record.setdefault(name, []).append(pick(out).detach().numpy())

            return hook

        def features(out):
            chosen = out.hidden_states[config.vision_feature_layer]
            return chosen[:, 1:] if config.vision_feature_select_strategy == "default" else chosen

        def embeddings(module, args, kwargs):
            record["fused"] = [kwargs["inputs_embeds"].detach().numpy()]

        first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
        handles = [
            inner.vision_tower.register_forward_hook(keep("tower", features)),
            *[
                pool.register_forward_hook(keep("pooled"))
                for pool in [getattr(inner, "vision_resampler", None)]
                if pool
            ],
            inner.multi_modal_projector.register_forward_hook(keep("projected")),
            inner.language_model.register_forward_pre_hook(embeddings, with_kwargs=True),
            *[
                layer.register_forward_hook(keep(f"layer {number}", first))
                for number, layer in enumerate(inner.language_model.layers)
            ],
            inner.language_model.norm.register_forward_hook(keep("norm")),
        ]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, case: Case) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradient of every parameter by its name in the hub's files."""
        self.model.zero_grad()
        loss = self.model(**self.inputs(case)).loss
        loss.backward()
        found = {
            hub_name(name): np.zeros(tuple(weight.shape), np.float32) if weight.grad is None else weight.grad.numpy()
            for name, weight in self.model.named_parameters()
        }
        return float(loss.detach()), found

    def batch(self, cases: list[Case]) -> dict[str, Any]:
        """Several samples as one batch, padded on the right and masked."""
        length = max(case.encoded.length for case in cases)
        ids = torch.full((len(cases), length), self.config.text_config.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, case in enumerate(cases):
            ids[row, : case.encoded.length] = torch.tensor(case.encoded.input_ids)
            labels[row, : case.encoded.length] = torch.tensor(case.encoded.labels)
            mask[row, : case.encoded.length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **self.media(cases)}

    def padded(self, cases: list[Case]) -> np.ndarray:
        """`float32[B, S, V]`: logits of several samples in one batch."""
        with torch.no_grad():
            return self.model(**self.batch(cases)).logits.numpy()

    def loss(self, cases: list[Case]) -> torch.Tensor:
        """Of several samples in one batch, averaged over their supervised tokens; with its graph."""
        return self.model(**self.batch(cases)).loss

    def generate(self, case: Case, tokens: int, ends: Sequence[int] = (2,)) -> list[int]:
        """The answer's ids, greedy; as long as asked, or up to and without one that ends it."""
        with torch.no_grad():
            out = self.model.generate(
                **self.inputs(case, labels=False),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(ends),
            )
        answer = out[0, case.encoded.length :].tolist()
        return answer[:-1] if answer[-1] in ends else answer


def leave_class_tokens_out_of_grids(model: torch.nn.Module) -> None:
    """Make the "full" strategy computable, which it is not in transformers: the class token of CLIP's tiles fits into
    no grid of patches, and `view` fails. As its processor counts it, the token leads the base tile and nothing else.
    """
    pack = model.pack_image_features

    def packed(image_features, *args, **kwargs):
        patches, lengths = pack([tiles[:, 1:] for tiles in image_features], *args, **kwargs)
        with_class = [torch.cat([tiles[0, :1], rows]) for tiles, rows in zip(image_features, patches, strict=True)]
        return with_class, lengths + 1

    model.pack_image_features = packed
    model.vision_resampler.register_forward_pre_hook(lambda module, args: (args[0][:, 1:],))


def project_first(reference: Reference) -> None:
    """The order of the original training code: frames are projected, then pooled."""
    model = reference.model.model
    pool, project = model.vision_resampler, model.multi_modal_projector
    pooling, projecting = pool.forward, project.forward
    of_frames: list[bool] = []

    def not_yet(features):
        of_frames.append(True)
        return features

    pool.forward = not_yet
    project.forward = lambda features: (
        pooling(projecting(features)) if of_frames and of_frames.pop() else projecting(features)
    )


def interpolate(reference: Reference) -> None:
    """The original's bilinear pooling: each side of the grid becomes ceil(side / stride)."""

    class Interpolate(torch.nn.Module):
        def forward(self, grid):
            size = [math.ceil(side / stride) for side in grid.shape[2:]]
            return torch.nn.functional.interpolate(grid, size=size, mode="bilinear")

    config = reference.config
    stride = config.spatial_pool_stride
    reference.model.model.vision_resampler.pool = Interpolate()
    reference.frame_tokens = math.ceil(config.vision_config.image_size / config.vision_config.patch_size / stride) ** 2


def _repeated(text: str, counts: dict[str, list[int]]) -> str:
    """Each placeholder as often as its medium has tokens."""
    left = {name: list(numbers) for name, numbers in counts.items()}
    return re.sub("<image>|<video>", lambda found: found[0] * left[found[0]].pop(0), text)


def hub_name(parameter: str) -> str:
    """A parameter of the module by its name in the hub's files."""
    if parameter.startswith("model.vision_resampler."):
        return parameter  # the one part that the hub's older layout never had
    name = parameter.removeprefix("model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("language_model."):
        return LLAMA + name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return TOWER + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    return name
