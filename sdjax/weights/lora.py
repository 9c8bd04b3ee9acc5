"""LoRAs (https://arxiv.org/abs/2106.09685) of every common format, added to a checkpoint's tensors as they are read.

Trainers name a module by its path, dots and all (diffusers, PEFT), with underscores for dots (kohya-ss), in the
diffusers or in the original layout, and its factors in half a dozen ways. Here every name is looked up among the
modules that the checkpoint has, so a key is either understood or refused. What the factors make of a tensor
is in `lora_factors.py`.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax.config import UNetConfig
from sdjax.weights import ldm
from sdjax.weights.addon_file import SETTINGS, AddonFile
from sdjax.weights.checkpoint import Edit
from sdjax.weights.lora_factors import Delta, shape_and_rank
from sdjax.weights.safetensors import CheckpointError

PEFT_STEM = "adapter_model"
NAMES = ("pytorch_lora_weights.safetensors", f"{PEFT_STEM}.safetensors")
CONTEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "the SDXL refiner"}

_FACTOR = re.compile(
    r"[._]lora[._](?:linear_layer\.)?(?P<lora>down|up|mid|A|B)(?:\.\w+)?\.weight$"
    r"|\.(?P<other>hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|diff(?:_b)?|[wb]_norm|dora_scale)$"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*$"
    r"|(?:_lora)?\.(?P<alpha>alpha)$"
)
_ROLES = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
_NO_BIAS = ("to_q", "to_k", "to_v", "cond_proj", "text_projection", "_embedding")  # as these modules end
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_CONTEXT = re.compile(r"attn2[._](?:processor\.)?to_[kv]$")

# A file's patterns may come from anyone, and a regular expression with repeats can take forever.
_PATTERN = re.compile(r"\^?(?:[\w.-]|\\\.)+\$?")
_MAX_NUMBER = 1e30


class _Numbers(NamedTuple):
    """What PEFT's settings give for each module of a component.

    patterns: of modules' names, each with the number of those that it matches.
    common: that of all others, if there is one.
    """

    patterns: list[tuple[re.Pattern[str], float]]
    common: float | None

    def of(self, module: str) -> float | None:
        return next((own for pattern, own in self.patterns if pattern.match(module)), self.common)


class _Scales(NamedTuple):
    """What PEFT's settings say of a component's alphas.

    ranks: of factors that are whole (LoHa, LoKr), which do not show it.
    by_root: whether an alpha is divided by the rank's square root (rsLoRA).
    """

    alphas: _Numbers
    ranks: _Numbers
    by_root: bool

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Alpha by rank, where the file itself has no other `alpha`; 1 where a rank or an alpha is nowhere said."""
        if not rank and alpha is not None:
            return 1  # as LyCORIS, which writes one all the same
        divisor = rank or self.ranks.of(module)
        alpha = self.alphas.of(module) if alpha is None else alpha
        if divisor is None or divisor <= 0 or alpha is None:
            return 1
        return alpha / (math.sqrt(divisor) if self.by_root else divisor)


class Lora:
    r"""One LoRA, matched with a checkpoint's modules. Its tensors are read by `fused`.

    Where PEFT's settings lie in it, or beside an adapter_model, their alphas count as in PEFT. Their `alpha_pattern` is
    of regular expressions; read are those of a name, in which `.` is any character, perhaps with `\.`, `^` and `$`.

    Args:
        source: see `AddonFile`.
        weight: how much of its change counts; any number.
        configs: the checkpoint's, by component.
        what: what errors call the checkpoint.
        allow_pickle: see `AddonFile`.

    Raises:
        CheckpointError: it cannot be read, is for another kind of model, or has keys that nothing here has.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        weight: float,
        configs: Mapping[str, Any],
        *,
        what: str,
        allow_pickle: bool = False,
    ) -> None:
        self.file, self.weight = AddonFile(source, NAMES, allow_pickle=allow_pickle), float(weight)
        if not math.isfinite(self.weight):
            raise CheckpointError(f"the weight {weight} of {source} is no number")
        if any("bundle_emb." in key for key in self.file.entries):
            raise CheckpointError(
                f"{source} holds embeddings too (bundle_emb.*), without which its prompts mean something else; save "
                "them as textual inversions, and the LoRA without them"
            )
        self._refuse_another_width(configs["unet"], what)
        self._factors: dict[tuple[str, str], dict[str, str]] = {}
        names, unmatched = _names(configs), []
        for key in self.file.entries:
            match = _FACTOR.search(key)
            module = _module(key[: match.start()], names) if match else None
            if match is None or module is None:
                unmatched.append(key)
                continue
            found = match["lora"] or match["other"] or match["magnitude"] or match["alpha"]
            role = _ROLES.get(found, found)
            if role == "diff_b" and module[1].endswith(_NO_BIAS):
                unmatched.append(key)
            other = self._factors.setdefault(module, {}).setdefault(role, key)
            if other != key:
                raise CheckpointError(f"{source} has both {other} and {key}; give a file for each adapter")
        if unmatched or not self._factors:
            more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
            has = f"has keys that {what} does not: {', '.join(sorted(unmatched)[:3])}{more}"
            raise CheckpointError(f"{source} {has if unmatched else 'holds no LoRA'}")
        settings = self._read_settings()
        components = {component for component, _ in self._factors}
        self._scales = {component: self._read_scales(settings, component) for component in components}

    def _refuse_another_width(self, unet: UNetConfig, what: str) -> None:
        """An SDXL LoRA on Stable Diffusion 1, in words rather than by the first key that is missing."""
        widths: set[int] = set()
        for key, entry in self.file.entries.items():
            match = _FACTOR.search(key)
            if match and match["lora"] in ("down", "A") and _CONTEXT.search(key[: match.start()]):
                widths |= {*entry.shape[1:2]}
        attended = unet.down_stages[0].context_dim  # to which all stages attend
        if widths and attended not in widths:
            theirs, ours = (
                f"{width} channels" + (f" ({CONTEXT_WIDTHS[width]})" if width in CONTEXT_WIDTHS else "")
                for width in (min(widths), attended)
            )
            raise CheckpointError(
                f"{self.file.source} is for a UNet that attends to {theirs}; that of {what} attends to {ours}"
            )

    def _read_settings(self) -> dict[str, Any]:
        """PEFT's settings, which hold the alphas where the file does not; a component's begin with its name."""
        text = self.file.metadata.get("lora_adapter_metadata")
        if text is None and self.file.stem == PEFT_STEM:  # next to other files they may be another's
            text = self.file.beside(SETTINGS)
        try:
            settings = json.loads(text or "{}")
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise CheckpointError(f"the settings of {self.file.source} are not a JSON object")
        is_dora = settings.get("use_dora") or any(v for key, v in settings.items() if key.endswith(".use_dora"))
        if is_dora and not any(role in _MAGNITUDES for roles in self._factors.values() for role in roles):
            raise CheckpointError(f"{self.file.source} is a DoRA by its settings, and has no lora_magnitude_vector")
        return settings

    def _read_scales(self, settings: Mapping[str, Any], component: str) -> _Scales:
        """What PEFT's settings say of a component."""
        setting = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
        # PEFT calls it `alpha` in its LoHa and LoKr.
        alphas = self._numbers(setting, "alpha", setting.get("lora_alpha", setting.get("alpha")))
        ranks = _Numbers([], None)
        if setting.get("peft_type") in ("LOHA", "LOKR"):
            ranks = self._numbers(setting, "rank", setting.get("r"))
        return _Scales(alphas, ranks, bool(setting.get("use_rslora")))

    def _numbers(self, setting: Mapping[str, Any], name: str, common: Any) -> _Numbers:
        patterns = setting.get(f"{name}_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{name}_pattern of {self.file.source} is no JSON object")
        for pattern in patterns:
            if not _PATTERN.fullmatch(pattern):
                raise CheckpointError(
                    f"{name}_pattern of {self.file.source} has {pattern!r}; read are names, with ., \\., ^ and $ as in "
                    "regular expressions"
                )
        numbers = [*patterns.values()] + ([] if common is None else [common])
        if not all(isinstance(number, int | float) and abs(number) < _MAX_NUMBER for number in numbers):
            raise CheckpointError(
                f"{'an' if name == 'alpha' else 'a'} {name} in the settings of {self.file.source} is no number"
            )
        # As PEFT puts them together, where the first that matches counts.
        compiled = [(re.compile(rf"(.*\.)?({pattern})$"), float(number)) for pattern, number in patterns.items()]
        return _Numbers(compiled, None if common is None else float(common))

    def deltas(self, component: str) -> dict[str, Delta]:
        """What is added to each tensor of a component, by its key."""
        mine = {module: keys for module, keys in self._factors.items() if module[0] == component}
        tensors = self.file.tensors([key for keys in mine.values() for key in keys.values()])
        found = {}
        for module, keys in mine.items():
            factors = {role: tensors[key] for role, key in keys.items()}
            if (bias := factors.pop("diff_b", None)) is not None:
                shape, _ = self._made(module[1], {"diff": keys["diff_b"]})
                found[f"{module[1]}.bias"] = Delta({"diff": bias}, shape, 1, self.weight)
            alpha, per_out = factors.pop("alpha", None), factors.pop("lora_magnitude_vector", None)
            magnitude = factors.pop("dora_scale", None if per_out is None else per_out.reshape(-1, 1))
            if factors or magnitude is not None:
                making = {role: key for role, key in keys.items() if role not in ("diff_b", *_MAGNITUDES)}
                shape, rank = self._made(module[1], making)
                own = None if alpha is None else float(alpha.reshape(-1)[0])
                scale = self._scales[component].scale(module[1], rank, own)
                found[f"{module[1]}.weight"] = Delta(factors, shape, scale, self.weight, magnitude)
        return found

    def _made(self, module: str, keys: Mapping[str, str]) -> tuple[tuple[int, ...], int]:
        """The shape and the rank of what a module's factors make. Raises CheckpointError where they make nothing."""
        shapes = {role: self.file.entries[key].shape for role, key in keys.items()}
        alpha = shapes.pop("alpha", ())
        if math.prod(alpha) != 1:
            raise CheckpointError(f"{self.file.source}: {module}.alpha {list(alpha)} is no number")
        try:
            return shape_and_rank(tuple(shapes.items()))
        except (KeyError, ValueError, IndexError, TypeError, ArithmeticError):
            said = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items()) or "magnitudes alone"
            raise CheckpointError(f"{self.file.source}: {module} cannot be made of {said}") from None


def fused(loras: Sequence[Lora], component: str) -> Edit:
    """What adds all LoRAs to the tensors of a component: W + sum of weight * alpha / rank * up @ down, in float32.

    A DoRA, which scales what those before it have made, counts at a weight by so much of its whole change. The factors
    are held until then, and one product at a time.
    """
    deltas = [(lora.file.source, lora.deltas(component)) for lora in loras]

    def edit(key: str, tensor: np.ndarray) -> np.ndarray:
        added = [(source, found[key]) for source, found in deltas if key in found]
        if not added:
            return tensor
        tensor = tensor.astype(np.float32)
        for source, delta in added:
            try:
                tensor = delta.change(tensor)
            except ValueError as error:
                raise CheckpointError(f"{source}: {key} {error}") from None
        return tensor

    return edit


def _module(name: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The component and the module that a LoRA's name means."""
    name = name.removeprefix("base_model.model.").replace(".processor", "")
    for prefix, component in _KOHYA.items():
        if name.startswith(prefix):
            found = names.get(component, {}).get(name.removeprefix(prefix))
            return (component, found) if found else None
    component, _, path = name.partition(".")
    component = "unet" if component == "diffusion_model" else component
    if component not in names:
        # A file of one network need not say which.
        candidates = [(component, found[name]) for component, found in names.items() if name in found]
        return candidates[0] if candidates else None
    return (component, names[component][path]) if path in names[component] else None


def _names(configs: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For each component, its modules by every name that a LoRA may give them."""
    names = {}
    for component, config in configs.items():
        if component != "unet" and not component.startswith("text_encoder"):
            continue
        if component == "unet":
            table = ldm.unet(config)
            found = {other: here for here, there in table.items() for other in (there, here)}
        else:
            found = {here: here for here in ldm.open_clip(config, projection=True)}
            found |= {here.removeprefix("text_model."): here for here in found}
        for name, here in list(found.items()):
            older = re.sub(r"\.to_out\.0$", ".to_out", name)
            older = re.sub(r"self_attn\.([qkv])_proj$", r"self_attn.to_\1", older)
            found[re.sub(r"self_attn\.out_proj$", "self_attn.to_out", older)] = here
        names[component] = found | {name.replace(".", "_"): here for name, here in found.items()}
    return names
