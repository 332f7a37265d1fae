"""The peak of a process tree: what was held for a moment, also by a child, and counted once."""

import subprocess
import sys
import time

from mu2llm.memory import PeakMemory, tree_estimate, tree_pss

HOLD = "import sys; held = bytearray(b'1') * (200 << 20); print('held', flush=True); sys.stdin.read()"


def test_what_a_child_holds_is_counted_and_what_ended_is_not():
    before = tree_pss(), tree_estimate()
    with PeakMemory(0.02) as peak:
        child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout and child.stdout.readline() == "held\n"
        during = tree_pss(), tree_estimate()
        until = time.monotonic() + 30
        while peak.gib * 2**30 < before[0] + 190 * 2**20 and time.monotonic() < until:
            time.sleep(0.02)
        child.communicate("")
    assert all(now - was > 190 * 2**20 for was, now in zip(before, during, strict=True))
    assert peak.gib * 2**30 > before[0] + 190 * 2**20
    assert tree_pss() < during[0] - 150 * 2**20
