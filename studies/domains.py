"""A study's domains: made once, in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mmm4rec.data.demo import write_demo
from mmm4rec.data.domain import open_domain
from mmm4rec.data.encode import encode_domains
from mmm4rec.data.prepare import prepare
from mmm4rec.errors import BadInput
from studies.cells import Source
from studies.spec import Domains, TextEncoder


def make_domains(domains: Domains, folder: Path, *, data: Path | None, seed: int) -> dict[str, Source]:
    """The spec's domains under `folder`; what stands there already is kept.

    Args: data: holds the raw folders that `prepare` names. Raises BadInput where they are missing or wrong.
    """
    if domains.demo:
        if not folder.exists():
            write_demo(folder, seed=seed)
        plan = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        return _sources(folder, [*plan["sources"], *plan["targets"]])
    for name, raw in domains.prepare.items():
        if not (folder / name).exists():
            if data is None:
                raise BadInput(f"the spec prepares '{raw}' from a data folder, and none is given.", remedy="Give it with --data DIR.")
            prepare(data / raw, folder / name, name=name)
    if domains.text_encoder is not None:
        _encode(domains.text_encoder, folder)
    return _sources(folder, domains.prepare)


def _encode(encoder: TextEncoder, folder: Path) -> None:
    encoded = [folder / name for name in encoder.domains]
    if all((path / "features" / "text.json").exists() for path in encoded):
        return
    fit_on = [folder / name for name in encoder.fit_on]
    place = folder / "encoders" / "text"
    encode_domains(encoded, encoder=encoder.kind, fit_on=fit_on, save=place, dimensions=encoder.dimensions, force=True)


def _sources(folder: Path, names: Iterable[str]) -> dict[str, Source]:
    opened = {name: open_domain(folder / name) for name in names}
    return {name: Source(str(domain.path.resolve()), domain.fingerprint, domain.timestamps is not None) for name, domain in opened.items()}
