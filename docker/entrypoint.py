"""Entry point of the tpu image: tells libtpu which machine this is, then becomes Beam's boot program.

Outside Compute Engine, and on a machine without TPUs such as the template's launcher, it adds nothing.
"""

import os
import sys
import urllib.request

from pipelines.machines import MACHINES

BOOT = "/opt/apache/beam/boot"


def machine_type() -> str:
    """Such as "ct5lp-hightpu-4t", from the metadata server; "" where there is none."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/machine-type", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode().rpartition("/")[2]
    except OSError:
        return ""


def main(argv: list[str], boot: str = BOOT) -> None:
    """Replaces this process; variables that are set already win."""
    machine = MACHINES.get(machine_type())
    told = machine.tpu_environment() if machine else {}
    os.execve(boot, [boot, *argv], {**told, **os.environ})


if __name__ == "__main__":
    main(sys.argv[1:])
