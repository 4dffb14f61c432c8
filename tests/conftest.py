"""Test session settings: the repository on the path of every process, one thread each, nothing goes online."""

import os
import sys
import threading
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
for path in (ROOT, ROOT / "tests"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ.update(
    OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline",
    WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip
# tqdm shares its lock with forked children: one that a test kills while it holds the lock would stop its parent.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
