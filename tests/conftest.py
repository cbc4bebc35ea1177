import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: with several, small tests wait for each other's threads
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the scripts, and toy_envs for `toy_envs:Endless-v0`
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])  # in subprocesses


@pytest.fixture(autouse=True)
def one_thread():
    """Each test begins with one thread, also after one whose `main` has asked for more."""
    import torch  # after OMP_NUM_THREADS

    torch.set_num_threads(1)
