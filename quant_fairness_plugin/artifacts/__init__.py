"""The plain data that crosses stages, and its JSON form.

Every arrow of the pipeline (`TextSet`, `Measurement`, `SweepReport`, `ProtectionPlan`, `ExportRecord`) is a frozen
dataclass here, which can be saved and picked up by a later command. Nothing in this module imports torch.

An artifact holds only what is reproducible byte for byte; what differs from run to run (time, host, duration) goes into
a sibling `*.run.json` (`save_run_record`).
"""

from quant_fairness_plugin.artifacts.analyses import AnalysisAnswer
from quant_fairness_plugin.artifacts.answers import FAULTS, Answer, Answers, Fault, LanguageAnswers
from quant_fairness_plugin.artifacts.checkpoints import RECORD_NAME, ExportRecord, FileRecord
from quant_fairness_plugin.artifacts.documents import Documents
from quant_fairness_plugin.artifacts.evidence import (
    Comparison,
    Evidence,
    EvidenceRow,
    Frontier,
    FrontierRow,
    Outcome,
    Standing,
)
from quant_fairness_plugin.artifacts.experts import ExpertCoverage, ExpertUse
from quant_fairness_plugin.artifacts.files import (
    digest,
    from_json,
    load,
    package_versions,
    save,
    save_run_record,
    to_json,
    write_atomically,
)
from quant_fairness_plugin.artifacts.grids import Grid
from quant_fairness_plugin.artifacts.locks import TemporaryFolder, held, lock, temporary_folder
from quant_fairness_plugin.artifacts.measurements import (
    BeforeAndAfter,
    LanguageDamage,
    LanguageScores,
    Measurement,
    StateScores,
)
from quant_fairness_plugin.artifacts.names import (
    FINE_GROUPS,
    FINEST_GROUP,
    CheckpointFormat,
    Clip,
    Effort,
    Fluency,
    Granularity,
    Mode,
    Part,
    Precision,
    Reader,
    SchemeName,
    SearchMethod,
    Start,
    Status,
    Weighting,
    bits_of_precision,
    precision_of_bits,
    precision_order,
    precision_words,
)
from quant_fairness_plugin.artifacts.numbers import Bootstrap, Interval, Number, Undefined
from quant_fairness_plugin.artifacts.places import check_file_place, check_place
from quant_fairness_plugin.artifacts.plans import ProtectionPlan
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES, Provenance
from quant_fairness_plugin.artifacts.reading import ReaderRun
from quant_fairness_plugin.artifacts.scores import UnitScores
from quant_fairness_plugin.artifacts.sweeps import (
    Combinations,
    Necessity,
    NecessityTest,
    Ranking,
    SearchRecord,
    SweepReport,
    SweepRow,
    Synergy,
    SynergyMatrix,
)
from quant_fairness_plugin.artifacts.texts import TextSet
from quant_fairness_plugin.artifacts.units import Unit
from quant_fairness_plugin.artifacts.used import UsedSentences, join_digests, sentence_digests
from quant_fairness_plugin.artifacts.work import note_circumstances

__all__ = [
    "AnalysisAnswer",
    "Answer",
    "Answers",
    "BeforeAndAfter",
    "Bootstrap",
    "CheckpointFormat",
    "Clip",
    "Effort",
    "Combinations",
    "Comparison",
    "Documents",
    "Evidence",
    "EvidenceRow",
    "ExpertCoverage",
    "ExpertUse",
    "ExportRecord",
    "FAULTS",
    "Fault",
    "FileRecord",
    "Fluency",
    "Frontier",
    "FrontierRow",
    "Granularity",
    "Grid",
    "Interval",
    "LanguageAnswers",
    "LanguageDamage",
    "LanguageScores",
    "Measurement",
    "Mode",
    "NO_SURPRISES",
    "Necessity",
    "NecessityTest",
    "Number",
    "Outcome",
    "Part",
    "Precision",
    "ProtectionPlan",
    "Provenance",
    "RECORD_NAME",
    "Ranking",
    "Reader",
    "ReaderRun",
    "SchemeName",
    "SearchMethod",
    "SearchRecord",
    "Standing",
    "Start",
    "StateScores",
    "Status",
    "SweepReport",
    "SweepRow",
    "Synergy",
    "SynergyMatrix",
    "TemporaryFolder",
    "TextSet",
    "Undefined",
    "Unit",
    "UnitScores",
    "UsedSentences",
    "Weighting",
    "FINE_GROUPS",
    "FINEST_GROUP",
    "bits_of_precision",
    "precision_order",
    "precision_words",
    "check_file_place",
    "check_place",
    "digest",
    "from_json",
    "held",
    "join_digests",
    "load",
    "lock",
    "note_circumstances",
    "package_versions",
    "precision_of_bits",
    "save",
    "save_run_record",
    "sentence_digests",
    "temporary_folder",
    "to_json",
    "write_atomically",
]
