"""Entry point of the tpu image: tells libtpu which machine this is, then becomes Beam's boot program.

On a machine without TPUs, such as the template's launcher, it adds nothing; nor outside Compute Engine, once it has
waited for the metadata server.
"""

import os
import sys
import time
import urllib.request

from pipelines.machines import MACHINES

BOOT = "/opt/apache/beam/boot"
PATIENCE_SECONDS = 60.0  # the metadata server of a machine that has just started can be away or busy


def machine_type(patience: float = PATIENCE_SECONDS) -> str:
    """Such as "ct5lp-hightpu-4t", from the metadata server; "" where it gives none for so many seconds."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/machine-type", headers={"Metadata-Flavor": "Google"}
    )
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.read().decode().rpartition("/")[2]
        except OSError as error:
            if time.monotonic() > until:
                print(f"no machine type from {host}: {error}", file=sys.stderr)
                return ""
        time.sleep(1)


def main(argv: list[str], boot: str = BOOT) -> None:
    """Replaces this process; variables that are set already win."""
    machine = MACHINES.get(machine_type())
    told = machine.tpu_environment() if machine else {}
    os.execve(boot, [boot, *argv], {**told, **os.environ})


if __name__ == "__main__":
    main(sys.argv[1:])
