"""The scale that scores are put on, and what is a success."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    """How scores become what is trained on, and which of them are a success."""

    mean: float = 0.0  # of the scores before training
    deviation: float = 1.0  # of these scores
    graded: bool = False  # whether there are more scores than a rule's two
    threshold: float | None = None  # higher is a success; None = there is none
    is_rule: bool = False  # whether there are two scores alone, so that success is all there is
    accuracy: float | None = None  # of the classifier, on held-out comparisons

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores as they are trained on: graded ones begin as 0 ± 1."""
        scaled = (scores - self.mean) / self.deviation
        # Where good ones are rare, far from the mean, they would be worth any
        # price: so what is graded counts by its logarithm.
        return scaled.asinh() if self.graded else scaled


def scale_of(scores: torch.Tensor) -> Scale:
    """Return the scale for scores of the base model's samples; print what it does.

    scores: (samples,). Two scores or one are a rule's: it is left as it is, and its
    higher score is a success. More are graded.
    """
    values = scores.unique().tolist()
    if len(values) <= 2:
        shown = " or ".join(f"{value:g}" for value in values)
        line = f"the base model's samples score {shown}: left as it is"
        print(f"Scale     {line}\n", flush=True)

        middle = (min(values) + max(values)) / 2
        return Scale(threshold=middle, is_rule=True)

    mean = scores.mean().item()
    deviation = scores.std().item()
    line = f"the base model's {mean:.3g} ± {deviation:.3g} becomes 0 ± 1"
    print(f"Scale     {line}\n", flush=True)
    return Scale(mean=mean, deviation=deviation, graded=True)


def success_rate(scores: list[float], threshold: float | None) -> float | None:
    """Return the share of scores above the threshold, None where there is none."""
    if threshold is None:
        return None
    successes = sum(score > threshold for score in scores)
    return successes / len(scores)
