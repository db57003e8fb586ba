"""The names of the host's samplers and schedulers."""

from comfy.samplers import KSampler

SAMPLERS: tuple[str, ...] = tuple(KSampler.SAMPLERS)
SCHEDULERS: tuple[str, ...] = tuple(KSampler.SCHEDULERS)
