"""``adapter_config.json`` as peft writes it: what of it matters, checked as if it were hostile."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from loraseg.errors import IntegrityError

__all__ = ["MAX_CONFIG_BYTES", "MAX_RANK", "PeftLoraConfig", "parse_config", "render_config"]

MAX_CONFIG_BYTES = 2**20
MAX_RANK = 2**16

# Settings under which A and B no longer say what the adapter does, each with the reason.
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
# "orthogonal" leave the base alone.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# peft reads pattern keys as regular expressions. Only plain names are accepted here, so that no
# expression of a stranger is ever run.
_PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_\-]+(\\?\.[A-Za-z0-9_\-]+)*\$?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    values = _read_object(data)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise _invalid_value("peft_type", kind, "'LORA'")
    for key, reason in _UNSUPPORTED.items():
        if values.get(key):
            raise IntegrityError(f"adapter_config.json: {key} is not supported: {reason}")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise IntegrityError(
            f"adapter_config.json: init_lora_weights={init[:40]!r} belongs to a changed base; "
            f"export the adapter as plain LoRA on the untouched base first"
        )
    revision = values.get("revision")
    known = isinstance(revision, str) and _SHA256.fullmatch(revision)
    return PeftLoraConfig(
        rank=_rank("r", values.get("r")),
        alpha=_alpha("lora_alpha", values.get("lora_alpha")),
        rank_pattern={
            k: _rank(f"rank_pattern {k}", v) for k, v in _pattern(values, "rank_pattern")
        },
        alpha_pattern={
            k: _alpha(f"alpha_pattern {k}", v) for k, v in _pattern(values, "alpha_pattern")
        },
        use_dora=_flag(values, "use_dora"),
        use_rslora=_flag(values, "use_rslora"),
        bias=_text(values, "bias") or "none",
        modules_to_save=_names(values, "modules_to_save"),
        base_name=_text(values, "base_model_name_or_path"),
        base_digest=cast(str, revision) if known else None,
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


def _read_object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise IntegrityError(
            f"adapter_config.json: got {len(data)} bytes, expected at most {MAX_CONFIG_BYTES}"
        )
    try:
        values = json.loads(data, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"adapter_config.json: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise IntegrityError("adapter_config.json: expected a JSON object")
    return cast(dict[str, Any], values)


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _invalid_value(key: str, got: object, expected: str) -> IntegrityError:
    return IntegrityError(f"adapter_config.json: {key}: got {str(got)[:80]}, expected {expected}")


def _rank(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise _invalid_value(key, value, f"a whole number in [1, {MAX_RANK}]")
    return value


def _alpha(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise _invalid_value(key, value, "a number of at most 1e9")
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise _invalid_value(key, value, "true or false")
    return value


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not (isinstance(value, str) and len(value) <= 1024):
        raise _invalid_value(key, value, "a text of at most 1024 characters or null")
    return value


def _names(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = values.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _invalid_value(key, names, "a list of names")
    return tuple(cast(list[str], names))


def _pattern(values: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise _invalid_value(key, pattern, "an object of module names")
    for name in pattern:
        if not _PLAIN_NAME.fullmatch(name):
            raise _invalid_value(f"{key} key", name, "a plain module name, not an expression")
    return list(cast(dict[str, Any], pattern).items())


def _most_common(values: Any) -> Any:
    return max(sorted(Counter(values).items()), key=lambda item: item[1])[0]


def _int_if_whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
