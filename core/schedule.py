"""The constants of the method, with their reasons."""

from __future__ import annotations

# A clean reference is read at the timestep at this fraction of the schedule. UNet features match corresponding
# parts best at 261 of 1000 (Tang et al., 2023, "Emergent correspondence from image diffusion").
CLEAN_NOISE_FRACTION: float = 0.25

# Injection starts after this fraction of the sampling schedule, in training and in sampling. Earlier steps decide the
# layout, which is left to the text.
REFERENCE_START: float = 0.3

# Below the 1 of training, because classifier-free guidance also amplifies what the reference adds.
DEFAULT_STRENGTH: float = 0.7

# A reference token is kept if at least this fraction of its area is inside the mask. It then shows more of the subject
# than of the background.
MASK_THRESHOLD: float = 0.5
