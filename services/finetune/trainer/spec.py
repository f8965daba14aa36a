"""What one attempt is told to do, resolved: every value concrete, nothing automatic left (pure)."""

import enum
import math
from dataclasses import dataclass, field

__all__ = [
    "CHECKPOINT_INTERVAL_STEPS",
    "HEAD_RATE",
    "SEQ_LEN",
    "EarlyStopping",
    "Hyperparameters",
    "Lora",
    "Method",
    "Privacy",
    "Spec",
    "learning_rate",
    "steps",
]

SEQ_LEN, CHECKPOINT_INTERVAL_STEPS = 1024, 50
HEAD_RATE = 1e-3  # of a head over states of size 1; bases differ in size by a hundred, and a step moves logits by rate times size


class Method(enum.Enum):
    """What is learnt."""

    CHAT = "chat"  # the assistant's words
    CLASSIFY = "classify"  # a label for a text, by a head of our own
    PREFERENCE = "preference"  # which of two answers is better


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters beside frozen linear layers. `targets` are the last parts of module names; none: every linear layer."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output: alpha / r, with rsLoRA alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Of AdamW and its schedule."""

    learning_rate: float = 2e-4
    head_learning_rate: float | None = None  # None: HEAD_RATE over the size of the states
    epochs: float = 3.0
    batch_size: int = 8  # examples of an optimizer step
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03  # of all steps
    max_steps: int | None = None
    clip_norm: float = 1.0  # of all gradients together; 0: not clipped
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    preference_beta: float = 0.1  # pull towards the base where a preference is learnt


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """End once `patience` evaluations in a row were not better than the best by `min_delta` of validation loss, in nats."""

    patience: int = 3
    min_delta: float = 0.0


@dataclass(frozen=True, slots=True)
class Privacy:
    """Differential privacy of the training examples: the promised (epsilon, delta), and at which norm a gradient is clipped."""

    epsilon: float
    delta: float
    unit: str = "example"
    clip_norm: float = 1.0
    secure_random: bool = True


@dataclass(frozen=True, slots=True)
class Spec:
    """One attempt's work. `lora` None: every weight of the base is trained."""

    method: Method
    lora: Lora | None = field(default_factory=Lora)
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    seq_len: int = SEQ_LEN  # tokens of the longest example; a longer one is dropped and counted
    packing: bool = True
    seed: int = 0
    early_stopping: EarlyStopping | None = None
    checkpoint_interval_steps: int = CHECKPOINT_INTERVAL_STEPS
    evaluation_interval_steps: int | None = None  # None: twice an epoch
    validation_fraction: float = 0.1  # of the train rows, where there is no validation version
    privacy: Privacy | None = None
    labels: tuple[str, ...] = ()
    precision: str = "float32"  # of products with frozen weights: float32, bfloat16, or auto: bfloat16 where the device computes in it
    step_tokens: int = 2048  # tokens computed at once; bounds memory, changes no loss
    gradient_checkpointing: bool = False


def steps(spec: Spec, examples: int) -> int:
    """Optimizer steps of the whole job; the last batch of an epoch may be short."""
    own = spec.hyperparameters
    each = -(-examples // own.batch_size)
    return max(1, min(own.max_steps or 2**31, math.ceil(own.epochs * each)))


def learning_rate(own: Hyperparameters, step: int, total: int) -> float:
    """Rate of 0-based `step` as a factor of the full one: linear warmup, then a cosine to zero."""
    warmup = min(total - 1, math.ceil(own.warmup_ratio * total))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
