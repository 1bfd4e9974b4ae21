"""What must hold of a record that another laboratory contributes. No torch."""

from __future__ import annotations

import getpass
import hashlib
import io
import json
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from analysis.reference import problem_with
from analysis.schema import KINDS, record_schema, spec_of
from experiments.engine.records.manifest import record_manifest
from experiments.engine.records.score_names import SCORES as SCORE_NAMES
from experiments.engine.records.store import SCORES, Record, Store, timestamp
from experiments.engine.records.tree import PACKAGES, REPOSITORY
from experiments.engine.specs.spec import spec_id

DAY = 86400
# What names a person or a machine: paths, addresses and hosts.
PRIVATE = {
    "a path": re.compile(r"(?<![\w.:/-])(?:/|~/|[A-Za-z]:\\)[\w.~-]+(?:[/\\][\w.~ -]+)+"),
    "an address": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "a host": re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b|\b[\w-]+\.(?:local|lan|internal)\b"),
}
PRIVATE_FIELDS = {"host", "hostname", "node", "user", "username", "home", "cwd"}
SHARES = {"precision", "recall", "coverage", "agreement"}
RATES = {"images_per_s", "latents_per_s"}


def problems_with(content: dict[str, Any], store: Store) -> list[str]:
    """Return everything that keeps a record out, each in one line; none if it may enter.

    Args:
        content: of the record's file.
        store: the committed records, with which it is compared.
    """
    kind = content.get("kind")
    if kind not in KINDS:
        return [f"kind: {kind!r} is none of {', '.join(sorted(KINDS))}"]
    schema = record_schema(kind)
    problems = list(violations(content, schema, schema))
    if problems:
        return problems

    record = Record(**{name: value for name, value in content.items() if name != "format"})
    checks = (_spec, _tree, _values, _protocol, _data, _privacy)
    return [problem for check in checks for problem in check(record, store)]


def violations(value: Any, schema: dict[str, Any], whole: dict[str, Any], at: str = "") -> Iterator:
    """Yield where a value breaks a schema of this suite, in the keywords that its schemas use."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    place = at or "the record"

    # A choice among types is broken if none of them fits.
    if "anyOf" in schema:
        options = schema["anyOf"]
        if all(any(True for _ in violations(value, option, whole, at)) for option in options):
            # What is an object is most likely meant as the option that is one.
            likely = [option for option in options if "$ref" in option]
            if len(likely) == 1 and isinstance(value, dict):
                yield from violations(value, likely[0], whole, at)
            else:
                yield f"{place}: {_short(value)} is of none of the types that fit"
        return

    # A single type has an exact value, a list of values, a kind or a pattern.
    if "const" in schema and value != schema["const"]:
        yield f"{place}: {_short(value)}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place}: {_short(value)}, expected one of {schema['enum']}"
    if "type" in schema and not _is(value, schema["type"]):
        yield f"{place}: {_short(value)} is no {schema['type']}"
        return
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{place}: {_short(value)} does not match {schema['pattern']}"
    yield from _parts(value, schema, whole, at)


def _parts(value: Any, schema: dict[str, Any], whole: dict[str, Any], at: str) -> Iterator[str]:
    """Yield where the fields of an object or the items of an array break a schema."""
    # An object must have its required fields, and no unknown ones if the schema says so.
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name in schema.get("required", []):
            if name not in value:
                yield f"{at}.{name}".lstrip(".") + ": missing"
        for name, part in value.items():
            where = f"{at}.{name}".lstrip(".")
            if name not in known and others is False:
                yield f"{where}: unknown field"
            else:
                yield from violations(part, known.get(name, others), whole, where)

    # An array has a number of items, of which the first may have schemas of their own.
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        if len(value) < schema.get("minItems", 0) or len(value) > schema.get(
            "maxItems", len(value)
        ):
            yield f"{at}: {len(value)} items, expected {schema['minItems']}"
        for k, item in enumerate(value):
            inner = first[k] if k < len(first) else schema.get("items", {})
            yield from violations(item, inner, whole, f"{at}[{k}]")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "number":
        return isinstance(value, int | float)
    types = {"string": str, "integer": int, "object": dict, "array": list, "null": type(None)}
    return isinstance(value, types.get(name, ()))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- Identity


def _spec(record: Record, store: Store) -> Iterator[str]:
    """Yield a problem unless the id is the hash of the spec."""
    cls = KINDS[record.kind]
    if cls is None:
        return
    name = spec_id(spec_of(record.spec, cls))
    if name != record.id:
        yield f"id: the spec's is {name}; the record was edited, or is of another version"


def _tree(record: Record, store: Store) -> Iterator[str]:
    """Yield what keeps the code of a record from being known."""
    commit, code = record.provenance.get("commit"), record.provenance.get("code")
    if record.provenance.get("dirty") is not False:
        yield "provenance.dirty: the tree had uncommitted changes; run on a clean tree"
    if not commit:
        yield "provenance.commit: missing; run in a clone, or set DICO_COMMIT"
        return
    digest = tree_digest_at(str(commit))
    if digest is None:
        yield f"provenance.commit: {commit} is no commit of this repository; fetch, or rebase"
    elif code is None:
        yield "provenance.code: missing; run with a version that records it"
    elif code != digest:
        yield f"provenance.code: {code}, and the tree of that commit has {digest}"


def tree_digest_at(commit: str) -> str | None:
    """Return the digest that `tree_digest` has at a commit; None if git does not know it."""
    if not re.fullmatch("[0-9a-f]{7,40}", commit):
        return None
    command = ["git", "-C", str(REPOSITORY), "archive", "--format=tar", commit]
    done = subprocess.run([*command, "--", *PACKAGES], capture_output=True, check=False)
    if done.returncode:
        return None

    total = hashlib.sha256()
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = [member for member in archive if member.isfile() and member.name.endswith(".py")]
        for package in PACKAGES:
            own = [member for member in files if member.name.startswith(f"{package}/")]
            for member in sorted(own, key=lambda member: PurePosixPath(member.name)):
                content = archive.extractfile(member)
                assert content is not None, member.name
                total.update(f"{member.name}\0".encode())
                total.update(hashlib.sha256(content.read()).digest())
    return total.hexdigest()[:16]


def _protocol(record: Record, store: Store) -> Iterator[str]:
    """Yield where features, sampler or protocol are not those of the committed scores."""
    problem = problem_with(record)
    if problem:
        yield f"values: {problem}"
    if record.kind not in ("evaluate", SCORES) or record.status != "done":
        return
    if "manifest" not in record.values:
        yield "values.manifest: missing; score with a version that records it"
        return

    # The hash names the protocol, so it must be of what the manifest says.
    manifest = record.values["manifest"]
    protocol = {"measure": manifest.get("measure"), "key": manifest.get("model", {}).get("key")}
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if manifest.get("hash") != digest:
        yield f"values.manifest.hash: {manifest.get('hash')}, and its content has {digest}"

    # Features that are trained here differ from machine to machine; published ones do not.
    own = record_manifest(record)["measure"].get("extractor", {})
    if own.get("name") not in ("inception", "cifar_judge"):
        return
    known = {
        extractor["sha256"]
        for other in store.reference.all()
        if other.kind == "evaluate" and other.status == "done"
        for extractor in [record_manifest(other)["measure"].get("extractor", {})]
        if extractor.get("name") == own["name"] and extractor.get("sha256")
    }
    if known and own.get("sha256") not in known:
        yield f"values.manifest.measure.extractor: not the {own['name']} features of our scores"


def _data(record: Record, store: Store) -> Iterator[str]:
    """Yield a problem if a set that we know has another content."""
    name, digest = _data_of(record)
    known = {
        other_digest
        for other in store.reference.all()
        for other_name, other_digest in [_data_of(other)]
        if other_name == name and other_digest
    }
    if digest and known and digest not in known:
        yield f"values.data_sha256: {digest[:16]} is no content of {name} that our records hold"


def _data_of(record: Record) -> tuple[str, str]:
    """Return the name of what was trained on, and the digest of its content where it is known."""
    if record.kind != "train":
        return "", ""
    return record.spec["data"]["name"], str(record.values.get("data_sha256", ""))


# ---- Values


def _values(record: Record, store: Store) -> Iterator[str]:
    """Yield values that no measurement gives."""
    if record.utc > timestamp(time.time() + DAY):
        yield f"utc: {record.utc} is in the future"
    seconds = record.provenance.get("seconds")
    if seconds is not None and not seconds > 0:
        yield f"provenance.seconds: {seconds} is no duration"
    if record.status != "done":
        if not record.error:
            yield "error: missing, and the record failed"
        return
    if not record.values:
        yield "values: empty, and the record is done"

    for name, value in record.values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield from _implausible(name, value)
    if record.kind == "cost":
        yield from _other_counts(record, store)


def _implausible(name: str, value: float) -> Iterator[str]:
    """Yield a problem if a number lies where no measurement lies."""
    if name in RATES or name.startswith(("params_", "macs_core")):
        if not value > 0:
            yield f"values.{name}: {value}, expected more than 0"
    elif name.partition("_")[0] in SHARES:
        if not 0 <= value <= 1:
            yield f"values.{name}: {value}, expected a share in 0..1"
    elif name in SCORE_NAMES and value < 0:
        yield f"values.{name}: {value}, expected 0 or more"


def _other_counts(record: Record, store: Store) -> Iterator[str]:
    """Yield the counts that differ from ours: a count is the same everywhere."""
    ours = [other for other in store.reference.by_id().get(record.id, []) if other.status == "done"]
    for other in ours[-1:]:
        for name in sorted(set(record.values) & set(other.values)):
            if record.values[name] != other.values[name]:
                yield f"values.{name}: {record.values[name]}, and {other.values[name]} here"


def anonymous(record: Record) -> Record:
    """Return a record without the names of hosts that a trainer notes of its attempts."""
    attempts = record.values.get("attempts")
    if not isinstance(attempts, list):
        return record
    kept = [
        {name: value for name, value in attempt.items() if name != "host"}
        if isinstance(attempt, dict)
        else attempt
        for attempt in attempts
    ]
    return replace(record, values=record.values | {"attempts": kept})


def _privacy(record: Record, store: Store) -> Iterator[str]:
    """Yield every text that holds a path, or the name of a person or of a machine."""
    # Short names would be found inside ordinary words.
    own = {socket.gethostname(), Path.home().name}
    with suppress(OSError, KeyError):
        own.add(getpass.getuser())
    own = {name for name in own if len(name) > 4}

    # Every text is searched for what its field, its form or this machine gives away.
    for place, text in _texts(vars(record), ""):
        field = place.rpartition(".")[2].lower()
        if field in PRIVATE_FIELDS and field != text:
            yield f"{place}: a field that may name a person or a machine; remove it"
        for what, pattern in PRIVATE.items():
            if found := pattern.search(text):
                yield f"{place}: holds {what}, {_short(found[0])}"
        for name in sorted(own):
            if re.search(rf"\b{re.escape(name)}\b", text):
                yield f"{place}: holds {name!r}, a name of this machine or its user"


def _texts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Yield every text in a value, keys included, with its place."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"{at}.{key}".lstrip("."), str(key)
            yield from _texts(part, f"{at}.{key}".lstrip("."))
    elif isinstance(value, list):
        for k, part in enumerate(value):
            yield from _texts(part, f"{at}[{k}]")
    elif isinstance(value, str):
        yield at, value
