"""Who may call what, and what it costs: one row an RPC. What has no row does not exist.

A new RPC without a row fails the build (C2), and at run time it is UNIMPLEMENTED even if a servicer serves it.
"""

import enum
from dataclasses import dataclass
from typing import Final


class Cost(enum.Enum):
    """What a call is charged by. TOKENS and PASSES reserve first and settle once."""

    REQUEST = "L"
    TOKENS = "T"
    PASSES = "P"
    BYTES = "B"  # as a request; finetune counts the bytes against the quota
    JOB = "J"  # finetune is told what the books have left; what the work owes comes back as charges, while it runs and at its end


class Idempotency(enum.Enum):
    """What repeating a call means."""

    READ = "read"  # nothing to repeat
    REPLAY = "r"  # the same request id and body gets the same reply for 24 h
    HANDLE = "h"  # a request id completes at most once
    OFFSET = "o"  # bytes that are stored already are skipped


SCOPES: Final = frozenset(
    {
        "generate", "explain", "models.read", "models.write", "models.promote", "models.force", "datasets.read", "datasets.write",
        "datasets.content", "finetune.read", "finetune.write", "keys.read", "keys.write", "quota.read", "usage.read", "audit.read",
        "platform",
    }
)  # fmt: skip

MAX_STREAM_SECONDS: Final = 300.0  # what writes text, and every stream, unless the settings say less or more
MAX_CALL_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Access:
    """One RPC's row."""

    scope: str | None  # None: any live key
    cost: Cost = Cost.REQUEST
    idempotency: Idempotency = Idempotency.READ
    stream: bool = False  # the server streams
    client_stream: bool = False
    long: bool = False  # unary, and reads as many bytes as the caller has stored

    def cap_s(self, max_stream_s: float = MAX_STREAM_SECONDS) -> float:
        """The deadline of a call that has none, and the longest one may ask for."""
        long = self.long or self.stream or self.client_stream or self.cost in {Cost.TOKENS, Cost.PASSES}
        return max_stream_s if long else min(MAX_CALL_SECONDS, max_stream_s)


def _rows(service: str, **methods: Access) -> dict[str, Access]:
    return {f"/{service}/{method}": access for method, access in methods.items()}


_writes = Access("generate", Cost.TOKENS, Idempotency.HANDLE)
_streams = Access("generate", Cost.TOKENS, Idempotency.HANDLE, stream=True)
_counts = Access("generate")
_models = Access("models.read")
_changes_models = Access("models.write", idempotency=Idempotency.REPLAY)
_promotes = Access("models.promote", idempotency=Idempotency.REPLAY)
_data = Access("datasets.read")
_changes_data = Access("datasets.write", idempotency=Idempotency.REPLAY)
_jobs = Access("finetune.read")
_changes_jobs = Access("finetune.write", idempotency=Idempotency.REPLAY)
_platform = Access("platform", idempotency=Idempotency.REPLAY)
_changes_keys = Access("keys.write", idempotency=Idempotency.REPLAY)

ACCESS: Final[dict[str, Access]] = {
    **_rows(
        "argosy.v1.GenerationService",
        GenerateText=_writes,
        StreamGenerateText=_streams,
        Chat=_writes,
        StreamChat=_streams,
        CountTokens=_counts,
        Tokenize=_counts,
    ),
    **_rows(
        "argosy.v1.LanguageService",
        ClassifyText=_writes,
        SummarizeText=_writes,
        StreamSummarizeText=_streams,
        TranslateText=_writes,
        StreamTranslateText=_streams,
        AnswerQuestion=_writes,
        StreamAnswerQuestion=_streams,
    ),
    **_rows("argosy.v1.EmbeddingService", EmbedTexts=_writes),
    **_rows(
        "argosy.v1.ExplanationService",
        Explain=Access("explain", Cost.PASSES, Idempotency.HANDLE),
        FindNearestExamples=Access("explain", Cost.PASSES, Idempotency.HANDLE),
    ),
    **_rows(
        "argosy.v1.ModelService",
        CreateModel=_changes_models,
        GetModel=_models,
        ListModels=_models,
        UpdateModel=_changes_models,
        DeleteModel=_changes_models,
        CreateModelVersion=_changes_models,
        GetModelVersion=_models,
        ListModelVersions=_models,
        DeleteModelVersion=_changes_models,
        ImportModelVersion=Access("models.write", Cost.BYTES, Idempotency.REPLAY, client_stream=True),
        ExportModelVersion=Access("models.read", Cost.BYTES, stream=True),
        CreateEvaluation=Access("models.write", Cost.JOB, Idempotency.REPLAY),
        GetEvaluation=_models,
        ListEvaluations=_models,
        GetModelAlias=_models,
        ListModelAliases=_models,
        MoveModelAlias=_promotes,  # `force` also needs `models.force`
        RollbackModelAlias=_promotes,
        DeleteModelAlias=_promotes,
    ),
    **_rows(
        "argosy.v1.DatasetService",
        CreateDataset=_changes_data,
        GetDataset=_data,
        ListDatasets=_data,
        UpdateDataset=_changes_data,
        DeleteDataset=_changes_data,
        CreateUpload=_changes_data,
        GetUpload=_data,
        ResumeUpload=_changes_data,
        WriteUpload=Access("datasets.write", Cost.BYTES, Idempotency.OFFSET, client_stream=True),
        FinalizeUpload=Access("datasets.write", idempotency=Idempotency.REPLAY, long=True),
        DeleteUpload=_changes_data,
        GetDatasetVersion=_data,
        ListDatasetVersions=_data,
        DeleteDatasetVersion=_changes_data,
        RedactDatasetVersion=_changes_data,
        ListRowErrors=_data,
        ReadDatasetVersion=Access("datasets.content", Cost.BYTES, stream=True),
        GetDeletion=_data,
    ),
    **_rows(
        "argosy.v1.FineTuneService",
        CreateFineTuneJob=Access("finetune.write", Cost.JOB, Idempotency.REPLAY),
        GetFineTuneJob=_jobs,
        ListFineTuneJobs=_jobs,
        CancelFineTuneJob=_changes_jobs,
        PauseFineTuneJob=_changes_jobs,
        ResumeFineTuneJob=Access("finetune.write", Cost.JOB, Idempotency.REPLAY),
        DeleteFineTuneJob=_changes_jobs,
        ListCheckpoints=_jobs,
        ListFineTuneJobEvents=_jobs,
        WatchFineTuneJob=Access("finetune.read", stream=True),
    ),
    **_rows(
        "argosy.admin.v1.ProjectService",
        CreateProject=_platform,
        GetProject=Access(None),  # its own; `platform` any
        ListProjects=Access("platform"),
        UpdateProject=_platform,
        DeleteProject=_platform,
        SuspendProject=_platform,
        RestoreProject=_platform,
    ),
    **_rows(
        "argosy.admin.v1.ApiKeyService",
        CreateApiKey=_changes_keys,
        GetApiKey=Access("keys.read"),
        ListApiKeys=Access("keys.read"),
        UpdateApiKey=_changes_keys,
        RotateApiKey=_changes_keys,
        DisableApiKey=_changes_keys,
        EnableApiKey=_changes_keys,
        DeleteApiKey=_changes_keys,
        UndeleteApiKey=_changes_keys,
        GetCaller=Access(None),
    ),
    **_rows(
        "argosy.admin.v1.QuotaService",
        GetQuotaPolicy=Access("quota.read"),
        UpdateQuotaPolicy=_platform,
        GetQuotaUsage=Access("quota.read"),
    ),
    **_rows(
        "argosy.admin.v1.UsageService",
        QueryUsage=Access("usage.read"),
        ExportUsage=Access("usage.read", stream=True),
        GetRequestUsage=Access("usage.read"),
    ),
}

# No key: a probe has none. They tell nothing about a project.
OPEN: Final = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"})
# Only while the reflection setting is on; release settings have it off (A12).
REFLECTION: Final = frozenset(
    {
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)


def access_of(path: str) -> Access | None:
    """The row of an exact RPC path; None: answer UNIMPLEMENTED."""
    return ACCESS.get(path)
