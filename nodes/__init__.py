"""The nodes. Each is a short list of calls into `nodes/host`."""

from .apply import ApplySelfAttnInjection
from .dataset import LoadSAInjectDataset
from .encode import EncodeImagePrompt
from .inspector import InspectSelfAttnInjection
from .load import LoadSAInjectAdapter
from .save import SaveSAInjectAdapter
from .settings import SAInjectTrainingSettings
from .train import TrainSAInjectAdapter

NODES = [
    LoadSAInjectDataset,
    TrainSAInjectAdapter,
    SAInjectTrainingSettings,
    SaveSAInjectAdapter,
    LoadSAInjectAdapter,
    EncodeImagePrompt,
    ApplySelfAttnInjection,
    InspectSelfAttnInjection,
]
