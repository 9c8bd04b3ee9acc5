"""What the Flex Template launcher runs: pipelines.generate_images, imported so that its stages unpickle on workers.

A template's parameters arrive as --some_name=value, and the job's own options are spelled --some-name.
"""

import sys

from pipelines.generate_images import main
from pipelines.options import GenerateOptions
from sdjax.request import field_types


def own_spelling(argv: list[str]) -> list[str]:
    """The arguments, with the underscores of the job's own options as dashes."""
    own = GenerateOptions.defaults().keys() | field_types().keys()
    spelled = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name[2:] in own:
            name = name.replace("_", "-")
        spelled.append(name + equals + value)
    return spelled


if __name__ == "__main__":
    sys.exit(main(own_spelling(sys.argv[1:])))
