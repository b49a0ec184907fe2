"""``adapter_config.json`` as peft writes it: the keys that matter, checked as untrusted input."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from loraseg.errors import IntegrityError
from loraseg.storage.json_io import parse_json_as, parse_json_object

__all__ = ["MAX_CONFIG_BYTES", "MAX_RANK", "PeftLoraConfig", "parse_config", "render_config"]

MAX_CONFIG_BYTES = 2**20
MAX_RANK = 2**16

# Settings under which A and B alone do not define the adapter, each with the reason.
_UNSUPPORTED = {
    "layer_replication": "it changes the depth of the base model",
    "lora_bias": "it adds biases to the low-rank product",
    "target_parameters": "it adapts bare parameters, not linear layers",
    "trainable_token_indices": "it trains token embeddings beside the low-rank pairs",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "it pools the input before the low-rank product",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it rescales the base weights",
    "velora_config": "it projects the activations",
    "monteclora_config": "it samples its factors",
}
# Initialisers that move part of the base weight into the adapter; False, True, "gaussian" and
# "orthogonal" leave the base unchanged.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FILE = "adapter_config.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")

_PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_\-]+(\\?\.[A-Za-z0-9_\-]+)*\$?")


def _check_module_name(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"got {name[:80]!r}, expected a plain module name, not an expression")
    return name


_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(ge=-1e9, le=1e9)]
_Text = Annotated[str, Field(max_length=1024)]
# peft reads the keys of patterns as regular expressions. Only plain module names are accepted, so
# that no expression from an untrusted file is ever run.
_ModuleName = Annotated[str, AfterValidator(_check_module_name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _ConfigFile:
    """The keys of ``adapter_config.json`` that matter; others are ignored."""

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[_ModuleName, _Rank] | None = None
    alpha_pattern: dict[_ModuleName, _Alpha] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    bias: _Text | None = None
    modules_to_save: tuple[str, ...] | None = None
    base_model_name_or_path: _Text | None = None
    revision: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftLoraConfig:
    """The part of peft's LoraConfig that gives A and B their meaning.

    ``base_digest`` travels in peft's ``revision`` field, the place for "which version of the base".
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_dora: bool = False
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    base_name: str | None = None
    base_digest: str | None = None

    def rank_of(self, module: str) -> int:
        """Return the rank that the config claims for a module."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return alpha / r of a module, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(data: bytes) -> PeftLoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        IntegrityError: Too large, not a JSON object, not LoRA, a value is missing, mistyped or out
            of range, or a setting changes what the low-rank pairs mean.
    """
    _check_settings(
        parse_json_object(data, _FILE, max_bytes=MAX_CONFIG_BYTES, error=IntegrityError)
    )
    file = parse_json_as(_ConfigFile, data, _FILE, max_bytes=MAX_CONFIG_BYTES, error=IntegrityError)
    revision = file.revision
    is_digest = isinstance(revision, str) and _SHA256.fullmatch(revision)
    return PeftLoraConfig(
        rank=file.r,
        alpha=file.lora_alpha,
        rank_pattern=file.rank_pattern or {},
        alpha_pattern=file.alpha_pattern or {},
        use_dora=file.use_dora,
        use_rslora=file.use_rslora,
        bias=file.bias or "none",
        modules_to_save=file.modules_to_save or (),
        base_name=file.base_model_name_or_path,
        base_digest=revision if is_digest else None,
    )


def _check_settings(values: Mapping[str, Any]) -> None:
    """Refuse settings under which A and B alone do not define the adapter."""
    for key, reason in _UNSUPPORTED.items():
        if values.get(key):
            raise IntegrityError(f"{_FILE}: {key} is not supported: {reason}")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise IntegrityError(
            f"{_FILE}: init_lora_weights={init[:40]!r} belongs to a changed base; export the "
            "adapter as plain LoRA on the untouched base first"
        )


def render_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    use_rslora: bool = False,
    base_name: str | None = None,
    base_digest: str | None = None,
) -> bytes:
    """Write ``adapter_config.json`` for these modules; equal arguments give equal bytes.

    The commonest rank and alpha become the defaults, the rest goes into the patterns. peft fills
    in every field that is left out, so the file does not depend on peft's version.
    """
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base_name,
        "revision": base_digest,
        "r": rank,
        "lora_alpha": _int_if_whole(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": use_rslora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
        "rank_pattern": {m: r for m, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {m: _int_if_whole(a) for m, a in sorted(alphas.items()) if a != alpha},
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Look a module up as peft does: the first key equal to it or to its last dotted parts."""
    for key, value in pattern.items():
        anchored = key.startswith("^")
        name = key.strip("^$").replace("\\.", ".")
        if module == name or (not anchored and module.endswith(f".{name}")):
            return value
    return default


def _most_common(values: Any) -> Any:
    return max(sorted(Counter(values).items()), key=lambda item: item[1])[0]


def _int_if_whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
