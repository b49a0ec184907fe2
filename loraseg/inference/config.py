"""Settings of a segmenter, shared by command line, batch jobs, evaluation and endpoint."""

from dataclasses import dataclass
from typing import Literal

from loraseg.inference.selection import AdapterMode, AdaptiveSettings, default_adaptive_settings

__all__ = ["AdaptiveSegmenterConfig", "AttentionLoraSetting", "Precision", "SegmenterConfig"]

AttentionLoraSetting = Literal["active", "inert", "as_trained"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    """The frozen models, and how adapters are weighted.

    Attributes:
        base: As for :func:`loraseg.segment.open_vocabulary.base.load_base`.
        encoder: As for :func:`loraseg.backbones.clip.load_clip`.
        clip_attention_lora: Whether LoRA pairs of the CLIP attention act; published SemLA adapters
            have zeros there. ``as_trained`` follows the majority of the library's adapters
            (:func:`~loraseg.inference.snapshot.build_snapshot`).
        precision: Type that the segmenter computes in; scores and label maps keep their types.
        k: Number of fused adapters; None for the encoder's preset.
        temperature: Temperature of the adapter weights; None for the encoder's preset.
    """

    base: str = "miniature"
    encoder: str = "miniature"
    clip_attention_lora: AttentionLoraSetting = "as_trained"
    precision: Precision = "fp32"
    k: int | None = None
    temperature: float | None = None

    def adaptive_settings(self, mode: AdapterMode = "fused") -> AdaptiveSettings:
        """Return K, temperature and mode, with the encoder's preset for what is not set.

        Raises:
            ConfigError: K or the temperature is out of range.
        """
        return default_adaptive_settings(
            self.encoder, k=self.k, temperature=self.temperature, mode=mode
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSegmenterConfig(SegmenterConfig):
    """A segmenter with the adapters of one library.

    Attributes:
        library: Store URI; None for no adapters.
        generation: Catalog generation of the library; None for the newest.
        sliding: Segment overlapping windows of every image, as in the published evaluations.
        mode: Nearest adapters (``fused``), all adapters with equal weights (``uniform``), or none
            (``base``).
    """

    library: str | None = None
    generation: int | None = None
    sliding: bool = False
    mode: AdapterMode = "fused"
