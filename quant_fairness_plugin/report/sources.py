"""The artifacts that a report is made from, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from quant_fairness_plugin.artifacts import (
    RECORD_NAME,
    AnalysisAnswer,
    Evidence,
    ExportRecord,
    Measurement,
    ProtectionPlan,
    SweepReport,
    from_json,
)
from quant_fairness_plugin.artifacts.files import MOST_ARTIFACT_BYTES
from quant_fairness_plugin.documents import parse_json, read_text
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE

Artifact = ExportRecord | Measurement | SweepReport | ProtectionPlan | Evidence | AnalysisAnswer
KINDS: dict[str, type[Artifact]] = {
    "export": ExportRecord,
    "measurement": Measurement,
    "sweep": SweepReport,
    "plan": ProtectionPlan,
    "evidence": Evidence,
    "analysis": AnalysisAnswer,
}
"""`kind` of a JSON document → its class."""
_FIELDS = {
    ExportRecord: "record",
    Measurement: "measurement",
    SweepReport: "sweep",
    ProtectionPlan: "plan",
    Evidence: "evidence",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What there is to report on; at least one field is not None."""

    record: ExportRecord | None = None
    measurement: Measurement | None = None
    """Of the checkpoint; the record's own where none was given besides."""
    before: Measurement | None = None
    """Of the same quantization without protection; the record's own where none was given besides."""
    sweep: SweepReport | None = None
    plan: ProtectionPlan | None = None
    """What is recommended; that of the record or the evidence where none was given besides."""
    evidence: Evidence | None = None
    analyses: tuple[AnalysisAnswer, ...] = ()
    """At most one to a question."""

    @classmethod
    def of(cls, artifacts: Iterable[Artifact]) -> Sources:
        """Sort artifacts by what they are.

        Raises:
            ConfigError: none, two of one kind, artifacts of different models, or a measurement of no quantization.
        """
        by_kind: dict[str, Artifact] = {}
        for artifact in artifacts:
            name = _place(artifact)
            if name in by_kind:
                raise ConfigError(f"two artifacts are a {name}; a report is about one of each kind. Leave one out")
            by_kind[name] = artifact
        if not by_kind:
            raise ConfigError("nothing to report on; name a checkpoint folder, or a JSON file that a command saved")
        _check_one_model(by_kind)
        analyses = tuple(artifact for artifact in by_kind.values() if isinstance(artifact, AnalysisAnswer))
        others = {name: artifact for name, artifact in by_kind.items() if artifact not in analyses}
        return cls(**others, analyses=analyses)._completed()  # type: ignore[arg-type] # each under its own type's name

    def _completed(self) -> Sources:
        owned = [source.plan for source in (self.record, self.evidence) if source is not None]
        measured = None if self.record is None else self.record.measurement
        before = self.before
        if before is None and self.record is not None and self.measurement in (None, measured):
            before = self.record.unprotected
        plan = self.plan or next(iter(owned), None)
        return replace(self, plan=plan, measurement=self.measurement or measured, before=before)

    @property
    def model(self) -> str:
        """Name of the 16-bit model, as the artifacts have it."""
        for source in (self.record, self.measurement, self.before, self.sweep, self.evidence):
            if source is not None:
                return source.provenance.model
        if self.plan is not None:
            return self.plan.model
        return str(self.analyses[0].provenance.get("model", "several models"))


def read_sources(paths: Iterable[Path]) -> Sources:
    """Read checkpoint folders and JSON files.

    Raises:
        ArtifactError: a file that is missing, no JSON, or of no kind that a report can be made from.
        ConfigError: what was read does not belong together; see `Sources.of`.
    """
    return Sources.of([read_artifact(path) for path in paths])


def read_artifact(path: Path) -> Artifact:
    """Read one artifact: the record of a checkpoint folder, or a JSON file of any kind.

    Raises:
        ArtifactError: missing, unreadable, no artifact, or one of another version.
    """
    file = path / RECORD_NAME if path.is_dir() else path
    try:
        text = read_text(file, most=MOST_ARTIFACT_BYTES)
        content = parse_json(text)
    except (OSError, ValueError) as err:
        raise ArtifactError(
            f"{file}: cannot be read ({' '.join(str(err).split())}); expected a checkpoint folder of this program or a "
            "JSON file that it saved. Check the path"
        ) from err
    kind = content.get("kind") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ArtifactError(f"{file}: kind {kind!r} is none of {', '.join(KINDS)}. Name one of these")
    artifact: Artifact = from_json(KINDS[kind], text, str(file))  # type: ignore[type-var] # one of the kinds, by name
    return artifact


def _place(artifact: Artifact) -> str:
    """Return the field of `Sources` that an artifact belongs in; of an analysis, what is to be there once."""
    if isinstance(artifact, AnalysisAnswer):
        return f"{artifact.analysis} analysis"
    if isinstance(artifact, Measurement):
        if artifact.state == BASELINE:
            raise ConfigError(
                "the measurement is of the 16-bit model alone, which loses nothing; measure a checkpoint: "
                "quant-fairness measure DIR -o measurement.json"
            )
        if artifact.state == NONE:
            return "before"
    return _FIELDS[type(artifact)]


def _check_one_model(by_kind: dict[str, Artifact]) -> None:
    models = dict(_model(artifact) for artifact in by_kind.values() if _is_of_one_model(artifact))
    if len(models) > 1:
        raise ConfigError(
            f"the artifacts are of {len(models)} models ({', '.join(models.values())}), whose checksums differ; a "
            "report is about one. Make one for each"
        )
    plan = by_kind.get("plan")
    if isinstance(plan, ProtectionPlan) and models and plan.model not in models.values():
        raise ConfigError(f"the plan is for {plan.model}, the other artifacts are of {', '.join(models.values())}")


def _is_of_one_model(artifact: Artifact) -> bool:
    """Whether an artifact has a model's checksum: plans have none, nor has an answer about several models."""
    if isinstance(artifact, AnalysisAnswer):
        return "model_sha256" in artifact.provenance
    return not isinstance(artifact, ProtectionPlan)


def _model(artifact: Artifact) -> tuple[str, str]:
    """Return checksum and name of the 16-bit model that an artifact is of."""
    assert not isinstance(artifact, ProtectionPlan)  # which has no checksum
    if isinstance(artifact, AnalysisAnswer):
        return str(artifact.provenance.get("model_sha256")), str(artifact.provenance.get("model"))
    return artifact.provenance.model_sha256, artifact.provenance.model
