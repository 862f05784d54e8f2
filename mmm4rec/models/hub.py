"""A model as a folder that explains itself, from and to the Hugging Face hub: model.safetensors, config.json, README.md.

The mixin is huggingface_hub's (`pip install 'mmm4rec[hub]'`). model.safetensors is a best.safetensors by another name: a run
may begin from it (`init`), and `mmm4rec recommend` reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from mmm4rec.errors import BadInput

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
IN_WEIGHTS = "mmm4rec"  # the key of the description in the weights' file

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ImportError:  # the extra is not installed

    class ModelHubMixin:  # type: ignore[no-redef]
        """Stands where huggingface_hub's mixin would, and says so."""

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise BadInput("folders of models and the hub need huggingface_hub.", remedy="Install it: pip install 'mmm4rec[hub]'")

        save_pretrained = push_to_hub = from_pretrained


class HubModel(nn.Module, ModelHubMixin):
    """What a model needs to be such a folder. Subclasses say how they are built from a description."""

    description: dict[str, Any]  # as best.safetensors has it; and `result`, what training came to, for the card

    @classmethod
    def described(cls, description: dict[str, Any], *, source: str) -> HubModel:
        """The model without its weights."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        told = {key: value for key, value in self.description.items() if key != "result"}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS, metadata={IN_WEIGHTS: json.dumps(told)})
        (save_directory / CONFIG).write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")
        (save_directory / CARD).write_text(card(self.description), encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **told: Any) -> HubModel:
        asked = {key: told[key] for key in ("revision", "cache_dir", "force_download", "token", "local_files_only")}

        def file(name: str) -> Path:
            here = Path(model_id) / name
            return here if Path(model_id).is_dir() else Path(hf_hub_download(model_id, name, **asked))

        for name in (CONFIG, WEIGHTS):
            if not file(name).is_file():
                raise BadInput(
                    f"is no folder of a model: it has no {name}.", file=model_id, remedy="Give the folder that pre-training left."
                )
        description = json.loads(file(CONFIG).read_text(encoding="utf-8"))
        model = cls.described(description, source=model_id)
        model.load_state_dict(load_file(file(WEIGHTS)))
        model.description = description
        return model.eval()


def card(description: dict[str, Any]) -> str:
    """The model card: what it was trained on, what came out, how to use it. Markdown with the hub's front matter."""
    data, training, result = description["config"]["data"], description["config"]["training"], description.get("result", {})
    domains = "\n".join(f"| {name} | {print_} |" for name, print_ in description["fingerprints"].items())
    encoders = ", ".join(f"{modality}: {name}" for modality, name in description["encoders"].items()) or "none"
    everything = "every example, validation and test targets too" if data["examples"] == "all" else "the training examples"
    reached = [f"| validation {name} | {value:.4f} |" for name, value in result.get("valid", {}).items()]
    reached += [f"| zero-shot {training['valid_metric']}, {name} | {value:.4f} |" for name, value in result.get("zero_shot", {}).items()]
    facts = [
        (name.replace("_", " "), result[name])
        for name in ("optimizer_steps", "best_epoch", "seed", "device", "code_version")
        if name in result
    ]
    return "\n".join(
        [
            "---",
            "library_name: mmm4rec",
            "pipeline_tag: other",
            "tags: [recommendation, sequential-recommendation, multi-modal, mamba2]",
            "---",
            "",
            "# MMM4Rec",
            "",
            "A multi-modal sequential recommender (arXiv 2506.02916): it ranks the items of a shop by a user's history and the",
            "items' text and image vectors. " + _ids(description),
            "",
            "```python",
            "from mmm4rec.models.mmm4rec import MMM4Rec",
            'model = MMM4Rec.from_pretrained("PATH_OR_HUB_ID")',
            "```",
            "",
            "Fine-tune it on a domain: `mmm4rec train --domain DIR --out DIR --init model.safetensors`. Items' vectors must come from",
            f"the encoders that it was trained with ({encoders}); `mmm4rec encode` makes them.",
            "",
            "## Trained on",
            "",
            f"{everything[0].upper()}{everything[1:]}, with the loss `{training['loss']}`.",
            "",
            "| domain | fingerprint |",
            "| --- | --- |",
            domains,
            "",
            *(["## Reached", "", "| what | value |", "| --- | --- |", *reached, ""] if reached else []),
            *(["## Run", "", *(f"- {name}: {value}" for name, value in facts), ""] if facts else []),
        ]
    )


def _ids(description: dict[str, Any]) -> str:
    if description["n_items"] is None:
        return "It has no item ids: any domain with features of its encoders can be ranked, zero-shot."
    return f"It has learned vectors of {description['n_items']:,} single items, and ranks their domain alone."
