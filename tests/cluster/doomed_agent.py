"""An agent process that is there to be killed: starts two workers, prints the pids of its zygote and workers, waits."""

import sys
import threading
from pathlib import Path

from test_node_workers import Node

node = Node(Path(sys.argv[1]), slots=2)
node.begin(1, "wait")
pids = [node.next_message().step for _ in range(2)]
print(node.zygote_pid(), *pids, flush=True)
threading.Event().wait(60)
