"""The files that hold weights: `last.ckpt` to continue a run, `best.safetensors` to use or transfer a model.

Neither executes anything when it is opened: `last.ckpt` holds tensors and plain data (weights_only=True).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.domain import replacing, write_atomically
from mmm4rec.errors import BadInput
from mmm4rec.models.recommender import Recommender
from mmm4rec.training.loop import EpochReport, Run, RunState, Sums

SCHEMA_VERSION = 2  # of best.safetensors; 1: before the release's quirks stood in one place
PACKED_NUMBERS = 2**16  # tensors up to this size are packed
LAST_SCHEMA_VERSION = 3  # of last.ckpt; 2: before a run could be left in the middle of an epoch


class BrokenCheckpoint(BadInput):
    """A file that holds no checkpoint, or half of one."""


def identity(description: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on: config, domains, features and initial weights, wherever they lie on disk.

    What is only looked at on the way, `zero_shot`, may change.
    """
    config = {**description["config"], "init": None, "data": {**description["config"]["data"], "domains": None, "zero_shot": None}}
    return {"config": config, **{key: description[key] for key in ("fingerprints", "features", "init")}}


def check_identity(saved: dict[str, Any], now: dict[str, Any], *, file: Path) -> None:
    """Raise BadInput, with the differences, unless both descriptions are of one run."""
    differences = _differences(identity(saved), identity(now))
    if differences:
        rule = f"belongs to another run ({', '.join(differences)})."
        raise BadInput(rule, file=file, remedy="Resume with what it began with, or start anew in another folder.")


class RunCheckpoints(Protocol):
    """Where a run is kept so that it can go on. Used as a context manager: at its end all is written."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...

    def exists(self) -> bool:
        """Whether there is something to go on from."""

    def load(self, run: Run, description: dict[str, Any]) -> bool:
        """Put the run where it was left; False where there is nothing. Raises BadInput as `load_last`."""

    def save(self, run: Run, description: dict[str, Any], *, epoch_over: bool) -> None:
        """Keep the run as it stands, if it is time. Asked after every report."""


class LastCheckpoint(nullcontext[None]):
    """One file, replaced after every epoch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def exists(self) -> bool:
        return self._path.exists()

    def load(self, run: Run, description: dict[str, Any]) -> bool:
        if self.exists():
            load_last(self._path, run, description)
            return True
        return False

    def save(self, run: Run, description: dict[str, Any], *, epoch_over: bool) -> None:
        if epoch_over:
            save_last(self._path, run, description)


def save_last(path: Path, run: Run, description: dict[str, Any]) -> None:
    """Write all that the run needs to continue, in one atomic move. `description` says which run it is."""
    write_content(path, content_of(run, description))


def content_of(run: Run, description: dict[str, Any]) -> dict[str, Any]:
    """All that the run needs to continue. Its tensors are the run's own, and change with its next step."""
    state = run.state
    return {
        "schema_version": LAST_SCHEMA_VERSION,
        "description": json.dumps(description),
        "model": _packed(run.model.state_dict()),
        "optimizer": {} if run.optimizer is None else _packed_state(run.optimizer),
        "best_weights": _packed(state.best_weights),
        "optimizer_steps": state.optimizer_steps,
        "epoch_steps": state.epoch_steps,
        "epoch_seconds": state.epoch_seconds,
        "epoch_sums": None if state.epoch_sums is None else to_dict(state.epoch_sums),
        "first_loss": state.first_loss,
        "best_score": state.best_score,
        "best_epoch": state.best_epoch,
        "history": [to_dict(report) for report in state.history],
    }


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors by name with the small ones in one piece a dtype and device: a file of hundreds of small tensors takes ten times as long."""
    large = {name: tensor for name, tensor in tensors.items() if tensor.numel() > PACKED_NUMBERS}
    small: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in large:
            small.setdefault(f"{tensor.dtype} {tensor.device}", {})[name] = tensor.detach()  # NAdam's counts stay on the CPU
    pieces = [
        {
            "shapes": {name: list(tensor.shape) for name, tensor in own.items()},
            "values": torch.cat([part.flatten() for part in own.values()]),
        }
        for own in small.values()
    ]
    return {"large": large, "pieces": pieces}


def _unpacked(packed: dict[str, Any]) -> dict[str, Tensor]:
    """What `_packed` was given, in another order."""
    tensors = dict(packed["large"])
    for piece in packed["pieces"]:
        parts = piece["values"].split([math.prod(shape) for shape in piece["shapes"].values()])
        tensors |= {name: part.view(shape).clone() for (name, shape), part in zip(piece["shapes"].items(), parts, strict=True)}
    return tensors


def _packed_state(optimizer: Optimizer) -> dict[str, Any]:
    told = optimizer.state_dict()
    state = {f"{number} {name}": tensor for number, own in told["state"].items() for name, tensor in own.items()}
    return {"groups": told["param_groups"], "state": _packed(state)}


def _unpacked_state(packed: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _unpacked(packed["state"]).items():
        number, _, name = key.partition(" ")
        state.setdefault(int(number), {})[name] = tensor
    return {"param_groups": packed["groups"], "state": state}


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write what `content_of` gave, in one atomic move."""
    with replacing(path) as file:
        torch.save(content, file)


def load_last(path: Path, run: Run, description: dict[str, Any]) -> None:
    """Put the run where `save_last` left it. Raises BrokenCheckpoint, and BadInput when the file is of another run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(content["description"])
    except OSError:  # the disk's word, not the file's
        raise
    except Exception as error:  # torch.load raises many kinds; all mean that this is no checkpoint of ours
        rule = f"is no checkpoint of a run ({error})."
        raise BrokenCheckpoint(rule, file=path, remedy="Start the run anew in another folder.") from error
    if content["schema_version"] != LAST_SCHEMA_VERSION:
        rule = f"has schema_version {content['schema_version']}; this version reads {LAST_SCHEMA_VERSION}."
        raise BadInput(rule, file=path, remedy="Start anew.")
    check_identity(saved, description, file=path)
    run.model.load_state_dict(_unpacked(content["model"]))
    if run.optimizer is not None:
        run.optimizer.load_state_dict(_unpacked_state(content["optimizer"]))
        for state in run.optimizer.state.values():  # torch puts this count beside the parameter; a GPU would be waited for
            if "mu_product" in state:
                state["mu_product"] = state["mu_product"].to(state["step"].device)
    history = [from_dict(EpochReport, report, source=str(path)) for report in content["history"]]
    sums = None if content["epoch_sums"] is None else from_dict(Sums, content["epoch_sums"], source=str(path))
    plain = ("optimizer_steps", "epoch_steps", "epoch_seconds", "first_loss", "best_score", "best_epoch")
    best_weights = _unpacked(content["best_weights"])
    run.state = RunState(**{name: content[name] for name in plain}, epoch_sums=sums, history=history, best_weights=best_weights)


def save_model(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Write weights with their description in one file; returns the hash of its content."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **metadata})
    # one entry: the library writes several in no stated order, and the file's hash names the weights
    content = save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata={"mmm4rec": text})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()[:16]


def hash_file(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def load_description(path: str | Path) -> dict[str, Any]:
    """The description in a `best.safetensors`; the weights are not read. Raises BadInput as `load_model`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["mmm4rec"])
        version = metadata["schema_version"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"is no model of ours ({error}).", file=path, remedy="Give the best.safetensors of a run.") from error
    if version != SCHEMA_VERSION:
        raise BadInput(f"has schema_version {version}; this version reads {SCHEMA_VERSION}.", file=path, remedy="Train it anew.")
    return metadata


def load_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description of a `best.safetensors`. Raises BadInput when it is missing or not one of ours."""
    metadata = load_description(path)
    try:
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise BadInput(f"is damaged ({error}).", file=path, remedy="Give the best.safetensors of a run.") from error


@dataclass(frozen=True)
class Transfer:
    """What became of each tensor when weights were carried into a model."""

    loaded: list[str] = field(default_factory=list)
    partly_loaded: list[str] = field(default_factory=list)  # the matching block of a Fourier filter of another size
    reset: list[str] = field(default_factory=list)  # in both, but belongs to the old domain's items
    skipped: list[str] = field(default_factory=list)  # in the checkpoint, not in the model
    new: list[str] = field(default_factory=list)  # in the model, not in the checkpoint

    def __str__(self) -> str:
        parts = (f"{len(names)} {kind.replace('_', ' ')}" for kind, names in vars(self).items())
        layers = f"; the model is shallower: layer {', '.join(map(str, self.dropped_layers))} is dropped" if self.dropped_layers else ""
        dropped = f"; skipped: {', '.join(self.skipped)}" if self.skipped else ""
        return f"transfer: {', '.join(parts)}{layers}{dropped}"

    @property
    def dropped_layers(self) -> list[int]:
        """Layers of the checkpoint, counted from 1, of which the model took nothing."""
        numbers = [{int(name.split(".")[1]) for name in names if name.startswith("layers.")} for names in (self.skipped, self.loaded)]
        return sorted(number + 1 for number in numbers[0] - numbers[1])


@torch.no_grad()
def transfer(model: Recommender, weights: dict[str, Tensor], *, source: str | Path) -> Transfer:
    """Carry weights into a model of a new domain: all but what belongs to single items (ids, fusion per item).

    A Fourier filter of another size takes the block of the frequencies that both have.
    Raises BadInput when any other tensor has another shape.
    """
    result = Transfer()
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        given = weights.get(name)
        if "ids" in name.split(".") or (name == "fusion" and 2 in {parameter.dim(), parameter.dim() if given is None else given.dim()}):
            (result.new if given is None else result.reset).append(name)
        elif given is None:
            result.new.append(name)
        elif given.shape == parameter.shape:
            parameter.copy_(given)
            result.loaded.append(name)
        elif ".filter." in name:
            block = tuple(slice(min(a, b)) for a, b in zip(given.shape, parameter.shape, strict=True))
            parameter[block] = given[block].to(parameter)
            result.partly_loaded.append(name)
        else:
            rule = f"'{name}' is {list(given.shape)} there and {list(parameter.shape)} here."
            raise BadInput(rule, file=source, remedy="Use the model sizes and the feature encoder that it was trained with.")
    result.skipped.extend(sorted(set(weights) - set(own)))
    return result


def _differences(a: Any, b: Any, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [found for key in keys for found in _differences(a.get(key), b.get(key), f"{place}.{key}".lstrip("."))]
    return [] if a == b else [f"{place}: {a!r} -> {b!r}"]
