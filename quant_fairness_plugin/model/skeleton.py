"""An empty model made ready for tensors that are read one at a time.

Finds which tensor of the files is which parameter, and gives buffers their real values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.load import check_keys
from quant_fairness_plugin.model.reading import Place, read_tensor, same_values
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.unread import sort_names


def match_tensors(
    model: PreTrainedModel, family: Family, files: ModelFiles, stored: Mapping[str, Place]
) -> dict[str, Place]:
    """Return parameter or persistent buffer of the text model → where it is; a tied parameter has all its names.

    Names are changed as Transformers changes them while loading. Where a checkpoint holds two different tensors for
    parameters that the config ties, they are untied in the model.

    Args:
        model: on the meta device.
        family: its map.
        files: for errors.
        stored: what the files hold.

    Raises:
        ArtifactError: tensors are missing, unexpected or of another shape.
    """
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if family.owns(name)}
    kinds = sort_names(model, family, stored)
    places = {loaded: stored[name] for name, loaded in kinds.own.items()}
    _join_tied(model, places)
    mismatched = [(name,) for name, place in places.items() if place.shape != tuple(wanted[name].shape)]
    missing = wanted.keys() - places.keys()
    # Where something is missing, what is too much may be it under another name.
    unexpected = {*kinds.strays, *(kinds.unread if missing else ())}
    check_keys(files, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched})
    return places


def place_buffers(
    model: PreTrainedModel, family: Family, files: ModelFiles, places: Mapping[str, Place], device: str
) -> None:
    """Give every buffer of the text model its value: what the files hold, else what the model computes.

    A buffer that no code computes would be left with whatever the memory held. So they are computed twice, starting
    from other values: what is then not the same was left.

    Raises:
        UnsupportedModelError: a buffer that no code computes.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False) if family.owns(name)}
    for name in buffers & places.keys():
        value = read_tensor(places[name])
        _set_buffer(model, name, value.float() if value.is_floating_point() else value)
    computed = sorted(buffers - places.keys())
    first, second = ({name: value.clone() for name, value in _compute(model, computed, fill)} for fill in (0, 1))
    left = [name for name in computed if not torch.equal(first[name], second[name])]
    left += [f"{name} (no buffer)" for name in _loose_tensors(model) if family.owns(name)]
    if left:
        raise UnsupportedModelError(
            f"{files.name}: nothing says what {', '.join(left[:5])} should hold; expected a model whose "
            "_init_weights computes all that is not in the checkpoint. Load the whole model (without a memory budget)."
        )
    for name in buffers:
        _set_buffer(model, name, model.get_buffer(name).to(device))


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter of a name, and of all names that it is tied to."""
    old, new = model.get_parameter(name), nn.Parameter(value, requires_grad=False)
    for module in _owners(model, name, old):
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def _owners(model: nn.Module, name: str, parameter: nn.Parameter) -> list[nn.Module]:
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(model, PreTrainedModel):
        return [owner]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    return [owner, *(end for end in ends if end is not None and end is not owner and end.weight is parameter)]


def _join_tied(model: PreTrainedModel, places: dict[str, Place]) -> None:
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in places and source in places:
            if same_values(places[target], places[source]):
                places[target] = places[source]
            else:
                _untie(model, target)
        elif target in places or source in places:
            places[target] = places[source] = places.get(target) or places[source]


def _untie(model: PreTrainedModel, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module._parameters[leaf] = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)
    model.all_tied_weights_keys.pop(name)


def _compute(model: PreTrainedModel, names: list[str], fill: int) -> Iterator[tuple[str, Tensor]]:
    """Yield these buffers as the model's code computes them in memory that held `fill`."""
    for name in names:
        _set_buffer(model, name, torch.full_like(model.get_buffer(name), fill, device="cpu"))
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    # Transformers' own mark of what a file holds: else it draws numbers for every parameter, slowly and for nothing.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[no-untyped-call]
    return ((name, model.get_buffer(name)) for name in names)


def _loose_tensors(model: nn.Module) -> list[str]:
    """Return tensors that are plain attributes of modules and have no values."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = value
