"""The tables of the service as SQLAlchemy sees them; `migrations/` makes them, and a test holds the two together."""

from services.finetune.schema import charges, datasets, jobs, models, privacy
from services.finetune.schema.columns import METADATA

__all__ = ["METADATA", "charges", "datasets", "jobs", "models", "privacy"]
