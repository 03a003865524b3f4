"""How different files name the same tensors: one table of prefixes for each naming scheme.

A hub name is what `llava-hf/LLaVA-NeXT-Video-7B-hf` uses on disk; the other schemes differ from it by prefixes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.untrusted import short

LLAMA = "language_model.model."
TOWER = "vision_tower.vision_model."
RESAMPLER = "model.vision_resampler."
"""transformers 4.52 to 4.57 rename all but the pooler, on the way out and on the way in: so this is what they find."""


@dataclass(frozen=True)
class NamingScheme:
    """One way of naming the same tensors. `prefixes` maps the start of a name on disk to the start of its hub name;
    the longest that fits counts."""

    name: str
    prefixes: tuple[tuple[str, str], ...]
    about: str
    holds: str = "a LLaVA-NeXT model"
    dropped: tuple[tuple[str, str], ...] = ()
    """Starts of names that our model has no use for, with the reason."""

    def to_hub(self, name: str) -> str | None:
        """The hub name of a name on disk, or None when it does not belong to this scheme."""
        fitting = [(old, new) for old, new in self.prefixes if name.startswith(old)]
        if not fitting:
            return None
        old, new = max(fitting, key=lambda pair: len(pair[0]))
        return new + name[len(old) :]

    def drop_reason(self, name: str) -> str | None:
        """Why a name on disk is left out, or None."""
        return next((reason for prefix, reason in self.dropped if name.startswith(prefix)), None)


HUB = NamingScheme(
    "hub",
    (
        (TOWER, TOWER),
        ("multi_modal_projector.", "multi_modal_projector."),
        ("image_newline", "image_newline"),
        ("vision_resampler.", RESAMPLER),
        ("model.vision_resampler.", RESAMPLER),
        (LLAMA, LLAMA),
        ("language_model.lm_head.", "language_model.lm_head."),
    ),
    "llava-hf on the hub; save_pretrained of transformers up to 4.57",
)
_WRAPPED = (
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("model.vision_resampler.", RESAMPLER),
    ("model.language_model.", LLAMA),
    ("lm_head.", "language_model.lm_head."),
)
SCHEMES = (
    HUB,
    NamingScheme(
        "wrapped", (("model.vision_tower.vision_model.", TOWER), *_WRAPPED), "state_dict of transformers 4.52-5.5"
    ),
    NamingScheme("flat", (("model.vision_tower.", TOWER), *_WRAPPED), "transformers 5.6 and later"),
    NamingScheme(
        "original",
        (
            ("model.vision_tower.vision_tower.vision_model.", TOWER),
            ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
            ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
            ("model.image_newline", "image_newline"),
            ("model.vision_resampler.", RESAMPLER),
            ("model.embed_tokens.", LLAMA + "embed_tokens."),
            ("model.layers.", LLAMA + "layers."),
            ("model.norm.", LLAMA + "norm."),
            ("lm_head.", "language_model.lm_head."),
        ),
        "the authors' own repositories",
    ),
)

_TEXT_TOWER = "CLIP's own text tower, which LLaVA does not have"
CLIP_SCHEMES = (
    NamingScheme(
        "clip",
        (("vision_model.", TOWER),),
        "CLIPModel or CLIPVisionModel of transformers",
        "a CLIP vision tower",
        (
            ("text_model.", _TEXT_TOWER),
            ("text_projection.", _TEXT_TOWER),
            ("visual_projection.", "CLIP's projection into the space shared with texts, which LLaVA does not use"),
            ("logit_scale", "CLIP's contrastive loss, which LLaVA does not use"),
        ),
    ),
    NamingScheme(
        "clip-flat",
        tuple((part, TOWER + part) for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")),
        "CLIPVisionModel of transformers 5.6 and later",
        "a CLIP vision tower",
    ),
)
LLAMA_SCHEMES = (
    NamingScheme(
        "llama",
        (("model.", LLAMA), ("lm_head.", "language_model.lm_head.")),
        "LlamaForCausalLM of transformers",
        "a Llama language model",
    ),
)


def detect_scheme(
    names: Iterable[str], where: str, known: Callable[[str], bool], schemes: Sequence[NamingScheme] = SCHEMES
) -> tuple[NamingScheme, dict[str, str]]:
    """Recognise the naming scheme of a folder.

    Args:
        names: names on disk.
        where: the folder, for the message.
        known: whether a hub name belongs to some model.

    Returns:
        The scheme, and name on disk → hub name for the names that belong to it; the caller reports the others.

    Raises:
        CheckpointError: no scheme knows even half of the names.
    """
    names = list(names)

    def fitting(scheme: NamingScheme) -> int:
        # A name must also end as some rule does: the "flat" prefix alone would accept the "wrapped" names too.
        explained = (scheme.drop_reason(name) or ((hub := scheme.to_hub(name)) and known(hub)) for name in names)
        return sum(map(bool, explained))

    best = max(schemes, key=fitting)
    if fitting(best) * 2 < len(names) or not names:
        raise CheckpointError(
            f"{where}: the weights do not have the names of {best.holds}",
            "use a model whose weights are named by a known scheme: "
            + "; ".join(f"{scheme.name} ({scheme.about})" for scheme in schemes),
            [f"for example: {short(name)}" for name in sorted(names)[:5]],
        )
    return best, {name: hub for name in names if (hub := best.to_hub(name))}
