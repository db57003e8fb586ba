"""What the user plugs together: six nodes, each a short recipe over `nodes/host`."""

from .apply import ApplySelfAttnInjection
from .dataset import LoadSAInjectDataset
from .encode import EncodeImagePrompt
from .load import LoadSAInjectAdapter
from .save import SaveSAInjectAdapter
from .train import TrainSAInjectAdapter

NODES = [
    LoadSAInjectDataset,
    TrainSAInjectAdapter,
    SaveSAInjectAdapter,
    LoadSAInjectAdapter,
    EncodeImagePrompt,
    ApplySelfAttnInjection,
]
