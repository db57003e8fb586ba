"""What the user plugs together: four nodes, each a short recipe over `nodes/host`."""

from .apply import ApplySelfAttnInjection
from .encode import EncodeImagePrompt
from .load import LoadSAInjectAdapter
from .train import TrainSAInjectAdapter

NODES = [LoadSAInjectAdapter, TrainSAInjectAdapter, EncodeImagePrompt, ApplySelfAttnInjection]
