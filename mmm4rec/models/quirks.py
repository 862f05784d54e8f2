"""The faults of the authors' release, each a switch that can be turned on alone.

Source: the released code (github.com/AlwaysFHao/MMM4Rec, commit e0bc248), read and run. The defaults of this
project have none of them; `ModelConfig.published()` has them all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Quirks:
    """What the release does and the default does not."""

    label_time: bool = False
    """The target's own timestamp stands behind the last item in the time input: the model sees when the
    answer happens, in training and in the test. Not where the history fills all max_len positions."""

    zero_stamps: bool = False
    """Padding has timestamp 0, so that one gap of about -1.4e9 seconds follows the last stamp. Under the release's
    normalisation all real gaps are then nearly equal, and the outlier tells how long the history is; a
    logarithm of the gaps keeps them apart and meets the outlier as a number like others."""

    raw_gap_dropout: bool = False
    """Dropout acts on the gaps themselves: a dropped gap claims that no time passed, and in training, never
    in evaluation, 40 % of the outliers of `zero_stamps` are gone."""

    scaled_skip: bool = False
    """The scan's skip connection reads its input times the step (1e-3 to 1e-1 at the start), not its input as
    in Mamba-2: the skip is all but off."""

    tiny_epsilon: bool = False
    """1e-12 in every layer and RMS norm, not 1e-5: a row that is all but constant is blown up to unit size."""

    padding_class: bool = False
    """Padding is a class of the softmax, with vector 0 at the start of a run from scratch. Normalising it
    divides by 1e-12, so the first gradient of the adapters' biases is of the order 1e5, and the optimizer's
    second moment then holds them still for thousands of steps. (Ranks leave padding out all the same.)"""

    summed_accumulation: bool = False
    """The mean gradients of the accumulated batches are summed, not averaged over the examples: coupled weight
    decay weighs 1/8 of what it says at 8 batches, and a short last step of an epoch moves less."""

    duplicate_negatives: bool = False
    """The in-batch loss keeps a target's other appearances in the batch as negatives of itself."""

    @classmethod
    def published(cls) -> Quirks:
        """All of them: the release."""
        return cls(**{field.name: True for field in fields(cls)})


NONE = Quirks()
