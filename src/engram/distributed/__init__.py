"""Floor 1: what several processes of one training run tell each other."""

from engram.distributed.processes import (
    Group,
    agreed_number,
    anywhere,
    device_of,
    everywhere_equal,
    from_first,
    group_apart,
    group_for,
    leave_at_exit,
    process_count,
    process_rank,
    shard_group,
    shard_parameter,
    share_parameter,
    sum_everywhere,
    unshare_parameter,
    wait_for_all,
)
from engram.distributed.requests import RowRequests, own_rows, rows_from_all, rows_of_each
from engram.distributed.rows import average_rows

__all__ = [
    "Group",
    "RowRequests",
    "agreed_number",
    "anywhere",
    "average_rows",
    "device_of",
    "everywhere_equal",
    "from_first",
    "group_apart",
    "group_for",
    "leave_at_exit",
    "own_rows",
    "process_count",
    "process_rank",
    "rows_from_all",
    "rows_of_each",
    "shard_group",
    "shard_parameter",
    "share_parameter",
    "sum_everywhere",
    "unshare_parameter",
    "wait_for_all",
]
