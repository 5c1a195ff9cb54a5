"""What the experiments share: paged layouts, poison, comparison, sweeps, devices, timing.

Importing it makes the modules of every experiment importable, whichever file was started.
"""

import sys
from pathlib import Path

for _folder in sorted(Path(__file__).resolve().parents[1].glob("[0-9]_*")):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))
