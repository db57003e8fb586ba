"""What the user plugs together: five nodes, each a short recipe over `nodes/host`."""

from .apply import ApplySelfAttnInjection
from .dataset import LoadSAInjectDataset
from .encode import EncodeImagePrompt
from .load import LoadSAInjectAdapter
from .train import TrainSAInjectAdapter

NODES = [LoadSAInjectDataset, TrainSAInjectAdapter, LoadSAInjectAdapter, EncodeImagePrompt, ApplySelfAttnInjection]
