"""A run's settings: one YAML file and dotted `key=value` overrides in, one checked and frozen RunConfig out.

schema.py holds every key with its type, default and meaning; methods.py what is special to each training method;
metrics.py the metrics of an evaluation; rules.py the combinations that cannot work; load.py reads and merges; errors.py
turns every fault into one line that names the key, the value and the nearest valid choice.
"""

from smolray.config.data import AUTO_LENGTHS as AUTO_LENGTHS
from smolray.config.data import ColumnsConfig as ColumnsConfig
from smolray.config.data import DataConfig as DataConfig
from smolray.config.data import SourceConfig as SourceConfig
from smolray.config.errors import ConfigError as ConfigError
from smolray.config.errors import explain as explain
from smolray.config.load import check_run as check_run
from smolray.config.load import load_config as load_config
from smolray.config.load import read_settings as read_settings
from smolray.config.load import to_yaml as to_yaml
from smolray.config.methods import METHODS as METHODS
from smolray.config.methods import DPOConfig as DPOConfig
from smolray.config.methods import SimPOConfig as SimPOConfig
from smolray.config.metrics import METRICS as METRICS
from smolray.config.optimizer import ModelGroup as ModelGroup
from smolray.config.optimizer import OptimizerConfig as OptimizerConfig
from smolray.config.schema import EvalConfig as EvalConfig
from smolray.config.schema import ImageConfig as ImageConfig
from smolray.config.schema import LoraConfig as LoraConfig
from smolray.config.schema import ModelConfig as ModelConfig
from smolray.config.schema import RunConfig as RunConfig
from smolray.config.schema import TrainConfig as TrainConfig
