"""Rank 0 works for longer than the others' collectives would wait; then it fails, in two ways. Run under torchrun."""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from calibtrain import distributed
from calibtrain.distributed import wait_for_main
from calibtrain.errors import UserError


def fail(error):
    raise error


dist.init_process_group("gloo", timeout=timedelta(seconds=2))
rank = dist.get_rank()
found = []
wait_for_main(lambda: time.sleep(5))
found.append("waited")
for error in (UserError("the disk is full"), OSError("no such place")):
    try:
        wait_for_main(lambda error=error: fail(error))
    except Exception as caught:
        found.append(f"{type(caught).__name__}: {caught}")
# Its store is that of rank 0; what is heard of rank 1 ends before its work.
distributed.COLLECTIVE_TIMEOUT, distributed.BEAT_SECONDS = timedelta(seconds=1), 0.2 if rank == 0 else 100.0
try:
    distributed.wait_for([0, 1], lambda: time.sleep(3 * (1 + rank)))  # rank 0 beats, and is waited for
except RuntimeError as caught:
    found.append(str(caught))
(Path(sys.argv[1]) / f"rank{rank}.txt").write_text("\n".join(found))
dist.destroy_process_group()
