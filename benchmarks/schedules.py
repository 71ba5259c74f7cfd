"""Random hostile schedules against the supervisor, with every rule of tests/unit/core_watch.py checked at every event.

    python benchmarks/schedules.py --seeds 10000 [--json PATH]     # the sweep, on all cores
    python benchmarks/schedules.py --seed 123                      # one of them again

A seed is a history: messages that overtake each other, come twice or late, nodes that die or fall silent, corrupt
state, damaged checkpoints, a controller that comes back from its journal; and then a way to the end without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))

from core_body import Body
from core_world import Tape
from test_core_histories import tape_of

CHUNK = 25


def live(seed: int) -> tuple[int, str]:
    """The events of this seed's history, and what was wrong with it."""
    body = Body(Tape(tape_of(seed)))
    try:
        body.run()
    except Exception:
        return len(body.watch.log), traceback.format_exc()
    return len(body.watch.log), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--json", type=Path, help="also write the outcome there")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        events, wrong = live(arguments.seed)
        print(wrong or f"seed {arguments.seed}: {events} events, no rule broken")
        sys.exit(1 if wrong else 0)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    began = time.monotonic()
    total, failed = 0, {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for seed, (events, wrong) in zip(seeds, pool.map(live, seeds, chunksize=CHUNK), strict=True):
            total += events
            if wrong:
                failed[seed] = wrong
                print(f"seed {seed}:\n{wrong}", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(seeds):,} schedules, {total:,} events, {seconds:.0f} s: {len(failed)} with a broken rule")
    if arguments.json:
        document = {"schedules": len(seeds), "events": total, "seconds": seconds, "failed": failed}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
