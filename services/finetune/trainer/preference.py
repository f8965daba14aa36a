"""Direct preference optimisation in our own loop: of two answers the better one gains, by how much the base alone would have said each.

The base is the reference, for its weights are still there: the adapter is left out for one pass. The loss of a pair is
-log sigmoid(beta * margin), so its gradient is that of the two answers' log-likelihoods times beta * sigmoid(-beta * margin): the
factors come from a pass of the output matrix without a gradient, and the rest is the loss of supervised tokens with weights.
"""

from collections.abc import Sequence

import torch

from services.finetune.trainer.batches import Batch, Example, fit, pack
from services.finetune.trainer.loss import supervised_loss, token_losses
from services.finetune.trainer.train import Evaluation, Trainer

__all__ = ["PreferenceTrainer"]


class PreferenceTrainer(Trainer):
    """A Trainer of pairs: examples with an `against`. Needs an adapter, without which there is no base left to compare with."""

    def batches(self, chosen: Sequence[Example]) -> list[Batch]:
        """Packed rows that hold both answers of a pair, the better one first."""
        pairs = [(example, example.against) for example in chosen if example.against is not None]
        bins = fit([len(better.ids) + len(worse.ids) for better, worse in pairs], self.spec.step_tokens)
        members = ([row for at in sorted(each) for row in pairs[at]] for each in bins)
        return [pack(rows, self.base.device).to(self.base.device) for rows in members]

    def evaluate(self, examples: Sequence[Example] | None = None) -> Evaluation:
        """Mean loss of a pair; `numbers`: in how many the better answer gained more, and the mean margin in nats."""
        examples = self.validation if examples is None else examples
        self.base.model.eval()
        margins: list[torch.Tensor] = []
        with torch.no_grad():
            for batch in self.batches(examples):
                margins.append(self._margins(batch, self.base.states(batch), self.base.output))
        found = torch.cat(margins) if margins else torch.zeros(0)
        beta = self.spec.hyperparameters.preference_beta
        loss = float(torch.nn.functional.softplus(-beta * found).mean()) if len(found) else 0.0
        numbers = {"preferred": float((found > 0).double().mean()), "margin": float(found.mean())} if len(found) else {}
        return Evaluation(loss, numbers=numbers)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the pairs' losses; the value is the loss itself, the gradient by way of weighted tokens."""
        beta = self.spec.hyperparameters.preference_beta
        states = self.base.states(batch)
        margins = self._margins(batch, states.detach(), self.output)
        pull = beta * torch.sigmoid(-beta * margins)  # of the better answer up, of the worse one down
        weights = torch.stack([pull, -pull], 1).flatten()[self._owners(batch)]
        moved = supervised_loss(states, self.output, batch.targets, self.base.softcap, weights)
        return moved + (torch.nn.functional.softplus(-beta * margins).sum() - moved.detach())

    def _margins(self, batch: Batch, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """How much more than the base the model says of the better answer than of the worse one, in nats: [pairs]."""
        with torch.no_grad():
            with self.untuned():
                reference = self.base.states(batch)
            gained = token_losses(reference, output, batch.targets, self.base.softcap)
            gained -= token_losses(states, output, batch.targets, self.base.softcap)
            owners = self._owners(batch)
            totals = gained.new_zeros(int(owners[-1]) + 1).index_add_(0, owners, gained).view(-1, 2)
            return totals[:, 0] - totals[:, 1]

    @staticmethod
    def _owners(batch: Batch) -> torch.Tensor:
        """Which example each selected state belongs to: [n]."""
        assert batch.segments is not None
        ends = torch.tensor(batch.segments.lengths, device=batch.select.device).cumsum(0)
        return torch.bucketize(batch.select, ends, right=True)
