"""The variables of the fine-tuning service; each is `ARGOSY_` and the field's name in capitals, durations carry their unit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.chassis.server import Listener


@dataclass(frozen=True)
class JobSettings:
    """How jobs are run."""

    launcher: Literal["local", "cluster"] = "local"  # processes of this machine, or Jobs of a Kubernetes cluster
    training_slots: int = field(default=1, metadata={"minimum": 0})  # attempts running at once
    training_address: str = ""  # host:port at which attempts reach TrainingService; empty: the listener's own
    # A second listener for TrainingService alone, host:port, with the listener's certificate and no client's; empty: none.
    training_listen_address: str = ""
    # Namespaces of a cluster's Jobs: the first for everybody, and after it `project uid=namespace` for projects with one of their own.
    job_namespaces: tuple[str, ...] = ()
    pod_templates: Path | None = None  # folder of pod templates, `{pool}.yaml`; needed in a cluster
    training_pool: str = "default"  # whose template attempts are made from
    training_nodes: int = field(default=1, metadata={"minimum": 1, "maximum": 64})  # of one attempt; more than one needs JobSet
    queue_name: str = ""  # Kueue's LocalQueue that a cluster's Jobs wait in; empty: none, training_slots alone decide
    queue_priority_class: str = ""  # their WorkloadPriorityClass; empty: the queue's own
    ended_job_seconds: int = field(default=86_400, metadata={"minimum": 60})  # a cluster's ended Job that was not cleared away is kept
    training_python: Path | None = None  # interpreter of local attempts; None: our own
    # Words of a trainer of the operator's own, such as `python,-m,ours`: runs under our wrapper in place of our loop. Empty: our loop.
    trainer_command: tuple[str, ...] = ()
    callback_address: str = ""  # host:port that takes its live progress over HTTPS, with the listener's certificate; empty: none
    callback_url: str = ""  # what its attempts post to, as https://host:port; empty: the address itself, for local attempts alone
    runs_dir: Path | None = None  # private folders of local attempts; None: under the cache
    # Data segment of a local attempt; None: unlimited.
    training_memory_bytes: int | None = field(default=None, metadata={"minimum": 1 << 26})
    lease_seconds: float = field(default=30.0, metadata={"minimum": 0.2})  # an attempt not heard from for longer is lost
    stop_seconds: float = field(default=30.0, metadata={"minimum": 0.1})  # from SIGTERM to SIGKILL: longer than a checkpoint takes
    poll_seconds: float = field(default=1.0, metadata={"minimum": 0.02})  # between looks at a job that nothing woke us for
    retry_seconds: float = field(default=2.0, metadata={"minimum": 0.0})  # first backoff after a lost attempt, jittered, doubled up to 16 x
    attempts_without_progress: int = field(default=3, metadata={"minimum": 1})  # that committed nothing new, in a row; then the job fails
    paused_days: float = field(default=30.0, metadata={"minimum": 0.0})  # a paused job is cancelled after that

    def __post_init__(self) -> None:
        if self.launcher == "cluster":
            needed = {"job_namespaces": self.job_namespaces, "pod_templates": self.pod_templates, "training_address": self.training_address}
            if missing := ", ".join(f"ARGOSY_{name.upper()}" for name, value in needed.items() if not value):
                raise ValueError(f"attempts in a cluster need {missing}")
            if "=" in self.job_namespaces[0] or not all("=" in each for each in self.job_namespaces[1:]):
                raise ValueError("ARGOSY_JOB_NAMESPACES is everybody's namespace, then `project uid=namespace` for those with their own")
            if self.trainer_command and self.callback_address and not self.callback_url:
                raise ValueError("ARGOSY_CALLBACK_ADDRESS is no address for pods: ARGOSY_CALLBACK_URL must say what they post to")


@dataclass(frozen=True)
class JobQuotas:
    """What one project may have, and what it pays. 0: unlimited."""

    jobs_per_project: int = field(default=16, metadata={"minimum": 0})  # not at rest
    running_jobs_per_project: int = field(default=4, metadata={"minimum": 0})  # the rest wait in QUEUED
    training_tokens_per_job: int = field(default=2_000_000_000, metadata={"minimum": 0})
    training_tokens_per_day: int = field(default=0, metadata={"minimum": 0})
    training_nanos_per_second: int = field(default=20_000, metadata={"minimum": 0})  # price of a second of an attempt, 1e-9 of a unit
    cost_currency: str = "USD"
    # Epsilon of all private jobs on one dataset together, added up; a job that might go over it is refused.
    privacy_epsilon_per_dataset: float = field(default=16.0, metadata={"minimum": 0.0})


@dataclass(frozen=True)
class DatasetSettings:
    """What one project may store, and how rows are validated. 0: unlimited."""

    upload_bytes: int = field(default=10 << 30, metadata={"minimum": 0})  # of one version (V3)
    stored_bytes_per_project: int = field(default=100 << 30, metadata={"minimum": 0})  # versions and open uploads together
    rows_per_version: int = field(default=5_000_000, metadata={"minimum": 0})  # V3
    open_uploads_per_project: int = field(default=16, metadata={"minimum": 0})
    upload_streams: int = field(default=32, metadata={"minimum": 1})  # WriteUpload at once in this process, 16 MiB of memory each
    row_tokens: int = field(default=2_048, metadata={"minimum": 0})  # V9 warns of longer rows
    validators: int = field(default=1, metadata={"minimum": 0, "maximum": 64})  # validations at once, a process each
    validator_memory_bytes: int = field(default=2 << 30, metadata={"minimum": 0})  # of each
    erase_seconds: float = field(default=2.0, metadata={"minimum": 0.02})  # between looks for what expired or is to be erased


@dataclass(frozen=True)
class FineTuneSettings:
    """One control plane of fine-tuning."""

    listener: Listener = field(default_factory=Listener)
    jobs: JobSettings = field(default_factory=JobSettings)
    quotas: JobQuotas = field(default_factory=JobQuotas)
    datasets: DatasetSettings = field(default_factory=DatasetSettings)
    database_url: str = ""  # postgresql://…; empty: the fleet's embedded server
    database_connections: int = field(default=8, metadata={"minimum": 2, "maximum": 64})
    store_url: str = ""  # object store: file:///…, s3://…, gs://…, az://…, memory://; empty: the fleet's folder
    bases: tuple[str, ...] = ("gemma-3-270m=default",)  # `name=directory or hub id`: what jobs may start from, as models/{name}
    cache_dir: str | None = None  # of prepared weights; None: the user's cache
    caller_public_keys: tuple[str, ...] = ()  # `kid=path` of an Ed25519 public key in PEM
    manifest_key: Path | None = None  # PEM, Ed25519: signs what is published; None: one drawn at start, as tests use
    manifest_kid: str = "finetune"
    # 64 hex digits, secret, the same for every process: of page tokens, and of the tokens that running attempts have. Empty: drawn at
    # start, and a restart then ends what runs.
    page_token_key: str = field(default="", repr=False)
