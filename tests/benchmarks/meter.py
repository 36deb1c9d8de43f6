"""Run a command and write what it took: ``python -S meter.py FILE COMMAND...``.

A small process of its own: a process begins with the peak memory of the one that started it.
"""

import json
import os
import sys

if __name__ == "__main__":
    pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
    _, status, used = os.wait4(pid, 0)
    spent = {"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}
    with open(sys.argv[1], "w") as file:  # noqa: PTH123 - pathlib is most of this process
        json.dump(spent, file)
    sys.exit(os.waitstatus_to_exitcode(status) % 256)
