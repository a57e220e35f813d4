"""The old name of `hp_plugin.launch`; goes with release 0.3."""

import sys
import warnings

from hp_plugin.launch import main
from hp_plugin.processes.rank import begin_rank

warnings.warn(
    "hp_plugin.megatron_adapter.launch is hp_plugin.launch now: torchrun ... -m hp_plugin.launch; "
    "the old name goes with hp-plugin 0.3",
    DeprecationWarning,
    stacklevel=1,  # run by `python -m`, it is this module that is at fault, and the warning is shown
)

if __name__ == "__main__":
    begin_rank()
    main(sys.argv[1:])
