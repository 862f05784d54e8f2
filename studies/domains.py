"""A study's domains: made once, in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mmm4rec.data.demo import DemoConfig, write_demo
from mmm4rec.data.domain import Domain, open_domain
from mmm4rec.data.encode import encode_domains
from mmm4rec.data.features import MODALITIES, open_features
from mmm4rec.data.prepare import prepare
from mmm4rec.errors import BadInput
from studies.cells import Source
from studies.spec import Domains, TextEncoder


def make_domains(domains: Domains, folder: Path, *, data: Path | None, seed: int) -> dict[str, Source]:
    """The spec's domains under `folder`; what stands there already is kept.

    Args: data: holds the folders that `prepare` names: raw ones, which are prepared under `folder`, and domains that are
    prepared already, which are read where they are, with their features, and never written to.
    Raises BadInput where they are missing or wrong, or the spec's encoder would write into one of the latter.
    """
    places: dict[str, Path] = {}
    if (shops := domains.shops()) is not None:
        if not folder.exists():
            write_demo(folder, seed=seed, config=shops)
        if not (folder / "demo.json").is_file():
            raise BadInput("holds no generated shops.", file=folder, remedy="Give the study another name, or move the folder away.")
        plan = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        places = {name: folder / name for name in (*plan["sources"], *plan["targets"])}
        if isinstance(domains.demo, DemoConfig):
            _check_shops(domains.demo, places)
    places |= {name: _prepared(name, raw, folder, data) for name, raw in domains.prepare.items()}
    if domains.text_encoder is not None:
        _encode(domains.text_encoder, places, folder)
    return _sources(places)


def _check_shops(shops: DemoConfig, places: Mapping[str, Path]) -> None:
    """Raise BadInput where the folder holds other shops than the spec's."""
    wanted = {name: shops.size(name) for name in (*shops.sources, *shops.targets)}
    there = {name: (domain.n_users, domain.n_items) for name, place in places.items() for domain in [open_domain(place)]}
    if other := [name for name in {**wanted, **there} if tuple(wanted.get(name, ())) != there.get(name, ())]:
        rule = (
            f"has another shop '{other[0]}' than the spec: {there.get(other[0], 'none')} there, {wanted.get(other[0], 'none')} in the spec."
        )
        raise BadInput(rule, file=next(iter(places.values())).parent, remedy="Give the study another name, or move the folder away.")


def _prepared(name: str, raw: str, folder: Path, data: Path | None) -> Path:
    """Where the domain is, prepared now unless it was before."""
    if (folder / name).exists():
        return folder / name
    if data is None:
        raise BadInput(f"the spec prepares '{raw}' from a data folder, and none is given.", remedy="Give it with --data DIR.")
    if (data / raw / "domain.json").is_file():
        return data / raw
    prepare(data / raw, folder / name, name=name)
    return folder / name


def _encode(encoder: TextEncoder, places: Mapping[str, Path], folder: Path) -> None:
    foreign = [name for name in encoder.domains if name in places and places[name] != folder / name]
    if foreign:
        rule = f"domain '{foreign[0]}' was prepared elsewhere, and text_encoder would write into it."
        raise BadInput(rule, file=places[foreign[0]], remedy="Take it out of text_encoder.domains, or give its raw folder.")
    encoded = [folder / name for name in encoder.domains]
    if all((path / "features" / "text.json").exists() for path in encoded):
        return
    fit_on = [places.get(name, folder / name) for name in encoder.fit_on]
    place = folder / "encoders" / "text"
    encode_domains(encoded, encoder=encoder.kind, fit_on=fit_on, save=place, dimensions=encoder.dimensions, force=True)


def _sources(places: Mapping[str, Path]) -> dict[str, Source]:
    return {name: source_of(open_domain(place)) for name, place in places.items()}


def source_of(domain: Domain) -> Source:
    tables = {modality: open_features(domain, modality) for modality in MODALITIES}
    digests: dict[str, str] = {modality: table.digest for modality, table in tables.items() if table is not None}
    encoders: dict[str, str] = {modality: table.encoder for modality, table in tables.items() if table is not None}
    return Source(str(domain.path.resolve()), domain.fingerprint, domain.timestamps is not None, digests, encoders)
