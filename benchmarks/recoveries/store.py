"""The rendezvous store of several torch elastic agents, in a process of its own: python -m recoveries.store PORT"""

import signal
import sys

from torch.distributed import TCPStore

if __name__ == "__main__":
    store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
    signal.pause()
