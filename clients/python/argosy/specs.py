"""What a job does, from plain keywords. What is left out stays unset: the service chooses it and shows it in the quote."""

from collections.abc import Sequence

from argosy import names
from argosy.layouts import METHODS
from argosy.v1 import finetune_pb2, usage_pb2

Money = float | str | usage_pb2.Cost
PRIORITIES = {
    "low": finetune_pb2.JOB_PRIORITY_LOW,
    "normal": finetune_pb2.JOB_PRIORITY_NORMAL,
    "high": finetune_pb2.JOB_PRIORITY_HIGH,
}


def cost(amount: Money) -> usage_pb2.Cost:
    """`2.5`, `"2.5"` (both USD) or `"2.5 EUR"` as money. Raises ValueError for what is none."""
    if isinstance(amount, usage_pb2.Cost):
        return amount
    number, _, currency = str(amount).strip().partition(" ")
    try:
        nanos = round(float(number) * 1e9)
    except (ValueError, OverflowError):
        nanos = -1
    if nanos < 0:
        raise ValueError(f"{amount!r} is no amount: say 2.50, or 2.50 EUR")
    return usage_pb2.Cost(currency_code=currency.strip().upper() or "USD", nanos=nanos)


def spec(
    base: str,
    train_version: str,
    method: str,
    *,
    validation_version: str = "",
    validation_fraction: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: Sequence[str] = (),
    rslora: bool | None = None,
    dora: bool | None = None,
    full: bool = False,
    learning_rate: float | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    weight_decay: float | None = None,
    warmup_ratio: float | None = None,
    max_steps: int | None = None,
    seq_len: int | None = None,
    packing: bool | None = None,
    seed: int | None = None,
    patience: int | None = None,
    checkpoint_interval_steps: int | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
) -> finetune_pb2.FineTuneSpec:
    """A `FineTuneSpec` from flat keywords. `method` is classify, chat or preference; bounds are the service's to check.

    Raises ValueError for another method, and for LoRA's own keywords together with `full`.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    message = finetune_pb2.FineTuneSpec(
        base_model=names.base(base),
        train_version=train_version,
        validation_version=validation_version,
        validation_fraction=validation_fraction,
        method=METHODS[method],
        seq_len=seq_len,
        packing=packing,
        seed=seed,
        checkpoint_interval_steps=checkpoint_interval_steps,
    )
    lora = finetune_pb2.Lora(rank=rank, alpha=alpha, dropout=dropout, targets=targets, rslora=rslora, dora=dora)
    if full:
        if lora != finetune_pb2.Lora():
            raise ValueError("every weight is learnt with full: rank, alpha, dropout, targets, rslora and dora are LoRA's")
        message.full.SetInParent()
    else:
        message.lora.CopyFrom(lora)
    learns = finetune_pb2.Hyperparameters(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup_ratio=warmup_ratio,
        max_steps=max_steps,
    )
    if learns != finetune_pb2.Hyperparameters():
        message.hyperparameters.CopyFrom(learns)
    if patience is not None:
        message.early_stopping.patience = patience
    if epsilon is not None:
        message.privacy.CopyFrom(finetune_pb2.Privacy(epsilon=epsilon, delta=delta))
    elif delta is not None:
        raise ValueError("delta belongs to a private job: say epsilon, too")
    return message
