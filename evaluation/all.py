"""All protocols on frozen features, from one forward pass per photo.

python -m evaluation.all --checkpoint CHECKPOINT --train FOLDER_OR_BETON --val ... --untrained
"""

from collections.abc import Sequence

from ibeton.evaluation.command import command
from ibeton.evaluation.frozen import cluster, knn, linear, logistic, parts, retrieval, semi

MODULES = (knn, linear, logistic, semi, cluster, parts, retrieval)
PROTOCOLS = tuple(module.PROTOCOL for module in MODULES)


def main(argv: Sequence[str] | None = None) -> int:
    return command(PROTOCOLS, "all", "All protocols on frozen features.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
