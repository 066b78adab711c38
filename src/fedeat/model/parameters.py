"""The parameters that are trained: their names in a saved adapter, their dtype."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedeat.errors import ModelError


def trainable(network: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names that PEFT gives them in a saved adapter, made float32.

    Raises:
        ModelError: PEFT would save other tensors than it trains.
    """
    if not isinstance(network, PeftModel):
        return {}
    parameters = {
        f"{name}.".replace(".modules_to_save.default.", ".").replace(".default.", ".")[:-1]: parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    saved = get_peft_model_state_dict(network, save_embedding_layers=False)
    if parameters.keys() != saved.keys():
        odd = sorted(parameters.keys() ^ saved.keys())
        raise ModelError(f"PEFT saves other tensors than it trains for this model, first {odd[0]!r}.")
    for parameter in parameters.values():
        parameter.data = parameter.data.float()  # a head copied from a bfloat16 base would lose small updates
    for module in network.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.register_forward_pre_hook(_in_float32)
    return dict(sorted(parameters.items()))


def _in_float32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].float() if args[0].is_floating_point() else args[0], *args[1:])
