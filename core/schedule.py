"""The numbers of the method, each with its reason: when a reference acts, how it is read, how strong it is."""

from __future__ import annotations

# A reference without noise is read as if it had this fraction of the schedule's noise: there a network's features say
# best what corresponds to what (Tang et al., 2023, "Emergent correspondence from image diffusion": 261 of 1000).
CLEAN_NOISE_FRACTION: float = 0.25

# Injection starts after this fraction of the sampling schedule, in training and in sampling: what comes before it
# decides the layout, which is left to the text.
REFERENCE_START: float = 0.3

# Less than the 1 of training: classifier-free guidance multiplies what the reference adds, too.
DEFAULT_STRENGTH: float = 0.7

# A token of a reference is kept if at least this fraction of its area is masked in: it then shows more of the subject
# than of what is around it.
MASK_THRESHOLD: float = 0.5
