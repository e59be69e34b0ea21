"""Sums over ranks: alone they are the values themselves, in a group those of all."""

import json

import torch

from minitune import distributed

RANK = """
import json, os, sys
import torch
from torch import distributed as group
from minitune import distributed

other = os.fork()
rank = int(other == 0)
group.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=2)
gradient = torch.tensor([1.0 + rank])
distributed.add_up([gradient])
print(json.dumps([distributed.rank(), distributed.total(3 + rank), distributed.total(0.5 + rank), gradient.item()]))
sys.stdout.flush()
group.destroy_process_group()
if rank == 1:
    os._exit(0)
os.waitpid(other, 0)
"""


def test_a_process_alone_is_rank_0_and_its_sums_are_its_values():
    gradient = torch.tensor([1.5])
    distributed.add_up([gradient])
    assert (distributed.rank(), distributed.total(3), distributed.total(0.5), gradient.item()) == (0, 3, 0.5, 1.5)


def test_sums_are_of_all_ranks_and_keep_their_type(tmp_path, forks):
    done = forks.start(RANK, "rank", f"file://{tmp_path}/meet")
    assert done.wait() == 0, done.err.read_text()
    said = sorted(json.loads(line) for line in done.out.read_text().splitlines())
    assert said == [[0, 7, 2.0, 3.0], [1, 7, 2.0, 3.0]]
