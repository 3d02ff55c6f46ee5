"""LoRA files of every naming, merged into the causal transformer or attached beside its weights with a live scale.

    lora = read_lora("style.safetensors")
    merge_lora(transformer, lora, 0.8)          # into the weights; with -0.8 it comes out again
    attach_lora(transformer, lora, "style")     # or beside them, through PEFT,
    set_lora_scale(transformer, "style", 0.8)   # with a scale to turn while the model runs
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from streamgen.errors import InputError, UnavailableError
from streamgen.models.lora_files import Lora, Pair, Report, module_of, own_parameters, read_lora
from streamgen.models.reading import some

logger = logging.getLogger(__name__)

__all__ = ["Lora", "Pair", "Report", "attach_lora", "merge_lora", "read_lora", "set_lora_scale"]


# --- merged


@torch.no_grad()
def merge_lora(transformer: nn.Module, lora: Lora, scale: float = 1.0) -> Report:
    """Add scale · the changes to the weights in float32, each rounded to its dtype once; -scale takes them out again.

    Raises: InputError, before anything is changed, for a LoRA of another model.
    """
    _check_scale(scale)
    report = _check(transformer, lora)
    parameters = own_parameters(transformer)
    if any(parameters[name].is_meta for name in report.matched):
        raise InputError("weights of the transformer are offloaded; merge before enabling that")
    for name in report.matched:
        parameter = parameters[name]
        delta = lora.delta(name, parameter)
        parameter.copy_(delta.mul_(scale).add_(parameter.to(delta.dtype)))
    return report


# --- live


def attach_lora(transformer: nn.Module, lora: Lora, name: str, scale: float = 1.0) -> Report:
    """Run a LoRA beside the weights as PEFT's adapter `name`; others stay as they are and active.

    `set_lora_scale` turns it, `transformer.delete_adapters(name)` removes it, and diffusers' calls know it. Text keys
    that a session computed before hold the scale of that time: they follow when the prompt is set again.
    Raises: InputError for a LoRA of another model, a name that is taken, or changes of full rank; UnavailableError
        without PEFT.
    """
    _check_scale(scale)
    report = _check(transformer, lora)
    if not re.fullmatch(r"[^.]+", name) or name in _adapters(transformer):
        raise InputError(f"the adapter name {name!r} is taken or not a plain word; choose another")
    targets = {module_of(parameter): parameter for parameter in report.matched if parameter in lora.pairs}
    _check_live(transformer, lora, report, targets)
    try:
        from peft import inject_adapter_in_model
    except ImportError as failure:
        raise UnavailableError("a LoRA with a live scale needs PEFT: pip install peft, or merge it") from failure

    trainable = {parameter: parameter.requires_grad for parameter in transformer.parameters()}
    active = {id(layer): list(layer.active_adapters) for layer in _lora_layers(transformer)}
    pairs = {module: _one_pair(lora.pairs[parameter]) for module, parameter in targets.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        inject_adapter_in_model(_peft_config(pairs), transformer, name, low_cpu_mem_usage=True)
    transformer._hf_peft_config_loaded = True
    for module, pair in pairs.items():
        _fill(transformer.get_submodule(module), name, pair, transformer.training)
    for layer in _lora_layers(transformer):
        layer.set_adapter([*active.get(id(layer), []), name])
    for parameter in transformer.parameters():  # PEFT froze what was there and thawed what is new
        parameter.requires_grad_(trainable.get(parameter, False))
    set_lora_scale(transformer, name, scale)
    return report


def set_lora_scale(transformer: nn.Module, name: str, scale: float) -> None:
    """Turn one attached LoRA: 0 = off, 1 = as it was trained. From the next forward on, at no cost."""
    _check_scale(scale)
    layers = [layer for layer in _lora_layers(transformer) if name in layer.scaling]
    if not layers:
        raise InputError(f"no LoRA {name!r} is attached; there is {some(_adapters(transformer)) or 'none'}")
    for layer in layers:
        layer.set_scale(name, scale)


def _check_live(transformer: nn.Module, lora: Lora, report: Report, targets: Mapping[str, str]) -> None:
    changed = (name for name in report.matched if name in lora.deltas)
    full = [name for name in changed if lora.deltas[name].float().any()]  # some trainers save norms that never moved
    if full:
        raise InputError(f"{lora.name} changes {some(full)} in full, which has no live scale; merge it instead")
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    odd = [module for module in targets if module not in linear and f"{module}.base_layer" not in linear]
    if odd:
        raise InputError(f"{lora.name} changes {some(odd)}, which has no live scale; merge it instead")
    if not targets:
        raise InputError(f"{lora.name} holds zeros alone")


def _one_pair(pairs: tuple[Pair, ...]) -> Pair:
    """Several side by side are one of the summed rank."""
    if len(pairs) == 1:
        return pairs[0]
    up = torch.cat([pair.scale * pair.up.float() for pair in pairs], dim=1)
    return Pair(torch.cat([pair.down.float() for pair in pairs]), up, 1.0)


def _peft_config(pairs: Mapping[str, Pair]):
    """LoraConfig: PEFT reads names as patterns that a module's name must end with, hence the escapes."""
    from peft import LoraConfig

    ranks = {f"^{re.escape(module)}": len(pair.down) for module, pair in pairs.items()}
    alphas = {f"^{re.escape(module)}": pair.scale * len(pair.down) for module, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={module: value for module, value in ranks.items() if value != rank},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        target_modules="|".join(re.escape(module) for module in pairs),  # a text is one pattern for the whole name
    )


def _fill(layer: nn.Module, name: str, pair: Pair, training: bool) -> None:
    weight = layer.weight
    dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16  # weights may lie in fp8
    for factors, values in ((layer.lora_A, pair.down), (layer.lora_B, pair.up)):
        factors[name].weight = nn.Parameter(values.to(weight.device, dtype, copy=True), requires_grad=False)
    layer.train(training)


# --- checks and names


def _check(transformer: nn.Module, lora: Lora) -> Report:
    """Say what fits; refuse a LoRA of another model."""
    report = lora.report(transformer)
    if report.wrong_shape:
        raise InputError(
            f"{report}: it is for another model, {len(report.wrong_shape)} shapes differ: {some(report.wrong_shape)}"
        )
    if not report.matched:
        raise InputError(f"{report}: it is for another model, the model has nothing of {some(report.unmatched)}")
    logger.info("%s", report)
    if report.unmatched:
        logger.warning("%s: %d keys are not used: %s", lora.name, len(report.unmatched), some(report.unmatched))
    return report


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise InputError(f"a LoRA's scale {scale} is not a finite number")


def _lora_layers(transformer: nn.Module) -> list[nn.Module]:
    return [module for module in transformer.modules() if isinstance(getattr(module, "scaling", None), dict)]


def _adapters(transformer: nn.Module) -> list[str]:
    return sorted({name for layer in _lora_layers(transformer) for name in layer.scaling})
